"""What a sweep shows: paired differences at every budget, and cost at equal accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ramet.benchmarks.evaluation.baselines import Outcome
from ramet.benchmarks.evaluation.harness import Measured
from ramet.benchmarks.evaluation.statistics import holm, paired_difference, sign_test


def _scores(measured: Sequence[Measured]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for m in measured:
        scores.setdefault(m.task, []).append(m.score)
    return scores


MILLION = 1e6
RESAMPLES = 2000
Groups = Mapping[tuple[str, str, int], Sequence[Measured]]
"""Outcomes by (method, split, budget)."""


def money(outcome: Outcome, prices: Mapping[str, float]) -> float:
    """The price of an outcome; `prices` are per million tokens of `generated`, `prefilled` and `cached`."""
    return sum(price * float(getattr(outcome, name)) for name, price in prices.items()) / MILLION


def matched(groups: Groups, winner: str) -> list[dict[str, Any]]:
    """The score of `winner` less that of each baseline, where it spends no more than the baseline did, which may have stopped early.

    For every point of a baseline, the winner is taken at its largest budget whose mean cost, in generated tokens, is at most what the
    baseline spent there. A baseline that is cheaper than the winner at any budget gets `difference` null: there is nothing to compare
    it with.
    """
    cost = "generated"

    def mean(measured: Sequence[Measured]) -> float:
        return sum(float(getattr(m.outcome, cost)) for m in measured) / len(measured)

    records = []
    for (method, split, budget), measured in groups.items():
        if method == winner:
            continue
        spent = mean(measured)
        own = {b: ms for (p, s, b), ms in groups.items() if (p, s) == (winner, split) and mean(ms) <= spent}
        record: dict[str, Any] = {
            "record": "matched", "policy": winner, "baseline": method, "split": split, "budget": budget, "cost": cost,
            "baseline_cost": spent, "winner_budget": None, "winner_cost": None, "n": len({m.task for m in measured}),
            "difference": None, "ci_low": None, "ci_high": None, "p_value": None, "p_holm": None,
        }  # fmt: skip
        if own:
            chosen = own[max(own)]
            ours, theirs = _scores(chosen), _scores(measured)
            interval = paired_difference(ours, theirs)
            record |= {
                "winner_budget": max(own), "winner_cost": mean(chosen), "difference": interval.mean, "ci_low": interval.low,
                "ci_high": interval.high, "p_value": sign_test(ours, theirs),
            }  # fmt: skip
        records.append(record)
    return corrected(records)


def areas(groups: Groups, cost: str) -> list[dict[str, Any]]:
    """Area under each method's frontier: the best accuracy for at most a cost, averaged over costs up to the largest of all.

    Intervals are a bootstrap over tasks, the same draws for all policies.
    """
    records = []
    for split in dict.fromkeys(s for _, s, _ in groups):
        chosen = {key: ms for key, ms in groups.items() if key[1] == split}
        tasks = sorted({m.task for ms in chosen.values() for m in ms})
        place = {task: i for i, task in enumerate(tasks)}
        table: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for (method, _, _), ms in chosen.items():
            sums = np.zeros((3, len(tasks)))
            for m in ms:
                sums[:, place[m.task]] += (m.score, float(getattr(m.outcome, cost)), 1.0)
            if not (sums[2] > 0).all():
                raise ValueError("areas need every method measured on the same tasks")
            table.setdefault(method, []).append((sums[0] / sums[2], sums[1] / sums[2]))
        largest = max(float(c.mean()) for points in table.values() for _, c in points)
        draws = np.random.default_rng(0).integers(0, len(tasks), size=(RESAMPLES, len(tasks)))
        for method, points in table.items():
            area = _area(np.array([[s.mean() for s, _ in points]]), np.array([[c.mean() for _, c in points]]), largest)[0]
            sampled = _area(np.stack([s[draws].mean(1) for s, _ in points], 1), np.stack([c[draws].mean(1) for _, c in points], 1), largest)
            low, high = np.quantile(sampled, [0.025, 0.975])
            records.append(
                {
                    "record": "area", "policy": method, "split": split, "cost": cost, "most": largest, "n": len(tasks),
                    "area": float(area), "ci_low": float(low), "ci_high": float(high),
                }
            )  # fmt: skip
    return records


def _area(scores: np.ndarray, costs: np.ndarray, largest: float) -> np.ndarray:
    """Of each row of (score, cost) points, the mean over costs from 0 to `most` of the best score that costs no more."""
    order = np.argsort(costs, axis=1, kind="stable")
    best = np.maximum.accumulate(np.take_along_axis(scores, order, 1), axis=1)
    at = np.minimum(np.take_along_axis(costs, order, 1), largest)
    until = np.concatenate([at[:, 1:], np.full((len(at), 1), largest)], 1)
    result: np.ndarray = (best * (until - at)).sum(1) / largest if largest else best[:, -1]
    return result


def comparisons(groups: Groups, winner: str = "trained") -> list[dict[str, Any]]:
    """The score of `winner` less that of each other method, on the same tasks at the same budget, with 95% intervals."""
    records = []
    for (method, split, budget), measured in groups.items():
        if method != winner and (winner, split, budget) in groups:
            ours, theirs = _scores(groups[winner, split, budget]), _scores(measured)
            interval = paired_difference(ours, theirs)
            records.append(
                {
                    "record": "comparison",
                    "policy": winner,
                    "baseline": method,
                    "split": split,
                    "budget": budget,
                    "n": interval.n,
                    "difference": interval.mean,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "p_value": sign_test(ours, theirs),
                }
            )
    return corrected(records)


def corrected(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons with `p_holm`: their p-values corrected for the budgets at which a baseline is compared on a split."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        if r["p_value"] is not None:
            families.setdefault((r["baseline"], r["split"]), []).append(r)
    for family in families.values():
        for r, p in zip(family, holm([r["p_value"] for r in family]), strict=True):
            r["p_holm"] = p
    return records


def clear(record: Mapping[str, Any]) -> int:
    """1 where a comparison is clearly in favour of its method, -1 clearly against, else 0.

    Clear: the interval excludes zero, and so does the exact sign test with p < 0.05 after correction for the number of budgets.
    """
    if record["difference"] is None or record["p_holm"] >= 0.05:
        return 0
    return int(record["ci_low"] > 0) - int(record["ci_high"] < 0)


def claims(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per baseline and split: at how many budgets the difference is not negative, and clear of zero."""
    records = []
    for baseline, split in dict.fromkeys((c["baseline"], c["split"]) for c in compared):
        chosen = [c for c in compared if c["baseline"] == baseline and c["split"] == split]
        records.append(
            {
                "record": "claim",
                "baseline": baseline,
                "split": split,
                "budgets": len(chosen),
                "not_worse": sum(c["difference"] >= 0 for c in chosen),
                "clearly_worse": sum(clear(c) < 0 for c in chosen),
                "clearly_better": sum(clear(c) > 0 for c in chosen),
            }
        )
    return records


