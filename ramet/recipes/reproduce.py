"""`ramet reproduce nano`: the comparison that the README shows.

Two policies are trained from the shipped base by the same reinforcement learning, with the same number of
updates and rollouts: one is offered the spawn tool, the other ("solo") is not. Then every method that could explain the first one's
accuracy away answers the same held-out tasks under the same budgets: its weights without the choice (always, never delegating), voting over
samples of each of the three models, and a program that cuts the work, with the base and with the trained weights. What is to be set
of these is set to what does best on other tasks. Everything resumes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ramet.agents.journal import Journal, fingerprint
from ramet.agents.sampling import Sampling
from ramet.benchmarks.evaluation import baselines, frontier
from ramet.benchmarks.evaluation.harness import Measured, MethodEntry, grouped
from ramet.benchmarks.evaluation.seeds import over_seeds, seeds_markdown
from ramet.display import plots
from ramet.display.plots import LABELS
from ramet.display.report import write_report
from ramet.display.tables import markdown
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.models.checkpoint import checkpoint_path
from ramet.runs import tuning
from ramet.runs.build import read_metrics
from ramet.runs.commands import claim_folder, print_points, result_records, run_measuring, run_training, tree_entry
from ramet.runs.settings import RunConfig
from ramet.storage import meta, read_text, write_json, write_text
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

SPLITS = ("iid", "ood")


def entries(config: RunConfig, weights: str, choices: tuning.Choices) -> list[MethodEntry]:
    """The methods that run with the base, solo or trained weights on one split."""
    greedy = Sampling(temperature=config.eval.temperature)
    canonical = config.env.build().canonical
    after = "" if weights == "base" else f"_{weights}"
    made = [tree_entry(weights, config, weights != "solo")]
    if weights == "trained":
        made.append(MethodEntry("trained_always", baselines.always, greedy, config.budget.depth))
        made.append(tree_entry("trained_never", config, False))
    made.append(MethodEntry(f"best_of_n{after}", baselines.best_of_n(canonical), Sampling(temperature=choices.temperature), 0))
    if choices.cuts:
        made.append(MethodEntry(f"map_reduce{after}", baselines.map_reduce(choices.cuts), greedy, 0))
    return made


def reproduce_nano(config: RunConfig, directory: Path) -> None:
    """Train both, measure all, write `results.json`, `results.md`, pictures and `report.html` into `directory`."""
    claim_folder(directory, config)
    paths = {"base": find(config.model)}
    for name, spawn in (("trained", True), ("solo", False)):
        run_training(config, directory / name, spawn, name)
        paths[name] = checkpoint_path(directory / name / "checkpoints", config.train.updates)
    identity = [weights_id(path) for path in paths.values()]
    measured: list[Measured] = []
    choices = []
    with Journal(directory / "journal.jsonl", fingerprint(config.model_dump(mode="json"), identity)) as journal:
        for weights in ("trained", "solo", "base"):
            for split in SPLITS:
                chosen = tuning.tune(config, paths[weights], weights, split, weights != "solo", journal)
                choices += chosen.records(weights, split)
                measured += run_measuring(config, paths[weights], entries(config, weights, chosen), (split,), journal, "measuring")
    measured.sort(key=lambda m: (list(LABELS).index(m.method), SPLITS.index(m.split)))
    records = [meta("reproduce nano", config.seed), *summary(measured), *choices]
    write_json(directory / "results.json", records)
    write_text(directory / "results.md", markdown(records))
    curves = {name: read_metrics(directory / name) for name in ("trained", "solo")}
    draw_pictures(records, curves, directory)
    write_report(
        directory / "report.html",
        "ramet reproduce nano",
        "A small model learns when to answer alone and when to hand rows of a sum to clones of itself.",
        records,
        [directory / name for name in ("frontier.png", "behaviour.png", "learning.png")],
    )
    print_points(records)
    print_claims(records)
    logger.info(f"written to {directory}: results.json, results.md, report.html, frontier.png, behaviour.png, learning.png")


def reproduce_seeds(config: RunConfig, runs: Path, seeds: Sequence[int]) -> None:
    """The comparison from each seed in its own folder, then the results together: `seeds.json` and `seeds.md` in `runs`."""
    for seed in seeds:
        reproduce_nano(config.model_copy(update={"seed": seed}), runs / f"reproduce-nano-{seed}")
    records = over_seeds([json.loads(read_text(runs / f"reproduce-nano-{seed}" / "results.json")) for seed in seeds])
    write_json(runs / "seeds.json", [meta("reproduce nano --seeds", seeds[0]), *records])
    write_text(runs / "seeds.md", seeds_markdown(records))
    logger.info(f"written to {runs}: seeds.json, seeds.md")


def summary(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """All records of a comparison: points, sizes, paired differences, claims, cost at equal accuracy."""
    records = result_records(measured)
    compared = frontier.comparisons(grouped(measured))
    points = [r for r in records if r["record"] == "point"]
    return [*records, *compared, *frontier.claims(compared), *frontier.equal_accuracy(points)]


def draw_pictures(records: Sequence[dict[str, Any]], curves: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    """`frontier.png`, `behaviour.png` and, where there are learning curves, `learning.png`."""
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
    show(shown)
