"""What a sweep says: paired differences at every budget, and cost at equal accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ramet.benchmarks.harness import Measured
from ramet.benchmarks.statistics import paired_difference, sign_test


def _scores(measured: Sequence[Measured]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for m in measured:
        scores.setdefault(m.task, []).append(m.score)
    return scores


def comparisons(groups: Mapping[tuple[str, str, int], Sequence[Measured]], winner: str = "trained") -> list[dict[str, Any]]:
    """`winner` less each other policy, on the same tasks at the same budget, with 95% intervals."""
    records = []
    for (policy, split, budget), measured in groups.items():
        if policy != winner and (winner, split, budget) in groups:
            ours, theirs = _scores(groups[winner, split, budget]), _scores(measured)
            interval = paired_difference(ours, theirs)
            records.append(
                {
                    "record": "comparison",
                    "policy": winner,
                    "baseline": policy,
                    "split": split,
                    "budget": budget,
                    "n": interval.n,
                    "difference": interval.mean,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "p_value": sign_test(ours, theirs),
                }
            )
    return records


def claims(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per baseline and split: at how many budgets the difference is not negative, and clear of zero.

    Clear: the interval excludes zero and the exact sign test has p < 0.05.
    """
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
                "clearly_worse": sum(c["ci_high"] < 0 and c["p_value"] < 0.05 for c in chosen),
                "clearly_better": sum(c["ci_low"] > 0 and c["p_value"] < 0.05 for c in chosen),
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
    """What equal accuracy costs: a baseline where it does as well as at its best, and the winner for as much.

    The baseline is taken at its cheapest point whose interval reaches its best accuracy, so that it is
    not charged for a last gain that is noise.
    """
    records = []
    for policy, split in dict.fromkeys((p["policy"], p["split"]) for p in points):
        if policy == winner:
            continue
        theirs = [p for p in points if (p["policy"], p["split"]) == (policy, split)]
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
                    "baseline": policy,
                    "split": split,
                    "accuracy": point["accuracy"],
                    "cost": cost,
                    "baseline_cost": at,
                    "winner_cost": our,
                    "ratio": None if our is None or at == 0 else our / at,
                }
            )
    return records
