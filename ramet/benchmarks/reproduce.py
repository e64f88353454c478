"""`ramet reproduce nano`: the comparison that the README shows.

Two policies are trained from the shipped base by the same reinforcement learning, with the same number of
updates and rollouts: one is offered the spawn tool, the other ("solo") is not. Then five policies answer
the same held-out tasks under the same budgets. Best of n and map-reduce run with the settings that do best
on other tasks. Everything resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from ramet.agents.actor import seed_of
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.sampling import Sampling
from ramet.benchmarks import baselines, frontier, plots
from ramet.benchmarks.harness import Entry, Measured, grouped, measure
from ramet.benchmarks.jobs import claim_folder, print_points, result_records, run_measuring, run_training, tree_entry
from ramet.benchmarks.report import write_report
from ramet.benchmarks.session import meta, open_model, read_metrics, weights_id
from ramet.benchmarks.tables import markdown
from ramet.config import RunConfig
from ramet.policy.catalogue import find
from ramet.policy.checkpoint import checkpoint_path
from ramet.policy.hf import HFPolicy
from ramet.storage import write_json, write_text
from ramet.terminal import Table, console

NANO: dict[str, Any] = {"train": {"updates": 150}}
ROWS_PER_CLONE = (1, 2, 3)


TEMPERATURES = (0.3, 0.5, 0.7, 1.0)


def choose(config: RunConfig, journal: Journal) -> tuple[dict[str, dict[int, int]], float]:
    """Give the baselines their best settings, found on other tasks than those that are measured.

    Map-reduce gets, per split and budget, the rows per clone with which it does best; best of n the
    sampling temperature that does best over all budgets.
    """
    model, _, chat = open_model(config)
    env = config.env.build()
    seed = seed_of(config.seed, "choose", config.eval.seed)

    async def scores(policy: HFPolicy, entry: Entry, split: str, budgets: Sequence[int], tasks: int) -> dict[int, float]:
        drawn = [replace(t, id=f"choose-{t.id}") for t in env.tasks(split, tasks, seed % 2**32)]
        measured = await measure(policy, chat, entry, env, drawn, split, budgets, config.budget, journal, seed)
        return {budget: sum(m.score for m in measured if m.budget == budget) for budget in budgets}

    async def main() -> tuple[dict[str, dict[int, int]], float]:
        rows: dict[str, dict[int, int]] = {}
        votes = dict.fromkeys(TEMPERATURES, 0.0)
        async with HFPolicy(model, max_batch=config.train.max_batch) as policy:
            for split, budgets in (("iid", config.eval.budgets), ("ood", config.eval.ood_budgets)):
                found = {}
                for size in ROWS_PER_CLONE:
                    entry = Entry(f"map_reduce_{size}", baselines.map_reduce(size), Sampling(temperature=config.eval.temperature), 0)
                    found[size] = await scores(policy, entry, split, budgets, config.eval.tasks // 3 or 1)
                rows[split] = {budget: max(ROWS_PER_CLONE, key=lambda size: found[size][budget]) for budget in budgets}
                for temperature in TEMPERATURES:
                    entry = Entry(f"best_of_n_{temperature}", baselines.best_of_n, Sampling(temperature=temperature), 0)
                    votes[temperature] += sum((await scores(policy, entry, split, budgets, config.eval.tasks // 6 or 1)).values())
        return rows, max(TEMPERATURES, key=votes.__getitem__)

    return anyio.run(main)


def reproduce_nano(config: RunConfig, directory: Path) -> None:
    """Train both, measure all, write `results.json`, `results.md`, pictures and `report.html` into `directory`."""
    claim_folder(directory, config)
    base = find(config.model)
    checkpoints = {}
    for name, spawn in (("trained", True), ("solo", False)):
        run_training(config, directory / name, spawn, name)
        checkpoints[name] = checkpoint_path(directory / name / "checkpoints", config.train.updates)
    identity = [weights_id(path) for path in (base, *checkpoints.values())]
    with Journal(directory / "journal.jsonl", fingerprint(config.model_dump(mode="json"), identity)) as journal:
        console.print("choosing the baselines' settings on tasks of their own")
        rows, temperature = choose(config, journal)
        console.print(f"map-reduce, rows per clone by budget: {rows}; best of n, temperature: {temperature}")
        greedy = Sampling(temperature=config.eval.temperature)
        measured: list[Measured] = []
        for name, spawn in (("trained", True), ("solo", False)):
            measured += run_measuring(config, checkpoints[name], [tree_entry(name, config, spawn)], ("iid", "ood"), journal, "measuring")
        for split in ("iid", "ood"):
            entries = [
                tree_entry("base", config, True),
                Entry("best_of_n", baselines.best_of_n, Sampling(temperature=temperature), 0),
                Entry("map_reduce", baselines.map_reduce(rows[split]), greedy, 0),
            ]
            measured += run_measuring(config, base, entries, (split,), journal, "measuring")
    choices = [
        {"record": "choice", "split": split, "budget": budget, "map_reduce_rows_per_clone": size, "best_of_n_temperature": temperature}
        for split, by_budget in rows.items()
        for budget, size in by_budget.items()
    ]
    records = [meta("reproduce nano", config.seed), *summary(measured), *choices]
    write_json(directory / "results.json", records)
    write_text(directory / "results.md", markdown(records))
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
    console.print(f"written to {directory}: results.json, results.md, report.html, frontier.png, behaviour.png, learning.png")


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
