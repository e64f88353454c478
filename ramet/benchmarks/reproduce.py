"""`ramet reproduce nano`: the comparison that the README shows.

Two policies are trained from the shipped base by the same reinforcement learning, with the same number of
updates and rollouts: one is offered the spawn tool, the other ("solo") is not. Then five policies answer
the same held-out tasks under the same budgets. The fixed map-reduce gets the split that does best on
training tasks. Everything resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from ramet.agents.actor import seed_of
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.sampling import Sampling
from ramet.benchmarks import baselines, frontier, plots
from ramet.benchmarks.harness import Entry, Measured, grouped, measure
from ramet.benchmarks.jobs import claim_folder, print_points, result_records, run_measuring, run_training, tree_entry
from ramet.benchmarks.report import write_report
from ramet.benchmarks.session import meta, model_path, open_model, read_metrics
from ramet.benchmarks.show import write_json
from ramet.config import RunConfig
from ramet.policy.hf import HFPolicy

console = Console()

NANO: dict[str, Any] = {"train": {"updates": 200, "temperature": 0.5}}
ROWS_PER_CLONE = (1, 2, 3)


def choose_split(config: RunConfig, journal: Journal) -> int:
    """Rows per clone with which map-reduce does best on training tasks of both ranges of length, at the largest budgets."""
    model, _, chat = open_model(config)
    env = config.env.build()

    async def main() -> list[tuple[float, int]]:
        found = []
        async with HFPolicy(model, max_batch=config.train.max_batch) as policy:
            for rows in ROWS_PER_CLONE:
                entry = Entry(f"map_reduce_{rows}", baselines.map_reduce(rows), Sampling(temperature=config.eval.temperature), 0)
                total = 0.0
                for split, budgets in (("iid", config.eval.budgets), ("ood", config.eval.ood_budgets)):
                    tasks = [replace(t, id=f"choose-{t.id}") for t in env.tasks(split, 100, seed_of(config.eval.seed, "choose", 0))]
                    measured = await measure(
                        policy, chat, entry, env, tasks, split, [max(budgets)], config.budget, journal, config.eval.seed
                    )
                    total += sum(m.score for m in measured)
                found.append((total, -rows))
        return found

    return -max(anyio.run(main))[1]


def reproduce_nano(config: RunConfig, directory: Path) -> None:
    """Train both, measure all, write `results.json`, pictures and `report.html` into `directory`."""
    claim_folder(directory, config)
    base = model_path(config.model)
    checkpoints = {}
    for name, spawn in (("trained", True), ("solo", False)):
        run_training(config, directory / name, spawn, name)
        checkpoints[name] = directory / name / "checkpoints" / f"step-{config.train.updates:06d}"
    with Journal(directory / "journal.jsonl", fingerprint(config.model_dump(mode="json"))) as journal:
        rows = choose_split(config, journal)
        console.print(f"map-reduce gives {rows} rows to a clone (best of {ROWS_PER_CLONE} on training tasks)")
        greedy = Sampling(temperature=config.eval.temperature)
        measured: list[Measured] = []
        for path, entries in (
            (checkpoints["trained"], [tree_entry("trained", config, True)]),
            (checkpoints["solo"], [tree_entry("solo", config, False)]),
            (
                base,
                [
                    tree_entry("base", config, True),
                    Entry("best_of_n", baselines.best_of_n, Sampling(temperature=1.0), 0),
                    Entry("map_reduce", baselines.map_reduce(rows), greedy, 0),
                ],
            ),
        ):
            measured += run_measuring(config, path, entries, ("iid", "ood"), journal, "measuring")
    records = [meta("reproduce nano", config.seed), *summary(measured), {"record": "choice", "map_reduce_rows_per_clone": rows}]
    write_json(directory / "results.json", records)
    curves = {name: read_metrics(directory / name) for name in ("trained", "solo")}
    pictures(records, curves, directory)
    write_report(
        directory / "report.html",
        "ramet reproduce nano",
        "A small model learns when to answer alone and when to hand rows of a sum to clones of itself.",
        records,
        [directory / name for name in ("frontier.png", "behaviour.png", "learning.png")],
    )
    print_points(records)
    print_claims(records)
    console.print(f"written to {directory}: results.json, report.html, frontier.png, behaviour.png, learning.png")


def summary(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """All records of a comparison: points, sizes, paired differences, claims, cost at equal accuracy."""
    records = result_records(measured)
    compared = frontier.comparisons(grouped(measured))
    points = [r for r in records if r["record"] == "point"]
    return [*records, *compared, *frontier.claims(compared), *frontier.equal_accuracy(points)]


def pictures(records: Sequence[dict[str, Any]], curves: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    plots.frontier(records, directory / "frontier.png")
    plots.behaviour(records, directory / "behaviour.png")
    if any(curves.values()):
        plots.learning({name: metrics for name, metrics in curves.items() if metrics}, directory / "learning.png")


def print_claims(records: Sequence[dict[str, Any]]) -> None:
    """How often the trained controller is ahead, and what equal accuracy costs it."""
    shown = Table(
        "baseline",
        "split",
        "not worse",
        "clearly better",
        "clearly worse",
        "path at equal accuracy",
        title="trained controller against",
    )
    paths = {(r["baseline"], r["split"]): r for r in records if r["record"] == "equal_accuracy" and r["cost"] == "critical_path"}
    for r in records:
        if r["record"] == "claim":
            path = paths.get((r["baseline"], r["split"]))
            if path is None:
                ratio = "never right"
            elif path["ratio"] is None:
                ratio = "not reached"
            else:
                ratio = f"{path['ratio']:.2f}x at {path['accuracy']:.2f}"
            shown.add_row(
                r["baseline"], r["split"], f"{r['not_worse']}/{r['budgets']}", f"{r['clearly_better']}/{r['budgets']}",
                f"{r['clearly_worse']}/{r['budgets']}", ratio,
            )  # fmt: skip
    console.print(shown)
