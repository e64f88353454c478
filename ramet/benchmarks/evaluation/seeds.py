"""Results of several seeds together: the interval of one run is over its tasks, and says nothing about another training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ramet.benchmarks.evaluation.statistics import mean_interval
from ramet.display.plots import LABELS, SPLITS
from ramet.display.tables import table

Records = Sequence[Mapping[str, Any]]


def over_seeds(runs: Sequence[Records]) -> list[dict[str, Any]]:
    """Mean accuracies and differences of one comparison run from several seeds, with t intervals over seeds.

    A `seeds` record for each method, split and budget that all runs have, with `difference`, the trained controller's accuracy less the
    method's. Two seeds leave an interval of thirteen standard errors: they say whether a result came twice, and little more.
    """
    tables = [{(r["policy"], r["split"], r["budget"]): r["accuracy"] for r in run if r["record"] == "point"} for run in runs]
    records = []
    for method, split, budget in (key for key in tables[0] if all(key in t for t in tables)):
        accuracies = [t[method, split, budget] for t in tables]
        ours = [t["trained", split, budget] for t in tables]
        accuracy = mean_interval(accuracies, 1.0)
        difference = mean_interval([a - b for a, b in zip(ours, accuracies, strict=True)], 1.0)
        records.append(
            {
                "record": "seeds", "policy": method, "split": split, "budget": budget, "seeds": len(runs), "accuracy": accuracy.mean,
                "ci_low": max(0.0, accuracy.low), "ci_high": accuracy.high, "accuracy_min": min(accuracies),
                "accuracy_max": max(accuracies), "difference": difference.mean, "difference_low": difference.low,
                "difference_high": difference.high,
            }
        )  # fmt: skip
    return records


def seeds_markdown(records: Records) -> str:
    """A table for each split: policies down, budgets across; the mean over seeds, with the least and the greatest."""
    lines = []
    for split in dict.fromkeys(r["split"] for r in records):
        chosen = {(r["policy"], r["budget"]): r for r in records if r["split"] == split}
        budgets = sorted({budget for _, budget in chosen})

        def cell(r: Mapping[str, Any]) -> str:
            return f"{r['accuracy']:.2f} ({r['accuracy_min']:.2f}-{r['accuracy_max']:.2f})"

        rows = [
            [label, *(cell(chosen[method, budget]) for budget in budgets)]
            for method, label in LABELS.items()
            if (method, budgets[0]) in chosen
        ]
        lines += [*table([f"{SPLITS[split]}, token budget", *map(str, budgets)], rows), ""]
    return "\n".join(lines)
