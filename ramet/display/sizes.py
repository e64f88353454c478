"""The records of a comparison that are broken down by task size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def ample_sizes(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records by size at the largest budget of their split."""
    sizes = sorted((r for r in records if r["record"] == "size"), key=lambda r: r["budget"])
    largest = {r["split"]: r["budget"] for r in sizes}
    return [r for r in records if r["record"] == "size" and r["budget"] == largest[r["split"]]]


def spawn_rates(records: Sequence[dict[str, Any]]) -> dict[tuple[int, int], dict[int, float]]:
    """The trained controller's spawn rate on lengths as in training, by range of sizes and by budget, both ascending."""
    chosen = [r for r in records if r["record"] == "size" and (r["policy"], r["split"]) == ("trained", "iid")]
    rates: dict[tuple[int, int], dict[int, float]] = {}
    for r in sorted(chosen, key=lambda r: (r["size_low"], r["budget"])):
        rates.setdefault((r["size_low"], r["size_high"]), {})[r["budget"]] = r["spawn_rate"]
    return rates
