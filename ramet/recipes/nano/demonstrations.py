"""Demonstrations from which the nano base learns to work alone and to delegate, and to prefer neither.

Two ways of adding up rows of operands are shown, each as often as the other at every length at which
the tool is offered:

- alone: running totals, one equation a line, each taking in one digit, then `Answer: total`. An operand
  of several digits is taken in digit by digit, 16 as 10 and 6. Demonstrations end after `WINDOW`
  operands: of longer sums only the beginning is shown, so the base starts them alone as readily as
  short ones but has never seen how they go on.
- delegation: one call that hands one to three rows to each clone (uniformly), then running totals of
  their results, of which there are at most `RESULTS`; those that came back empty are asked for again.

A branch that has the tool first states how many rows it was given, and calls or goes on with the next
token, so that what the choice could depend on is at hand where the choice is made. Calling or not, and
the rows a clone, are the only free choices. Also shown: answering with the last total when the budget
ends. Budgets are random and tell nothing. No sum is shown that is there to be tuned on or measured.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ramet.agents.chat import ControlTokenFormat
from ramet.agents.protocol import OUT_OF_BUDGET_NOTICE, CloneResult, left_line, render_call, render_results, tool_schema
from ramet.agents.tree import Message, Status
from ramet.env.arithmetic import OBJECTIVE, ROW, parse_sum, rows_task, spell, statement
from ramet.env.splits import part_of

WINDOW = 8
RESULTS = 12
LONGEST = 56


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a demonstration: a message, or an assistant turn (trained unless `context`)."""

    text: str
    call: str | None = None
    closed: bool = True
    context: bool = False


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One branch: its prompt message, whether the tool is offered, and alternating turns and tool messages."""

    prompt: str
    tools: bool
    pieces: tuple[Piece, ...]


def equations(values: list[int], stop_after: int | None = None) -> tuple[str, bool]:
    """Running totals of `values`, one equation a line; (text, whether all operands were taken in)."""
    total, lines = values[0], []
    for value in values[1:stop_after]:
        for term in digit_terms(value):
            lines.append(f"{total}{term:+d}={total + term}\n")
            total += term
    return "".join(lines), stop_after is None or len(values) <= stop_after


def digit_terms(value: int) -> list[int]:
    """`value` as a sum of one term for each digit that is not 0: -16 is -10 and -6."""
    digits = str(abs(value))
    sign = -1 if value < 0 else 1
    return [sign * int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"] or [0]


def demonstrate(rng: random.Random) -> Demonstration:
    """One random demonstration."""
    largest = round(10 ** rng.uniform(1, 1.995)) if rng.random() < 0.2 else 9
    longest = LONGEST if largest == 9 else 2 * WINDOW
    # Long prompts cost most tokens and teach least: the longer the rarer.
    count = rng.randint(1, WINDOW) if rng.random() < 0.6 else round(WINDOW * (longest / WINDOW) ** rng.uniform(0.05, 1))
    row = rng.randint(2, ROW)
    count = min(count, RESULTS * row)
    values = _operands(count, largest, rng)
    tools = rng.random() < 0.65
    delegate = tools and rng.random() < 0.5
    # A clone's first row is any row of its parent's, so first rows are signed half of the time.
    task = rows_task(values, "demonstration", rng.randrange(26), row, signed=rng.random() < 0.5)
    keys = list(task.documents)
    rows = [parse_sum(str(text)) for text in task.documents.values()]
    left = round(math.exp(rng.uniform(math.log(16), math.log(800))))
    prompt = "\n".join([task.messages[0].content, left_line(left, None)])
    stated = statement(len(rows)) if tools else ""
    if delegate:
        pieces = _delegation(stated, keys, rows, left, rng)
    else:
        text, complete = equations(values, WINDOW)
        text = (stated and stated + "\n") + text
        pieces = [Piece(text + f"Answer: {sum(values)}")] if complete else [Piece(text, closed=False)]
    if rng.random() < 0.06:
        pieces = _cut(pieces, rng)
    return Demonstration(prompt, tools, tuple(pieces))


def _operands(count: int, largest: int, rng: random.Random) -> list[int]:
    """Operands of a sum that is there to be trained on: none that baselines are tuned on or that is measured (one number is no sum)."""
    while True:
        values = [rng.randint(1, largest) * rng.choice((1, -1)) for _ in range(count)]
        if count == 1 or part_of(spell(values, signed=True)) == "train":
            return values


def _delegation(stated: str, keys: list[str], rows: list[list[int]], left: int, rng: random.Random) -> list[Piece]:
    size = rng.randint(1, 3)
    groups = [list(range(i, min(i + size, len(keys)))) for i in range(0, len(keys), size)]
    sums = [sum(sum(rows[i]) for i in group) for group in groups]
    missing = rng.randrange(len(groups)) if len(groups) > 1 and rng.random() < 0.06 else None
    status = rng.choice((Status.OUT_OF_BUDGET, Status.EMPTY, Status.TIMED_OUT, Status.FAILED))
    results = [CloneResult(status) if i == missing else CloneResult(Status.ANSWERED, str(s)) for i, s in enumerate(sums)]
    pieces = [_call([[keys[i] for i in g] for g in groups], stated), _results(results, left, rng)]
    if missing is not None:
        pieces += [
            _call([[keys[i] for i in groups[missing]]]),
            _results([CloneResult(Status.ANSWERED, str(sums[missing]))], left, rng),
        ]
        sums = [s for i, s in enumerate(sums) if i != missing] + [sums[missing]]
    text, _ = equations(sums)
    return [*pieces, Piece(text + f"Answer: {sum(sums)}")]


def _call(groups: list[list[str]], stated: str = "") -> Piece:
    return Piece(stated, render_call([{"objective": OBJECTIVE, "context_keys": group} for group in groups]))


def _results(results: list[CloneResult], left: int, rng: random.Random) -> Piece:
    return Piece(render_results(results, left_line(rng.randint(1, left), None), 10_000), context=True)


def _cut(pieces: list[Piece], rng: random.Random) -> list[Piece]:
    """Cut the last turn short and answer, on notice, with the last total that was reached, or the first operand."""
    text = pieces[-1].text
    lines = text.splitlines(keepends=True)
    kept = "".join(lines[: rng.randint(0, max(len(lines) - 1, 0))])
    partial = text[len(kept) : len(kept) + rng.randint(0, 3)]
    totals = re.findall(r"=(-?\d+)\n", kept) or re.findall(r"-?\d+", text.partition("\n")[2] if text.startswith("rows") else text)
    total = totals[-1] if "=" in kept else totals[0]
    notice = Piece(f"{OUT_OF_BUDGET_NOTICE}\n{left_line(rng.randint(6, 12), None)}", context=True)
    cut = kept + partial.partition("A")[0].partition("r")[0]
    return [*pieces[:-1], Piece(cut, closed=False), notice, Piece(f"Answer: {total}")]


def demonstration_texts(count: int, seed: int) -> Iterator[str]:
    """Plain texts of demonstrations, for training the tokenizer."""
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(count):
        demonstration = demonstrate(rng)
        yield demonstration.prompt
        for piece in demonstration.pieces:
            yield piece.text
            if piece.call:
                yield piece.call


def encode(demonstration: Demonstration, chat: ControlTokenFormat) -> tuple[list[int], list[bool]]:
    """Token ids and which of them are trained. A turn that is cut has no end to train."""
    ids = chat.render([Message("user", demonstration.prompt)], [tool_schema()] if demonstration.tools else ())
    mask = [False] * len(ids)
    closed = True
    for piece in demonstration.pieces:
        if piece.context:
            new = chat.after_turn(piece.text, closed)
        else:
            new = chat.turn(piece.text, piece.call)
            closed = piece.closed
            if not closed:
                new = new[:-1]
        ids += new
        mask += [not piece.context] * len(new)
    return ids, mask
