"""`ramet bench needle`: what a method loses on a real model, against dense attention on the same text.

A text of generated notes has one that the question asks for, at a given depth. For every method and number of hosts:

    found        the model names the code when it decodes greedily
    divergence   Kullback-Leibler divergence of its next-token distributions from dense attention's, the mean over the tokens
                 that dense attention decodes, in nats
    recall       of the rows that the question attends to most under dense attention, as many as are passed on, the share that
                 is in the anchor or passed on: the mean over layers and KV heads
    pairs        query-key pairs that the busiest host attends to, a share of dense: what the method costs

APB has no retaining heads here: it passes on by the question, as Spava does. Hosts are simulated one after another in this
process. The run resumes from its journal.
"""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramet.agents.journal import Journal, fingerprint
from ramet.attention.anchored import Selections
from ramet.attention.comm import RankGroup, SingleRank, simulated
from ramet.attention.cost import pairs
from ramet.attention.hf import attach, extend, prefill, recorded
from ramet.attention.methods import Method
from ramet.attention.plan import BlockPlan
from ramet.benchmarks.evaluation.statistics import accuracy_interval, mean_interval
from ramet.benchmarks.speed.attention import divergence
from ramet.display import progress
from ramet.display.plots import save
from ramet.errors import ConfigError
from ramet.policy.models.catalogue import resolve, weights_id
from ramet.policy.models.load import load_model
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 16
EXACT = 1e-8
"""Nats below which a divergence is rounding."""
_PLACES = ("harbour", "library", "orchard", "station", "bakery", "museum", "quarry", "garden", "theatre", "market", "mill", "chapel")
_DEEDS = ("was painted", "was quiet", "was closed early", "had many visitors", "smelled of rain", "was being repaired", "had a new door")
_TIMES = ("On Monday", "In the morning", "Last winter", "At noon", "After the storm", "Before dawn", "In spring", "That evening")


@dataclass(frozen=True)
class NeedleText:
    """A text with a code in it: token ids, the number of those at the end that ask for the code, and the code."""

    ids: list[int]
    query: int
    code: str


def needle_text(tokenizer: Any, length: int, depth: float, seed: int) -> NeedleText:
    """About `length` tokens, never more, with the code at `depth` (0 first, 1 last) of the notes."""
    rng = random.Random(f"needle/{seed}/{depth}/{length}")
    code, colour = str(rng.randint(10000, 99999)), rng.choice(("red", "green", "blue", "white", "black"))
    needle = f"The code of the {colour} box is {code}."
    question = f"What is the code of the {colour} box? Reply with the number only."
    head, tail = _frame(tokenizer, question)
    room = length - len(head) - len(tail) - len(tokenizer.encode(" " + needle, add_special_tokens=False))
    notes: list[str] = []
    used = 0
    while True:
        note = f"{rng.choice(_TIMES)} the {rng.choice(_PLACES)} {rng.choice(_DEEDS)}, and the {rng.choice(_PLACES)} {rng.choice(_DEEDS)}."
        size = len(tokenizer.encode(" " + note, add_special_tokens=False))
        if used + size > room:
            break
        notes.append(note)
        used += size
    notes.insert(round(depth * len(notes)), needle)
    body = tokenizer.encode(" ".join(notes), add_special_tokens=False)
    return NeedleText([*head, *body, *tail], len(tail), code)


def _frame(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """The ids before and after the notes: the model's own chat template where it has one."""
    mark = "NOTES"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Read these notes.\n{mark}\n\n{question}"}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = f"Read these notes.\n{mark}\n\nQuestion: {question}\nAnswer:"
    before, _, after = text.partition(mark)
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)


