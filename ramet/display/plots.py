"""Plots of results: the frontier, what the controller does by length, and learning curves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from ramet.display.sizes import ample_sizes, spawn_rates
from ramet.errors import missing_extra

logger = logging.getLogger(__name__)

LABELS = {
    "trained": "trained controller",
    "trained_always": "trained, always delegates",
    "trained_never": "trained, never delegates",
    "base": "base model",
    "base_serial": "base, no spawning",
    "solo": "trained, no spawning (solo)",
    "best_of_n": "best of n (base)",
    "best_of_n_solo": "best of n (solo)",
    "best_of_n_trained": "best of n (trained)",
    "map_reduce": "fixed map-reduce (base)",
    "map_reduce_trained": "fixed map-reduce (trained)",
}
COLOURS = {
    "trained": "#c0392b",
    "trained_always": "#e67e73",
    "trained_never": "#f0b7b1",
    "base": "#7f8c8d",
    "base_serial": "#2c7fb8",
    "solo": "#2c7fb8",
    "best_of_n": "#e08e0b",
    "best_of_n_solo": "#e08e0b",
    "best_of_n_trained": "#e08e0b",
    "map_reduce": "#3a8f5c",
    "map_reduce_trained": "#3a8f5c",
}
DASHES = {"best_of_n": "--", "map_reduce": "--", "best_of_n_solo": ":"}
"""Line styles of methods that share a colour with another: those whose weights are not the trained ones."""
SPLITS = {"iid": "lengths as trained", "ood": "at least twice as long"}


P = ParamSpec("P")


def picture(draw: Callable[Concatenate[Any, Path, P], None]) -> Callable[Concatenate[Any, Path, P], None]:
    """A decorator for functions that draw a picture of a run folder: without matplotlib, they print a note instead."""

    @wraps(draw)
    def draw_or_note(data: Any, path: Path, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(data, path, *args, **kwargs)
        except ModuleNotFoundError as error:
            if not (missing := missing_extra(error)):
                raise
            logger.warning(f"{path.name} is not drawn: {missing}, and run the same command again")

    return draw_or_note


def subplots(rows: int, columns: int) -> Any:
    """A matplotlib figure and its grid of axes, [row][column], in the common style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    return plt.subplots(rows, columns, figsize=(5.4 * columns, 3.9 * rows), squeeze=False, layout="constrained")


def _style(policy: str) -> dict[str, Any]:
    return {"color": COLOURS[policy], "lw": 2.4 if policy == "trained" else 1.5, "ls": DASHES.get(policy, "-")}


