"""How often a reward model prefers the better answer about a video, under which protocol, and whether it looks at the video at all.

Every output of a judge and every score of a model is kept in a journal, pair by pair; `results` computes all numbers from the
journal, so that they can be computed again without the model. Definitions (docs/video-rewards.md has them in words):

    pointwise   right if the better answer's score is above every other's; a tie is wrong, or half right if the protocol says so
    pairwise    k votes in each order; what cannot be read abstains; a majority decides; no majority is wrong (strict), half right (lenient)
    consistent  right in each of the two orders by itself; a judge that always picks one place gets 0, not one half
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ramet.agents.journal import Journal
from ramet.benchmarks.evaluation.statistics import Interval, clustered_mean, sign_test
from ramet.errors import ConfigError, RewardError, TaskError
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.rewards.video.judge import AnswerPair, Order, Vote, compare, majority, verdict_of
from ramet.rewards.video.pairs import PreferencePair, VideoInput
from ramet.storage import Record

CONDITIONS = ("right", "wrong", "none", "reversed", "shuffled")
"""The pair's own video, another pair's, none; its frames backwards, or in any order."""
RESAMPLES = 2000


@dataclass(frozen=True)
class BenchmarkProtocol:
    """How the pairs were judged, which belongs beside every number.

    k, order, temperature, max_tokens  of pairwise judging
    ties        what a tie of scores counts, in pointwise: 0 or 0.5
    frames, pixels                     of a video
    """

    mode: Literal["pairwise", "pointwise"]
    k: int = 1
    order: Order = "both"
    temperature: float = 1.0
    max_tokens: int | None = None
    ties: float = 0.0
    frames: int | None = None
    pixels: int | None = None
    seed: int = 0

    def line(self) -> str:
        """One line for people."""
        seen = f"{self.frames or '?'} frames of at most {self.pixels or '?'} pixels"
        if self.mode == "pointwise":
            return f"pointwise, ties count {self.ties:g}, {seen}, seed {self.seed}"
        order = "both orders" if self.order == "both" else "one order a pair, by the seed"
        tokens = f", at most {self.max_tokens} tokens" if self.max_tokens else ""
        return (
            f"pairwise, k={self.k}, {order}, temperature {self.temperature:g}{tokens}, unreadable outputs abstain, {seen}, seed {self.seed}"
        )


def shown_videos(pairs: Sequence[PreferencePair], condition: str, seed: int) -> dict[str, VideoInput]:
    """The video of each pair under a condition. `wrong` takes another pair's, of the same category where there is one."""
    if condition not in CONDITIONS:
        raise ConfigError(f"no condition {condition!r}; there are {', '.join(CONDITIONS)}")
    if condition == "none":
        return {pair.id: None for pair in pairs}
    if condition != "wrong":
        return {pair.id: pair.video for pair in pairs}
    shown: dict[str, VideoInput] = {}
    for pair in pairs:
        others = [p for p in pairs if p.video is not None and p.cluster != pair.cluster]
        if not others:
            raise ConfigError("the condition wrong needs pairs with different videos")
        alike = [p for p in others if p.category == pair.category] or others
        shown[pair.id] = random.Random(f"wrong/{seed}/{pair.id}").choice(alike).video
    return shown


def run_bench(
    model: Any, pairs: Sequence[PreferencePair], protocol: BenchmarkProtocol, conditions: Sequence[str], journal: Journal,
    report: Callable[[int], None] | None = None, at_once: int = 16,
) -> list[Record]:  # fmt: skip
    """Ask `model`, a `PairwiseJudge` or a `VideoRewardModel`, about every pair under every condition; known ones come from the journal.

    A model with a method `with_video` is shown frames backwards or shuffled; for one without, these conditions are the right one.
    """
    known = {(r["condition"], r["id"]) for r in journal if "condition" in r and "failed" not in r}
    clusters = {pair.id: pair.cluster for pair in pairs}
    for condition in conditions:
        videos = shown_videos(pairs, condition, protocol.seed)
        looking = model.with_video(order=condition) if condition in ("reversed", "shuffled") and hasattr(model, "with_video") else model
        left = [pair for pair in pairs if (condition, pair.id) not in known]
        if report is not None:
            report(len(pairs) - len(left))
        for start in range(0, len(left), at_once):
            part = [replace(pair, video=videos[pair.id]) for pair in left[start : start + at_once]]
            for pair, judgement in zip(part, _judgements(looking, part, protocol), strict=True):
                cluster = clusters[pair.id]
                journal.append({"condition": condition, "id": pair.id, "category": pair.category, "cluster": cluster, **judgement})
            if report is not None:
                report(len(part))
    order = {pair.id: n for n, pair in enumerate(pairs)}
    latest = {(r["condition"], r["id"]): r for r in journal if "condition" in r}  # what failed once may have been done since
    chosen = [r for r in latest.values() if r["condition"] in conditions and r["id"] in order]
    return sorted(chosen, key=lambda r: (conditions.index(r["condition"]), order[r["id"]]))