def decode(
    model: Any,
    group: RankGroup,
    method: Method,
    text: NeedleText,
    stop: int,
    forced: Sequence[int] = (),
    selections: list[list[Selections]] | None = None,
) -> tuple[list[int], Tensor]:
    """The ids that the method decodes greedily, `stop` included, and its logits [ids, vocabulary] along `forced` ids, or its own."""
    (sequence,), first = prefill(model, group, method, [text.ids], [text.query], selections=selections)

    def along(path: Sequence[int]) -> tuple[list[int], Tensor]:
        at, rows, taken = sequence.fork(), [first[0]], list[int]()
        while True:
            taken.append(path[len(taken)] if path else int(rows[-1].argmax()))
            if len(taken) == (len(path) or ANSWER_TOKENS) or (not path and taken[-1] == stop):
                return taken, torch.stack(rows)
            rows.append(extend(model, group, [at], [taken[-1:]], method)[0])

    own, logits = along(())
    return own, logits if not forced or own == list(forced) else along(forced)[1]


def attended(model: Any, text: NeedleText) -> list[Tensor]:
    """Per layer, how much the question attends to each row of the context under dense attention: [Hk, context]."""
    context, shares = len(text.ids) - text.query, []
    for q, k, _ in recorded(model, text.ids)[0]:
        grouped = q[:, context:].reshape(k.shape[0], -1, q.shape[-1])
        shares.append((grouped @ k[:, :context].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1))
    return shares


def recall(plan: BlockPlan, selections: Sequence[Selections], shares: Sequence[Tensor]) -> float:
    """The recall that the module's docstring defines; 1 where nothing is passed on and nothing could be."""
    recalls: list[Tensor] = []
    for layer, share in zip(selections, shares, strict=True):
        held = torch.zeros_like(share, dtype=torch.bool)
        held[:, : plan.anchor] = True
        for rows in layer.rows.values():
            held.scatter_(1, rows, True)
        count = int(held.sum(1).min())
        best = share.topk(max(count, 1)).indices
        recalls.append(held.gather(1, best).float().mean())
    return float(torch.stack(recalls).mean())