def cost_at(points: Sequence[Mapping[str, Any]], accuracy: float, cost: str) -> float | None:
    """The mean `cost` at which a sweep first reaches `accuracy`, linear between its points; None if it never does."""
    along = sorted(points, key=lambda p: p[cost])
    if not along:
        return None
    if along[0]["accuracy"] >= accuracy:
        return float(along[0][cost])
    for before, after in itertools.pairwise(along):
        if after["accuracy"] >= accuracy > before["accuracy"]:
            share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return float(before[cost] + share * (after[cost] - before[cost]))
    return None


def equal_accuracy(points: Sequence[Mapping[str, Any]], winner: str = "trained") -> list[dict[str, Any]]:
    """What equal accuracy costs: the baseline where it reaches its best accuracy, and the winner where it reaches the same.

    The baseline is taken at its cheapest point whose interval reaches its best accuracy, so that it is
    not charged for a last gain that is noise.
    """
    records = []
    for method, split in dict.fromkeys((p["policy"], p["split"]) for p in points):
        if method == winner:
            continue
        theirs = [p for p in points if (p["policy"], p["split"]) == (method, split)]
        ours = [p for p in points if (p["policy"], p["split"]) == (winner, split)]
        best = max(p["accuracy"] for p in theirs)
        if best == 0:
            continue  # nothing to be equal to
        for cost in ("critical_path", "generated"):
            point = min((p for p in theirs if p["ci_high"] >= best), key=lambda p: p[cost])
            at, our = point[cost], cost_at(ours, point["accuracy"], cost)
            records.append(
                {
                    "record": "equal_accuracy",
                    "baseline": method,
                    "split": split,
                    "accuracy": point["accuracy"],
                    "cost": cost,
                    "baseline_cost": at,
                    "winner_cost": our,
                    "ratio": None if our is None or at == 0 else our / at,
                }
            )
    return records
