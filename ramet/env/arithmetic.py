"""Arithmetic: expressions whose value is known.

Two generators:

- `rows`: sums and differences of small integers, written in rows of a few operands, each row a
  document with its own key, as on a bill. Every row is in the root's prompt too, so delegation
  adds no information. The tasks of the nano model.
- `selfcest`: the generator of the SELFCEST release with its exact distribution (specification,
  section 4): 3-10 operators out of + - *, operands of 3-7 digits, up to two pairs of parentheses.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ramet.agents.context import ContextStore
from ramet.agents.tree import Message, Task
from ramet.env.settings import EnvSettings, words
from ramet.env.splits import drawn, part
from ramet.errors import ConfigError, TaskError
from ramet.rewards.exact_match import canonical_integer, graded_integer, integer_match

OBJECTIVE = "sum"
KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROW = 6


@dataclass(frozen=True, slots=True)
class RowsEnvironment:
    """Sums in rows.

    iid and training tasks have `operands` of them (inclusive range, log-uniform: half of 2..24 are at
    most 6) in rows of at most `row` (inclusive range, uniform); out-of-distribution ones have `ood_operands` in rows of
    the longest kind. All operands are 1..`largest`. A sum's operands alone say whether it is for training, for tuning or
    to be measured (`ramet.env.splits`).
    """

    operands: tuple[int, int] = (2, 24)
    ood_operands: tuple[int, int] = (48, 54)
    row: tuple[int, int] = (5, 6)
    largest: int = 9
    name: str = "rows"
    splits = ("iid", "ood")
    metrics = ("accuracy",)

    def __post_init__(self) -> None:
        for name in ("operands", "ood_operands", "row"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"env.{name} is a range from a smaller to a larger count, both at least 1, not {low} to {high}")
        if self.largest < 1:
            raise ConfigError(f"env.largest is the largest operand, at least 1, not {self.largest}")

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        part(split)
        far = split in ("ood", "tune_ood")
        rng = random.Random(f"rows/{split}/{seed}")
        sums = drawn(split, self._sums(self.ood_operands if far else self.operands, rng))
        return [
            rows_task(list(values), f"{split}-{seed}-{i}", row=self.row[1] if far else rng.randint(*self.row))
            for i, values in enumerate(itertools.islice(sums, count))
        ]

    def _sums(self, lengths: tuple[int, int], rng: random.Random) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Random operands with their content, the first of them positive."""
        low, high = lengths
        while True:
            length = int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))
            values = [rng.randint(1, self.largest) * rng.choice((1, -1)) for _ in range(min(max(length, low), high))]
            values[0] = abs(values[0])
            yield spell(values, signed=True), tuple(values)

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return integer_match(task, answer)

    def canonical(self, answer: str) -> str:
        return canonical_integer(answer)

    def size(self, task: Task) -> int:
        return int(task.meta["operands"])


