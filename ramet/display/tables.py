"""The tables of a comparison in Markdown, as the README and the documentation show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ramet.display.plots import LABELS, SPLITS
from ramet.display.sizes import ample_sizes, spawn_rates


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """All tables: accuracy by budget, claims, cost at equal accuracy, behaviour by length and budget, and the baselines' settings."""
    tables = (
        accuracy(records, "iid"), accuracy(records, "ood"), claims(records), costs(records), spawning(records), lengths(records),
        choices(records),
    )  # fmt: skip
    return "\n".join("\n".join(lines) + "\n" for lines in tables)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (headers, ["---"] * len(headers), *rows)]


def accuracy(records: Sequence[dict[str, Any]], split: str) -> list[str]:
    """One row per policy, one column per budget; each accuracy with half the width of its 95% interval."""
    points = {(r["policy"], r["budget"]): r for r in records if r["record"] == "point" and r["split"] == split}
    budgets = sorted({budget for _, budget in points})
    rows = []
    for policy, label in LABELS.items():
        own = [points[policy, budget] for budget in budgets if (policy, budget) in points]
        if own:
            rows.append([label, *(f"{p['accuracy']:.2f} ±{(p['ci_high'] - p['ci_low']) / 2:.2f}" for p in own)])
    return table([f"{SPLITS[split]}, token budget", *map(str, budgets)], rows)


def claims(records: Sequence[dict[str, Any]]) -> list[str]:
    """At how many budgets the trained controller is not worse, clearly better and clearly worse than each baseline."""
    rows = [
        [
            LABELS[r["baseline"]],
            SPLITS[r["split"]],
            *(f"{r[name]} of {r['budgets']}" for name in ("not_worse", "clearly_better", "clearly_worse")),
        ]
        for r in records
        if r["record"] == "claim"
    ]
    return table(["trained controller against", "on", "at least as accurate", "clearly better", "clearly worse"], rows)


def choices(records: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that were chosen for the baselines on tasks kept for tuning."""
    chosen = [r for r in records if r["record"] == "choice"]
    rows = []
    for weights, split in dict.fromkeys((r["weights"], r["split"]) for r in chosen):
        own = [r for r in chosen if (r["weights"], r["split"]) == (weights, split)]
        cuts = ", ".join(f"{r['budget']}: {r['map_reduce_rows']}, {r['map_reduce_kept']}" for r in own if "budget" in r)
        rows.append([weights, SPLITS[split], f"{own[0]['best_of_n_temperature']:g}", cuts])
    return table(["weights", "on", "best of n, temperature", "map-reduce, by budget: rows a clone, tokens kept a result"], rows)


def costs(records: Sequence[dict[str, Any]]) -> list[str]:
    """Critical path and generated tokens of the controller where it is as accurate as a baseline at its best."""
    by_cost: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in records:
        if r["record"] == "equal_accuracy":
            by_cost.setdefault((r["baseline"], r["split"]), {})[r["cost"]] = r

    def ratio(r: dict[str, Any]) -> str:
        if r["ratio"] is None:
            return "not reached"
        return f"{r['ratio']:.2f} ({r['winner_cost']:.0f} for {r['baseline_cost']:.0f})"

    rows = [
        [LABELS[policy], SPLITS[split], f"{by['critical_path']['accuracy']:.2f}", ratio(by["critical_path"]), ratio(by["generated"])]
        for (policy, split), by in by_cost.items()
    ]
    return table(["at the accuracy of", "on", "which is", "critical path, ratio", "generated tokens, ratio"], rows)


def lengths(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the controller and the base model do by length, at the largest budget of each split."""
    rows = [
        [
            LABELS[r["policy"]],
            f"{r['size_low']}-{r['size_high']}",
            f"{r['spawn_rate']:.0%}",
            f"{r['accuracy']:.2f}",
            f"{r['generated']:.0f}",
            f"{r['critical_path']:.0f}",
        ]
        for r in ample_sizes(records)
        if r["policy"] in ("trained", "base")
    ]
    return table(["by operands, ample budget", "operands", "spawns", "accuracy", "generated", "critical path"], rows)


def spawning(records: Sequence[dict[str, Any]]) -> list[str]:
    """The trained controller's spawn rate by length and budget, on lengths as in training."""
    rates = spawn_rates(records)
    budgets = next(iter(rates.values()), {})
    rows = [[f"{low}-{high}", *(f"{rate:.0%}" for rate in by_budget.values())] for (low, high), by_budget in rates.items()]
    return table(["operands: spawns, by token budget", *map(str, budgets)], rows)