def _judgements(model: Any, pairs: Sequence[PreferencePair], protocol: BenchmarkProtocol) -> list[Record]:
    """The scores or votes of the model for each pair; `failed` where its video cannot be read, it is too long, or no score comes of it."""
    try:
        return _judge_all(model, pairs, protocol)
    except (TaskError, RewardError) as error:
        if len(pairs) > 1:
            return [_judgements(model, [pair], protocol)[0] for pair in pairs]
        return [{"failed": str(error)}]


def _judge_all(model: Any, pairs: Sequence[PreferencePair], protocol: BenchmarkProtocol) -> list[Record]:
    if protocol.mode == "pointwise":
        scores = iter(model.score([VideoAnswer(p.video, p.question, answer) for p in pairs for answer in (p.chosen, *p.rejected)]))
        return [{"chosen": next(scores), "rejected": [next(scores) for _ in pair.rejected]} for pair in pairs]
    duels = [AnswerPair(f"{p.id}/{n}", p.video, p.question, p.chosen, r) for p in pairs for n, r in enumerate(p.rejected)]
    verdicts = iter(compare(model, duels, protocol.k, protocol.order, protocol.seed))
    return [{"votes": [[[v.forward, v.choice, v.output, v.error] for v in next(verdicts).votes] for _ in pair.rejected]} for pair in pairs]


def duels_of(record: Record) -> list[list[Vote]]:
    """The votes of a pairwise record, one list for each rejected answer; a is the better one."""
    return [[Vote(*vote) for vote in votes] for votes in record["votes"]]


def measures(record: Record, ties: float = 0.0) -> dict[str, float]:
    """What one pair contributes to each measure; a measure that it says nothing about is left out."""
    if "failed" in record:
        return {"accuracy": 0.0, "lenient": 0.0, "tie_rate": 0.0, "error_rate": 1.0}
    if "chosen" in record:
        best = max(record["rejected"])
        tie = record["chosen"] == best
        return {"accuracy": ties if tie else float(record["chosen"] > best), "tie_rate": float(tie), "error_rate": 0.0}
    duels = duels_of(record)
    verdicts = [verdict_of(votes) for votes in duels]
    every = [vote for votes in duels for vote in votes]
    valid = [vote for vote in every if vote.choice is not None]
    contributions = {
        "accuracy": float(all(v.winner == "a" for v in verdicts)),
        "lenient": min({"a": 1.0, None: 0.5, "b": 0.0}[v.winner] for v in verdicts),
        "tie_rate": float(any(v.winner is None for v in verdicts)),
        "invalid_rate": 1 - len(valid) / len(every),
        "error_rate": sum(bool(vote.error) for vote in every) / len(every),
    }
    if valid:
        contributions["first_share"] = sum(vote.choice == 1 for vote in valid) / len(valid)
    if any(v.forward for v in every) and not all(v.forward for v in every):
        by_order = [[majority([v for v in votes if v.forward is forward]) for votes in duels] for forward in (True, False)]
        contributions["forward"], contributions["reversed"] = (float(all(w == "a" for w in winners)) for winners in by_order)
        contributions["consistent"] = contributions["forward"] * contributions["reversed"]
        # Different answers in the two orders are the same place.
        both = [(x, y) for x, y in zip(*by_order, strict=True) if x is not None and y is not None]
        if both:
            contributions["letter_agreement"] = sum(x != y for x, y in both) / len(both)
    return contributions


def misjudged(records: Sequence[Record]) -> list[str]:
    """Ids of the pairs that were judged wrong with their own video."""
    return [r["id"] for r in records if r.get("condition") == "right" and measures(r)["accuracy"] < 1]