class RowsSettings(EnvSettings):
    """Sums in rows. Ranges are inclusive."""

    kind: Literal["rows"] = "rows"
    """Which environment."""
    operands: tuple[int, int] = (2, 24)
    """Operands of a training or iid task, log-uniform."""
    ood_operands: tuple[int, int] = (48, 54)
    """Operands of a task out of distribution."""
    row: tuple[int, int] = (5, 6)
    """Operands in a row at most; a task draws one of these."""
    largest: Annotated[int, Field(ge=1, le=99)] = 9
    """The largest operand."""

    language: ClassVar[bool] = False

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("operands", "ood_operands", "row"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be two lengths from 1 on, the smaller first")
        if max(self.operands[1] / self.row[0], self.ood_operands[1] / self.row[1]) > len(KEYS):
            raise ValueError(f"a sum has at most {len(KEYS)} rows; make operands shorter or row longer")
        return self

    def build(self, count: Callable[[str], int] = words) -> RowsEnvironment:
        return RowsEnvironment(self.operands, self.ood_operands, self.row, self.largest)


def rows_task(values: list[int], task_id: str, first_key: int = 0, row: int = ROW, signed: bool = False) -> Task:
    """The task of adding up `values`, in balanced rows of at most `row`, keyed from letter `first_key` on.

    `signed` writes the first row's leading plus too, as in the rows after it.
    """
    count = -(-len(values) // row)
    if count > len(KEYS):
        raise TaskError(f"{len(values)} operands need {count} rows; at most {len(KEYS)} rows of {row} are supported")
    bounds = [len(values) * i // count for i in range(count + 1)]
    rows = [values[a:b] for a, b in itertools.pairwise(bounds)]
    documents = {KEYS[(first_key + i) % 26]: spell(r, signed or i > 0) for i, r in enumerate(rows)}
    text = ContextStore(documents).render(documents) + "\n" + OBJECTIVE
    return Task(task_id, (Message("user", text),), documents, sum(values), {"operands": len(values)})


def spell(values: Sequence[int], signed: bool) -> str:
    """`3+4-2`; with `signed` a leading plus is written."""
    text = "".join(f"{value:+d}" for value in values)
    return text if signed else text.removeprefix("+")


def parse_sum(text: str) -> list[int]:
    """The operands of a flat sum such as `12+34-5`. Raises `TaskError` for anything else."""
    compact = re.sub(r"\s+", "", text)
    if not re.fullmatch(r"[+-]?\d{1,6}([+-]\d{1,6})*", compact, re.ASCII):
        raise TaskError(f"{text[:60]!r} is not a sum: write integers of at most six digits joined by + and -, such as 12+34-5")
    return [int(term) for term in re.findall(r"[+-]?\d+", compact)]


@dataclass(frozen=True, slots=True)
class SelfcestEnvironment:
    """The SELFCEST arithmetic tasks; `graded` gives partial credit as the release does."""

    graded: bool = True
    name: str = "selfcest"
    splits = ("iid",)
    metrics = ("accuracy",)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        part(split, ("train", "tune", "iid"))
        # The former name of the environment, so that the same seeds keep giving the same tasks.
        rng = random.Random(f"reference/{split}/{seed}")
        expressions = ((expression, (expression, value)) for expression, value in iter(lambda: selfcest_expression(rng), None))
        made = []
        for index, (expression, value) in enumerate(itertools.islice(drawn(split, expressions), count)):
            prompt = f"Calculate {expression}\nEnd with a line `Answer: <value>`."
            made.append(
                Task(f"{split}-{seed}-{index}", (Message("user", prompt),), {}, value, {"operands": len(re.findall(r"\d+", expression))})
            )
        return made

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return graded_integer(task, answer) if self.graded else integer_match(task, answer)

    def canonical(self, answer: str) -> str:
        return canonical_integer(answer)

    def size(self, task: Task) -> int:
        return int(task.meta["operands"])


class SelfcestSettings(EnvSettings):
    """The SELFCEST arithmetic tasks."""

    kind: Literal["selfcest"] = "selfcest"
    """Which environment."""
    graded: bool = True
    """Partial credit, as the release gives it."""

    def build(self, count: Callable[[str], int] = words) -> SelfcestEnvironment:
        return SelfcestEnvironment(self.graded)


def selfcest_expression(rng: random.Random) -> tuple[str, int]:
    """One accepted expression and its value (specification, section 4)."""
    for _ in range(2000):
        expression, value = _draft(rng)
        if len(str(abs(value))) <= 16:
            return expression, value
    raise TaskError("no expression was accepted in 2000 attempts")


def _draft(rng: random.Random) -> tuple[str, int]:
    """One expression before the test on its value's digits."""
    operators = rng.choices("+-*", weights=(4, 3, 6), k=rng.randint(3, 10))
    numbers = []
    for _ in range(len(operators) + 1):
        digits = rng.randint(3, 7)
        numbers.append(rng.randint(10 ** (digits - 1), 10**digits - 1))
    spans = _parentheses(operators, rng)
    opens, closes = {a for a, _ in spans}, {b for _, b in spans}
    pieces: list[str] = []
    for i, number in enumerate(numbers):
        pieces += ["("] * (i in opens) + [str(number)] + [")"] * (i in closes) + operators[i : i + 1]
    return " ".join(pieces), _value(numbers, operators, spans)


def _parentheses(operators: list[str], rng: random.Random) -> list[tuple[int, int]]:
    """Up to two disjoint spans of operands (first, last) that get parentheses."""
    spans: list[tuple[int, int]] = []

    def free(first: int, last: int) -> bool:
        return all(last < a or b < first for a, b in spans)

    candidates = [
        i
        for i, operator in enumerate(operators)
        if operator in "+-" and ("*" in operators[max(i - 1, 0) : i] or "*" in operators[i + 1 : i + 2])
    ]
    rng.shuffle(candidates)
    for i in candidates:
        if len(spans) < 2 and free(i, i + 1) and rng.random() < 0.55:
            spans.append((i, i + 1))
    if len(spans) < 2 and rng.random() < 0.22:
        count = min(rng.randint(3, 5), len(operators) + 1)
        first = rng.randint(0, len(operators) + 1 - count)
        inside = set(operators[first : first + count - 1])
        if "*" in inside and inside & {"+", "-"} and free(first, first + count - 1):
            spans.append((first, first + count - 1))
    return spans


def _value(numbers: list[int], operators: list[str], spans: list[tuple[int, int]]) -> int:
    """Exact value: spans first, then products, then sums."""
    for a, b in sorted(spans, reverse=True):
        inner = _value(numbers[a : b + 1], operators[a:b], [])
        numbers = [*numbers[:a], inner, *numbers[b + 1 :]]
        operators = [*operators[:a], *operators[b:]]
    total, product = 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total, product = total + product, number if operator == "+" else -number
    return total + product


def statement(rows: int) -> str:
    """What a branch that has the tool writes before it chooses: the number of its rows."""
    return f"rows: {rows}"