@picture
def frontier(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the budget and against the critical path, one row per split, with 95% bands."""
    points = [r for r in records if r["record"] == "point"]
    splits = [s for s in SPLITS if any(p["split"] == s for p in points)]
    figure, axes = subplots(len(splits), 2)
    for row, split in enumerate(splits):
        for policy in LABELS:
            chosen = sorted((p for p in points if p["split"] == split and p["policy"] == policy), key=lambda p: p["budget"])
            if not chosen:
                continue
            style = _style(policy)
            for column, x in enumerate(("budget", "critical_path")):
                along = chosen if x == "budget" else sorted(chosen, key=lambda p: p[x])
                xs, ys = [p[x] for p in along], [p["accuracy"] for p in along]
                axes[row][column].plot(xs, ys, marker="o", ms=3.5, label=LABELS[policy], **style)
                low, high = [p["ci_low"] for p in along], [p["ci_high"] for p in along]
                if x == "budget":
                    axes[row][column].fill_between(xs, low, high, color=COLOURS[policy], alpha=0.12, lw=0)
        axes[row][0].set(
            xlabel="budget: generated tokens of the whole tree", ylabel="accuracy", title=f"{SPLITS[split]}", ylim=(-0.02, 1.02)
        )
        axes[row][1].set(xlabel="mean critical path (tokens one after another)", title=f"{SPLITS[split]}", ylim=(-0.02, 1.02))
    axes[0][0].legend(frameon=False, fontsize=7)
    save(figure, path)


@picture
def costs(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of each method against each cost, one row per metric and split, with 95% error bars."""
    points = [r for r in records if r["record"] == "point"]
    rows = list(dict.fromkeys((p["metric"], p["split"]) for p in points))
    columns = [c for c in ("generated", "prefilled", "critical_path", "money") if any(p[c] for p in points)]
    names = list(dict.fromkeys(p["method"] for p in points))
    figure, axes = subplots(len(rows), len(columns))
    for row, (metric, split) in enumerate(rows):
        for column, cost in enumerate(columns):
            plot = axes[row][column]
            for colour, name in enumerate(names):
                line = sorted((p for p in points if (p["metric"], p["split"], p["method"]) == (metric, split, name)), key=lambda p: p[cost])
                ys = [p["accuracy"] for p in line]
                bars = [
                    [max(y - p["ci_low"], 0) for y, p in zip(ys, line, strict=True)],
                    [max(p["ci_high"] - y, 0) for y, p in zip(ys, line, strict=True)],
                ]
                plot.errorbar(
                    [p[cost] for p in line],
                    ys,
                    bars,
                    marker="o",
                    ms=3.5,
                    lw=1.5,
                    elinewidth=0.7,
                    color=f"C{colour}",
                    label=name.replace("_", " "),
                )
            plot.set(xscale="log", xlabel=f"mean cost of a task: {cost.replace('_', ' ')}", title=f"{metric}, {split}")
            plot.set_ylim(bottom=0)
        axes[row][0].set_ylabel(metric)
    axes[0][0].legend(frameon=False, fontsize=8)
    save(figure, path)


@picture
def behaviour(records: Sequence[dict[str, Any]], path: Path) -> None:
    """How often the trained controller spawns by length and budget, and accuracy by length at the largest budget of each split."""
    ample = sorted(ample_sizes(records), key=lambda r: r["size_low"])
    rates = spawn_rates(records)
    budgets = list(next(iter(rates.values()), {}))
    grid = [[by_budget[budget] for by_budget in rates.values()] for budget in budgets]
    figure, axes = subplots(1, 2)
    map_, lines = axes[0]
    map_.imshow(grid, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", origin="lower")
    for y, row in enumerate(grid):
        for x, rate in enumerate(row):
            map_.text(x, y, f"{rate:.0%}", ha="center", va="center", fontsize=9, color="white" if rate > 0.6 else "black")
    map_.set_xticks(range(len(rates)), [f"{low}-{high}" for low, high in rates])
    map_.set_yticks(range(len(budgets)), budgets)
    map_.grid(visible=False)
    map_.set(xlabel="operands", ylabel="token budget", title="how often the trained controller spawns")
    for policy in LABELS:
        chosen = [r for r in ample if r["policy"] == policy]
        if not chosen:
            continue
        sizes = [(r["size_low"] + r["size_high"]) / 2 for r in chosen]
        lines.plot(sizes, [r["accuracy"] for r in chosen], marker="o", ms=3.5, label=LABELS[policy], **_style(policy))
    lines.set(xlabel="operands", ylabel="accuracy", title="accuracy by length, largest budget", ylim=(-0.02, 1.02))
    lines.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    save(figure, path)


@picture
def learning(curves: dict[str, Sequence[dict[str, Any]]], path: Path, score: str = "accuracy") -> None:
    """Score, spawn rate and tokens over the updates of each run; `score` is what the score of a tree is called."""
    figure, axes = subplots(1, 3)
    for name, metrics in curves.items():
        xs = [m["update"] for m in metrics]
        for column, field in enumerate(("accuracy", "spawn_rate", "generated")):
            ys = [m[field] for m in metrics]
            axes[0][column].plot(xs, ys, color=COLOURS.get(name), alpha=0.25, lw=1)
            axes[0][column].plot(xs, _smooth(ys), color=COLOURS.get(name), lw=2, label=LABELS.get(name, name))
    for column, label in enumerate((f"{score} of sampled trees", "spawn rate", "generated tokens per tree")):
        axes[0][column].set(xlabel="update", title=label)
    axes[0][0].legend(frameon=False, fontsize=8.5)
    save(figure, path)


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """The centred moving average over `window` values, fewer at the ends."""
    half = window // 2
    return [sum(values[max(i - half, 0) : i + half + 1]) / len(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def save(figure: Any, path: Path) -> None:
    """Write a figure as a file, creating its folder, and close it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