def results(records: Iterable[Record], ties: float = 0.0, seed: int = 0) -> list[Record]:
    """A `result` record for each condition: of all pairs (`all`: micro), of each category, and of their mean (`macro`)."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["condition"], []).append(record)
    summaries = []
    for condition, group in grouped.items():
        categories = sorted({r["category"] for r in group if r["category"]})
        subsets = {"all": group} | {c: [r for r in group if r["category"] == c] for c in categories}
        made = [_result(name, condition, chosen, ties, seed) for name, chosen in subsets.items()]
        summaries += made
        if len(categories) > 1:
            parts = made[1:]
            names = [n for n, v in parts[0].items() if isinstance(v, float) and "_ci_" not in n and not n.startswith("ci_")]
            mean = {n: sum(p[n] for p in parts) / len(parts) for n in names if all(n in p for p in parts)}
            own = [r for r in group if r["category"]]
            low, high = macro_interval([(measures(r, ties)["accuracy"], r["cluster"], r["category"]) for r in own], seed)
            summaries.append(
                {"record": "result", "subset": "macro", "condition": condition, "n": len(own), **mean, "ci_low": low, "ci_high": high}
            )
    return summaries


def macro_interval(values: Sequence[tuple[float, str, str]], seed: int) -> tuple[float, float]:
    """95% bootstrap over clusters of the mean of categories' means, of (value, cluster, category)."""
    clusters = {c: n for n, c in enumerate(dict.fromkeys(c for _, c, _ in values))}
    categories = {c: n for n, c in enumerate(dict.fromkeys(c for _, _, c in values))}
    sums, counts = np.zeros((2, len(clusters), len(categories)))
    for value, cluster, category in values:
        sums[clusters[cluster], categories[category]] += value
        counts[clusters[cluster], categories[category]] += 1
    draws = np.random.default_rng(seed).integers(0, len(clusters), size=(RESAMPLES, len(clusters)))
    times = np.stack([np.bincount(draw, minlength=len(clusters)) for draw in draws])
    with np.errstate(invalid="ignore"):
        means = np.nanmean((times @ sums) / (times @ counts), axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _result(subset: str, condition: str, records: Sequence[Record], ties: float, seed: int) -> Record:
    each = [measures(record, ties) for record in records]
    clusters = [record["cluster"] for record in records]
    result: Record = {"record": "result", "subset": subset, "condition": condition, "n": len(records), "clusters": len(set(clusters))}
    for name in dict.fromkeys(n for m in each for n in m):
        pairs = [(m[name], c) for m, c in zip(each, clusters, strict=True) if name in m]
        interval: Interval = clustered_mean([v for v, _ in pairs], [c for _, c in pairs])
        result[name] = interval.mean
        if name in ("accuracy", "consistent"):
            before = "ci" if name == "accuracy" else f"{name}_ci"
            result[f"{before}_low"], result[f"{before}_high"] = interval.low, interval.high
    return result


def warnings(summaries: Sequence[Record]) -> list[str]:
    """What a reader of the `results` should know first, a line each."""
    notes = []
    for r in (r for r in summaries if r["subset"] == "all"):
        share = r.get("first_share")
        if share is not None and abs(share - 0.5) > 0.25:
            place = "first" if share > 0.5 else "second"
            notes.append(f"{r['condition']}: {max(share, 1 - share):.0%} of the votes pick the {place} place")
        if r.get("letter_agreement", 0) > 0.5:
            notes.append(f"{r['condition']}: the same place wins in both orders for {r['letter_agreement']:.0%} of the pairs")
        if r.get("invalid_rate", 0) > 0.05:
            notes.append(f"{r['condition']}: {r['invalid_rate']:.0%} of the outputs cannot be read ({r['error_rate']:.0%} raised an error)")
        if r["error_rate"] > 0 and "invalid_rate" not in r:
            notes.append(f"{r['condition']}: {r['error_rate']:.0%} of the pairs could not be judged, and count as wrong; see the journal")
        if r["tie_rate"] > 0.2:
            notes.append(f"{r['condition']}: {r['tie_rate']:.0%} of the pairs end in a tie")
    right = {r["condition"]: r for r in summaries if r["subset"] == "all"}
    for other in ("wrong", "none"):
        if "right" in right and other in right and right[other]["ci_high"] >= right["right"]["accuracy"] > 0.55:
            notes.append(f"as good with the condition {other} as with the right video: the judge may not look at it")
    return notes


def against(one: Iterable[Record], other: Iterable[Record], ties: float = 0.0) -> list[Record]:
    """A `difference` record for each condition that two models were both measured under: of accuracy, with a sign test over clusters.

    That is McNemar's where each cluster is one pair.
    """
    differences = []
    split: list[dict[str, dict[str, Record]]] = [{}, {}]
    for side, records in zip(split, (one, other), strict=True):
        for record in records:
            side.setdefault(record["condition"], {})[record["id"]] = record
    for condition in split[0]:
        common = sorted(set(split[0][condition]) & set(split[1].get(condition, {})))
        if not common:
            continue
        a, b = ({i: measures(side[condition][i], ties)["accuracy"] for i in common} for side in split)
        clusters = [split[0][condition][i]["cluster"] for i in common]
        difference = clustered_mean([a[i] - b[i] for i in common], clusters, differences=True)
        ours, theirs = ({c: [v[i] for i, own in zip(common, clusters, strict=True) if own == c] for c in clusters} for v in (a, b))
        differences.append(
            {
                "record": "difference", "condition": condition, "n": len(common), "difference": difference.mean, "ci_low": difference.low,
                "ci_high": difference.high, "p": sign_test(ours, theirs),
            }
        )  # fmt: skip
    return differences


def protocol_record(protocol: BenchmarkProtocol) -> Record:
    """The `protocol` record."""
    return {"record": "protocol", **asdict(protocol), "line": protocol.line()}