def cases(hosts: Sequence[int], context: int, anchors: Sequence[int], passings: Sequence[int]) -> Iterator[tuple[str, Method, int]]:
    """(label, method, hosts): all three with their defaults; Spava over anchor and passing lengths on the first number of hosts."""
    for count in hosts:
        for name in ("spava", "apb", "star"):
            yield name, Method(name), count
    for anchor in anchors:
        for passing in passings:
            yield f"spava 1/{anchor} 1/{passing}", Method("spava", context // anchor, context // passing), hosts[0]


@dataclass(frozen=True)
class NeedlePlan:
    """What is measured.

    length   tokens of a text, at most
    hosts    numbers of hosts
    anchors, passings  of Spava on the first number of hosts: one part in so many of the context
    depths, samples    places of the code in the text, and texts for each
    """

    length: int
    hosts: Sequence[int]
    anchors: Sequence[int]
    passings: Sequence[int]
    depths: int
    samples: int
    seed: int


def bench_needle(policy: str, needle: NeedlePlan, out: Path) -> None:
    """Measure into the folder `out`: journal, results.json, a picture of cost against divergence."""
    path = resolve(policy)
    model, tokenizer, _ = load_model(path)
    if needle.length + ANSWER_TOKENS > model.config.get_text_config().max_position_embeddings:
        raise ConfigError(
            f"{needle.length} tokens and an answer exceed the model's {model.config.get_text_config().max_position_embeddings} positions"
        )
    attach(model)
    places = [(2 * i + 1) / (2 * needle.depths) for i in range(needle.depths)]
    texts = [(depth, needle_text(tokenizer, needle.length, depth, needle.seed + n)) for n in range(needle.samples) for depth in places]
    run = fingerprint("needle", needle.length, needle.depths, needle.seed, weights_id(path))
    with Journal(out / "journal.jsonl", run) as journal:
        done = {(r["case"], r["hosts"], r["text"]) for r in journal.records}
        for index, (depth, text) in enumerate(texts):
            context = len(text.ids) - text.query
            todo = [case for case in cases(needle.hosts, context, needle.anchors, needle.passings) if (case[0], case[2], index) not in done]
            if not todo and ("dense", 1, index) in done:
                continue
            about = {"text": index, "depth": depth, "length": len(text.ids)}
            dense_ids, expected = decode(model, SingleRank(), Method("dense"), text, tokenizer.eos_token_id)
            shares = attended(model, text)
            if ("dense", 1, index) not in done:
                named = text.code in tokenizer.decode(dense_ids)
                journal.append(about | {"case": "dense", "hosts": 1, "found": named, "divergence": 0.0, "recall": 1.0, "pairs": 1.0})
            for label, method, count in progress.each(todo, f"text {index + 1} of {len(texts)}"):
                plan = method.plan(context, text.query, count)
                assert isinstance(plan, BlockPlan)
                selections = [[Selections() for _ in shares]]
                stop = tokenizer.eos_token_id
                decoding = partial(decode, model, method=method, text=text, stop=stop, forced=dense_ids, selections=selections)
                own, logits = simulated(count, decoding)[0]
                journal.append(
                    about
                    | {
                        "case": label,
                        "hosts": count,
                        "found": text.code in tokenizer.decode(own),
                        "divergence": divergence(expected, logits),
                        "recall": recall(plan, selections[0], shares),
                        "pairs": max(pairs(plan, r) for r in range(count)) / (plan.length * (plan.length + 1) / 2),
                    }
                )
        records = summary(journal.records)
    write_json(out / "results.json", [meta("bench needle", needle.seed), *records])
    plot(records, out / "needle.png")
    show_records(records)
    logger.info(f"all of it in {out}")


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a case and number of hosts: means over texts, found with its Wilson interval, divergence with a t interval."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["case"], row["hosts"]), []).append(row)
    records = []
    for (case, hosts), group in grouped.items():
        accuracy = accuracy_interval({str(r["text"]): [float(r["found"])] for r in group})
        lost = mean_interval([r["divergence"] for r in group])
        records.append(
            {
                "record": "needle", "case": case, "hosts": hosts, "n": len(group), "length": max(r["length"] for r in group),
                "found": accuracy.mean, "ci_low": accuracy.low, "ci_high": accuracy.high,
                "divergence": lost.mean, "divergence_low": lost.low, "divergence_high": lost.high,
                "recall": statistics.mean(r["recall"] for r in group), "pairs": statistics.mean(r["pairs"] for r in group),
            }
        )  # fmt: skip
    return records


def show_records(records: Sequence[dict[str, Any]]) -> None:
    """Print one line a case and number of hosts."""
    table = Table("method", "hosts", "found", "divergence, nats", "recall", "attention, times less")
    for r in records:
        accuracy = f"{r['found']:.2f} ({r['ci_low']:.2f}-{r['ci_high']:.2f})"
        kl = f"{r['divergence']:.3g} ({r['divergence_low']:.2g}-{r['divergence_high']:.2g})"
        table.add_row(r["case"], str(r["hosts"]), accuracy, kl, f"{r['recall']:.2f}", f"{1 / r['pairs']:.1f}")
    show(table)
    if any(r["case"] == "apb" for r in records):
        show("apb has no retaining heads here: it passes on by the question, as spava does")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Attention saved on the busiest host against divergence from dense; what is exact, as Star on two hosts, has no place there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [r for r in records if r["divergence"] > EXACT]
    for colour, case in enumerate(dict.fromkeys(r["case"] for r in shown)):
        points = sorted((1 / r["pairs"], r["divergence"], r["hosts"]) for r in shown if r["case"] == case)
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=f"C{colour}", ms=4, label=case)
        for x, y, hosts in points:
            axes.annotate(str(hosts), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    axes.set(
        xscale="log", yscale="log", xlabel="times less attention than dense, busiest host", ylabel="divergence from dense, nats a token"
    )
    figure.legend(title="method, anchor, passing;\npoints: hosts", fontsize=8, title_fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    save(figure, path)
