"""`ramet demo`: measure, train, watch, measure again; at most ten minutes on two cores.

Interrupt it whenever you like: the same command goes on where it stopped.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ramet.agents import drain
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Sampling
from ramet.display.report import write_report
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.models.checkpoint import checkpoint_path
from ramet.recipes.reproduce import draw_pictures, summary
from ramet.runs.build import open_model, read_metrics
from ramet.runs.commands import claim_folder, print_points, run_measuring, run_training, tree_entry
from ramet.runs.settings import RunConfig
from ramet.runs.show import bill, branch_view, grow_live
from ramet.storage import meta, write_json
from ramet.terminal import HEADING, Screen, show

logger = logging.getLogger(__name__)


def run_demo(directory: Path, config: RunConfig) -> None:
    """The whole demonstration in `directory`."""
    started = time.perf_counter()
    claim_folder(directory, config)
    with Journal(directory / "journal.jsonl", fingerprint(config.model_dump(mode="json"), weights_id(find(config.model)))) as journal:
        logger.info("1. the base model, deciding for itself and without spawning", extra=HEADING)
        entries = [tree_entry("base", config, True), tree_entry("base_serial", config, False)]
        measured = run_measuring(config, find(config.model), entries, ("iid",), journal, "measuring")
        print_points(summary(measured))
        logger.info("2. reinforcement learning from one global reward", extra=HEADING)
        trainer = run_training(config, directory / "trained", True, "training")
        final = checkpoint_path(trainer.checkpoints, config.train.updates)
        logger.info("3. one tree of clones on a held-out problem", extra=HEADING)
        tree = show_tree(config, final)
        logger.info("4. the trained model beside the base", extra=HEADING)
        measured += run_measuring(config, final, [tree_entry("trained", config, True)], ("iid",), journal, "measuring")
    records = [meta("demo", config.seed, time.perf_counter() - started), *summary(measured)]
    write_json(directory / "demo.json", records)
    conclusion = outcome_sentence(records)
    draw_pictures(records, {"trained": read_metrics(directory / "trained")}, directory)
    write_report(
        directory / "report.html",
        "ramet demo",
        f"The base model has no preference between working alone and delegating. Reinforcement learning is to teach it when. {conclusion}",
        records,
        [directory / name for name in ("frontier.png", "behaviour.png", "learning.png")],
        tree,
    )
    print_points(records)
    show(conclusion)
    logger.info(
        f"done in {time.perf_counter() - started:.0f} seconds. Open {directory / 'report.html'}; "
        "draw_pictures, metrics, checkpoints and demo.json lie beside it"
    )


def outcome_sentence(records: Sequence[Mapping[str, Any]]) -> str:
    """The result in words: the trained model beside the base at the largest budget."""
    points = {r["policy"]: r for r in records if r["record"] == "point"}  # the last of each is at its largest budget
    trained, base = points["trained"], points["base"]
    (compared,) = (r for r in records if r["record"] == "comparison" and (r["baseline"], r["budget"]) == ("base", trained["budget"]))
    clear = "clearly more" if compared["ci_low"] > 0 else "clearly less" if compared["ci_high"] < 0 else "not clearly more or less"
    return (
        f"The result: with {trained['budget']} tokens a task the trained model is right on {trained['accuracy']:.0%} of {trained['n']} "
        f"held-out tasks and the base on {base['accuracy']:.0%}, {clear} (difference {compared['difference']:+.2f}, 95% interval "
        f"{compared['ci_low']:+.2f} to {compared['ci_high']:+.2f}); it spawns on {trained['spawn_rate']:.0%} of them, the base on "
        f"{base['spawn_rate']:.0%}, and generates {trained['generated']:.0f} tokens a task, the base {base['generated']:.0f}."
    )


def show_tree(config: RunConfig, model: Path) -> str:
    """Grow one long held-out problem live; returns the tree as text."""
    weights, _, chat = open_model(config, model)
    env = config.env.build()
    tasks = sorted(env.tasks("iid", 20, config.eval.seed + config.seed + 1), key=env.size, reverse=True)
    budget = config.budget.model_copy(update={"generated": max(config.budgets)})

    sampling = Sampling(temperature=config.eval.temperature)

    async def delegated() -> Any:
        """The longest problem that is delegated; the longest of all if none is."""
        async with HFPolicy(weights) as policy:
            runtime = Runtime(policy, chat, sampling)
            for task in tasks:
                if (await runtime.run(task, budget, config.seed)).spawned:
                    return task
            return tasks[0]

    async def grow(task: Any) -> Any:
        # An engine of its own: the bill is that of a problem seen for the first time.
        async with HFPolicy(weights) as policy:
            return await grow_live(Runtime(policy, chat, sampling), task, budget, config.seed)

    task = drain.run(delegated)
    tree = drain.run(grow, task)
    recorder = Screen(record=True, width=100, file=io.StringIO())
    verdict = "right" if env.grade(task, tree.answer) == 1.0 else f"wrong: it is {task.reference}"
    for part in (
        task.messages[-1].content,
        branch_view(tree.root, chat),
        f"answer {tree.answer}, which is {verdict}",
        bill(tree, budget),
    ):
        show(part)
        recorder.print(part)
    return str(recorder.export_text())
