"""The commands train, eval and models: run folders, training, measuring, and their records."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ramet.agents import drain
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.resume import JournaledPolicy
from ramet.agents.sampling import Sampling
from ramet.agents.transcripts import TREES, Transcripts
from ramet.benchmarks.evaluation import baselines, methods
from ramet.benchmarks.evaluation.harness import (
    Backend,
    Measured,
    MethodEntry,
    Workload,
    by_size,
    failures,
    forget_unfinished,
    grouped,
    measure,
    point,
)
from ramet.display import progress
from ramet.display.plots import LABELS
from ramet.env.environment import Environment
from ramet.env.grading import reward_function
from ramet.env.questions import Questions
from ramet.env.splits import TUNING
from ramet.errors import ConfigError, PolicyError
from ramet.policy.models.catalogue import CATALOGUE, cache, resolve, weights_id
from ramet.policy.models.checkpoint import TRAINER, checkpoint_path
from ramet.policy.training.reward import Judge
from ramet.policy.training.update import nothing_sampled_message
from ramet.runs.build import engine_id, make_trainer, open_engine, open_model, rewarding, score_name
from ramet.runs.equipment import equipment_of, named_equipment
from ramet.runs.settings import RunConfig, dumps, held, load, write
from ramet.storage import LOCK, lock, meta, read_text, write_json, write_text
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ramet.policy.training.trainer import Trainer


CODE = "code.json"
"""In a run folder: which code, not ramet's own, the run depends on (`RunConfig.code`)."""


def claim_folder(directory: Path, config: BaseModel, accept_code: bool = False) -> None:
    """Claim the run folder for this configuration and this process. Raises `ConfigError` if it holds another or is in use.

    A run may go on where its server is now, with other limits on requests and waiting (`RunConfig.identity`). With other code of
    environments, rewards, tools or programs than it was begun with, it goes on only with `accept_code`, and says so.
    """
    lock(directory)
    path = directory / "config.toml"
    if path.exists():
        before, new = read_text(path), dumps(config)
        others = [child for child in directory.iterdir() if child.name not in (path.name, LOCK, CODE)]
        if before != new and (not others or _same(path, config)):
            write(config, path)  # also if it was claimed by a run that did not get as far as writing anything
        elif before != new:
            raise ConfigError(f"{directory} holds a run with another configuration or seed; choose another --name or remove it")
        _compare_code(directory, config, accept_code or not others)
    else:
        write(config, path)
    if isinstance(config, RunConfig) and (code := config.code()):
        write_text(directory / CODE, json.dumps(code, indent=2) + "\n")


def _compare_code(directory: Path, config: BaseModel, accept: bool) -> None:
    """Raises `ConfigError` if the run in a folder was begun with other code, unless that is accepted, which is logged."""
    path = directory / CODE
    if not isinstance(config, RunConfig) or not path.exists():
        return
    before = {each["path"]: each for each in json.loads(read_text(path))}
    changed = [each for each in config.code() if before.get(each["path"], each) != each]
    if not changed:
        return
    names = ", ".join(each["path"] for each in changed)
    old, new = before[changed[0]["path"]]["distribution"], changed[0]["distribution"]
    versions = f" ({old or 'no distribution'} then, {new or 'no distribution'} now)" if old != new else ""
    if not accept:
        raise ConfigError(
            f"{directory} holds a run that was begun with other code of {names}{versions}; add --accept-changed-code to go on with the "
            "code as it is now, or choose another --name"
        )
    logger.warning(f"{directory}: the code of {names} has changed since the run was begun{versions}; going on with it as it is now")


def _same(path: Path, config: BaseModel) -> bool:
    """Are these the settings of the run that `path` holds, as far as they tell runs apart?"""
    return isinstance(config, RunConfig) and held(path).identity() == config.identity()


def run_training(config: RunConfig, directory: Path, spawn: bool, label: str) -> Trainer:
    """Train in `directory`, resuming what is there, with a progress bar."""
    trainer = make_trainer(config, directory, spawn)
    done = trainer.resume()
    if 0 < done < config.train.updates:
        logger.info(f"{label}: resuming after update {done}")
    if done < config.train.updates:
        with progress.training(label, config.train.updates, done, score_name(config)) as report:
            drain.run(trainer.train, report)
    if starved := sum(m.get("starved", 0) for m in trainer.log.read()):
        trees = config.train.tasks * config.train.group_size
        share = f"{round(starved * trees)} of {trees * config.train.updates} trees"
        logger.warning(f"{nothing_sampled_message(share, 'their prompts leave nothing of a limit, such as the context')}")
    return trainer


def run_measuring(
    config: RunConfig, model: str | Path, entries: Sequence[MethodEntry], splits: Sequence[str], journal: Journal, label: str
) -> list[Measured]:
    """Measure methods that share one model, on held-out tasks of each split; splits that the environment lacks are left out.

    See `run_workloads`.
    """

    def plan(env: Environment) -> Iterator[tuple[MethodEntry, Workload]]:
        for split in splits:
            if split in env.splits or split in TUNING.values():
                workload = workload_of(config, env, split)
                yield from ((entry, workload) for entry in entries)

    return run_workloads(config, model, plan, journal, label)


def workload_of(config: RunConfig, env: Environment, split: str) -> Workload:
    """The workload of a run on a split."""
    seed = config.eval.seed + config.seed
    tasks = env.tasks(split, config.eval.tasks, seed)
    return Workload(split, tasks, budgets_of(config, split), config.budget, seed, config.eval.repeats, judge_of(config, env))


def judge_of(config: RunConfig, env: Environment) -> Judge:
    """What scores the trees of an environment."""
    return Judge(reward_function(env, config.reward.function), rewarding(config))


def budgets_of(config: RunConfig, split: str) -> tuple[int, ...]:
    """The limits on generated tokens under which a split is measured, or is tuned on."""
    return config.eval.ood_budgets if split in ("ood", TUNING["ood"]) else config.eval.budgets


def run_workloads(
    config: RunConfig,
    model: str | Path,
    plan: Callable[[Environment], Iterable[tuple[MethodEntry, Workload]]],
    journal: Journal,
    label: str,
) -> list[Measured]:
    """Measure each method that `plan` names on its workload, all with one model.

    Outcomes go to `journal`, and all trees to the transcripts beside it. Until those of a method on a split are all known, the samples of
    its trees are kept beside it, in a file of their own.
    """
    equipment = equipment_of(config, open_engine)
    engine, chat, count = open_engine(config, model)
    env = config.env.build(count)
    # Each task in flight holds a context; a server may be restarted meanwhile.
    in_flight = 64 if not config.env.language else 8 if config.backend == "transformers" else 32
    transcripts = Transcripts(journal.path.with_name(TREES), config.transcript_bytes)
    forget_unfinished(transcripts, journal)

    async def main() -> list[Measured]:
        measured: list[Measured] = []
        async with engine, equipment.serving() as serving:
            for entry, workload in plan(env):
                shown = entry.name if config.env.language else LABELS.get(entry.name, entry.name)
                outcomes = len(workload.budgets) * len(workload.tasks) * workload.repeats
                beside = journal.path.with_name(f"{journal.path.stem}-{entry.name}-{workload.split}.jsonl")
                with (
                    progress.measuring(f"{label}: {shown}, {workload.split}", outcomes) as report,
                    Journal(beside, journal.identity) as samples,
                ):
                    policy = JournaledPolicy(engine, samples)
                    backend = Backend(policy, chat, in_flight, config.tell_budget == "all", serving.journaled(samples))
                    try:
                        measured += await measure(entry, env, workload, backend, journal, report, transcripts)
                    except PolicyError:
                        policy.give_up()
                        raise
                beside.unlink()
        return measured

    measured = drain.run(main)
    if lost := list(dict.fromkeys((m.split, m.task, m.failed) for m in measured if m.failed)):
        logger.warning(f"{label}: {len(lost)} tasks could not be measured and count in no result; the first: {lost[0][2]}")
    _warn_of_starved(measured)
    return measured


def _warn_of_starved(measured: Sequence[Measured]) -> None:
    """Warn of outcomes for which nothing could be sampled. Raises `ConfigError` if that is all of them."""
    starved = [m for m in measured if m.outcome.starved]
    if starved and len(starved) == len(measured):
        raise ConfigError(nothing_sampled_message(f"any of {len(measured)} outcomes", starved[0].outcome.starved))
    for method, split in dict.fromkeys((m.method, m.split) for m in starved):
        reasons = [m.outcome.starved for m in starved if (m.method, m.split) == (method, split)]
        total = sum((m.method, m.split) == (method, split) for m in measured)
        what = f"{len(reasons)} of {total} outcomes ({method}, {split}), which count as wrong"
        logger.warning(f"{nothing_sampled_message(what, reasons[0])}")


def tree_entry(name: str, config: RunConfig, spawn: bool) -> MethodEntry:
    """The model deciding by itself, with the tool or without, or the run's program for it; a prompt in words says so."""
    method = methods.instructed_tree(config.env.instruction(spawn)) if config.env.language else baselines.tree
    depth = config.budget.depth if spawn else 0
    return MethodEntry(name, method, Sampling(temperature=config.eval.temperature), depth, programmed=True)


def result_records(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """A `point` record per policy, split and budget, `size` records of the same by task size, and one of each task that failed."""
    groups = grouped(measured).values()
    return [point(ms) for ms in groups] + [record for ms in groups for record in by_size(ms)] + failures(measured)


def data_records(config: RunConfig, training: bool = False) -> list[dict[str, Any]]:
    """A `data` record per measured split of a data set; rows that are repeated or are also trained on are reported.

    Raises what is wrong with the data, or with a reward of the user's, before a model is loaded for it; with `training`, with the data
    to train on too.
    """
    env = config.env.without_reward_model().build()
    reward_function(env, config.reward.function)
    if training:
        env.tasks("train", 1, config.seed)
    if not isinstance(env, Questions):
        return []
    records: list[dict[str, Any]] = []
    for split in env.splits:
        counts = env.row_counts(split)
        records.append({"record": "data", "split": split, **counts})
        if counts["duplicates"]:
            logger.info(f"{split}: {counts['duplicates']} of {counts['rows']} rows repeat another and are not measured again")
        if counts["trained_on"]:
            logger.warning(f"{split}: {counts['trained_on']} of {counts['rows']} questions are trained on too (env.allow_overlap)")
    return records


def print_points(records: Sequence[dict[str, Any]], score: str = "accuracy") -> None:
    """Score with its interval, tokens, critical path and spawn rate, a table a split."""
    points = [r for r in records if r["record"] == "point"]
    for split in dict.fromkeys(p["split"] for p in points):
        shown = Table(
            "policy", "budget", score, "95%", "generated", "critical path", "spawns", title=f"{split} ({points[0]['n']} tasks a point)"
        )
        for column in shown.columns[1:]:
            column.justify = "right"
        for p in points:
            if p["split"] == split:
                shown.add_row(
                    p["policy"],
                    str(p["budget"]),
                    f"{p['accuracy']:.3f}",
                    f"{p['ci_low']:.2f}-{p['ci_high']:.2f}",
                    f"{p['generated']:.0f}",
                    f"{p['critical_path']:.0f}",
                    f"{p['spawn_rate']:.0%}",
                )
        show(shown)


def train_command(config: RunConfig, directory: Path, spawn: bool, out: Path | None, accept_code: bool = False) -> None:
    """`ramet train`: train, then measure the final weights; everything resumes."""
    if not config.env.measurable:
        logger.info("env.data names no file or data set: the final weights will not be measured")
    named_equipment(config)
    data = data_records(config, training=True)
    claim_folder(directory, config, accept_code)
    trainer = run_training(config, directory, spawn, "training")
    final = checkpoint_path(trainer.checkpoints, config.train.updates)
    with Journal(directory / "evaluation.jsonl", fingerprint(config.identity(), spawn, weights_id(final))) as journal:
        entry = tree_entry("trained" if spawn else "solo", config, spawn)
        measured = run_measuring(config, final, [entry], ("iid", "ood"), journal, "final evaluation")
    _write_results("train", config, [*data, *result_records(measured)], directory / "evaluation.json", out)
    logger.info(f"run folder {directory}: metrics.jsonl, tensorboard/, checkpoints/, evaluation.json; its trees: ramet show {directory}")


def eval_command(
    policy: str, config: RunConfig, directory: Path, spawn: bool, out: Path | None, accept_code: bool = False
) -> None:
    """`ramet eval`: one policy over the sweep of budgets."""
    config.env.check_measurable()
    named_equipment(config)
    data = data_records(config)
    claim_folder(directory, config, accept_code)
    path: str | Path = policy if config.named_by_server else resolve(policy)
    base = isinstance(path, str) or not (path / TRAINER).exists()
    name = ("base" if spawn else "base_serial") if base else ("trained" if spawn else "solo")
    with Journal(
        directory / "journal.jsonl", fingerprint(config.identity(), config.env.files(), engine_id(config, path), spawn)
    ) as journal:
        entry = tree_entry(name, config, spawn)
        measured = run_measuring(config, path, [entry], ("iid", "ood"), journal, "eval")
    _write_results("eval", config, [*data, *result_records(measured)], directory / "results.json", out)


def _write_results(command: str, config: RunConfig, results: Sequence[dict[str, Any]], path: Path, out: Path | None) -> None:
    """Write what a command measured into its folder and to `out`, and print the points."""
    records = [meta(command, config.seed), *results]
    write_json(path, records)
    if out is not None:
        write_json(out, records)
    print_points(records, score_name(config))


def list_models() -> None:
    """`ramet models list`."""
    path = resolve("nano")
    recipe = json.loads(read_text(path / "pretrain.json"))
    size = (path / "model.safetensors").stat().st_size / 2**20
    for name, model in CATALOGUE.items():
        show(f"{name}: {model.about}; " + ("fetched" if (cache() / name / "config.json").exists() else f"ramet models get {name}"))
    show(
        f"nano: {recipe['layers']}-layer Llama of width {recipe['width']}, {size:.1f} MiB, adds up rows of small integers; shipped"
    )


def accuracy_by_length(model: str, tasks: int, seed: int, out: Path | None) -> None:
    """`ramet models accuracy`: by number of operands, sampled greedily with ample budget, alone and offered the tool."""
    from ramet.agents.budget import Budget
    from ramet.agents.runtime import Job, Runtime
    from ramet.env.arithmetic import RowsEnvironment
    from ramet.policy.engines.hf import HFPolicy
    from ramet.policy.models.load import load_model
    from ramet.rewards.exact_match import integer_match

    weights, _, chat = load_model(resolve(model))
    lengths = (3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 32, 48)
    ways = (("alone", 0, 0.0), ("alone_sampled", 0, 1.0), ("offered", 1, 1.0))

    async def main() -> list[dict[str, Any]]:
        records = []
        async with HFPolicy(weights) as policy:
            for length in lengths:
                record: dict[str, Any] = {"record": "length", "operands": length, "n": tasks}
                sums = RowsEnvironment((length, length)).tasks("iid", tasks, seed)
                for name, depth, temperature in ways:
                    budget = Budget(generated=640, depth=depth, answer_reserve=8, context=weights.config.max_position_embeddings)
                    runtime = Runtime(policy, chat, Sampling(temperature=temperature))
                    right = spawned = right_spawned = 0
                    async with runtime.run_many([Job(task, budget, i) for i, task in enumerate(sums)]) as trees:
                        async for job, tree in trees:
                            report(1)
                            good = integer_match(job.task, tree.answer) == 1.0
                            right += good
                            spawned += tree.spawned
                            right_spawned += good and tree.spawned
                    record[name] = right / tasks
                    if depth:
                        record["spawn_rate"] = spawned / tasks
                        record["accuracy_if_spawned"] = right_spawned / spawned if spawned else None
                records.append(record)
        return records

    with progress.measuring("accuracy", len(lengths) * len(ways) * tasks) as report:
        records = drain.run(main)
    shown = Table(
        "operands",
        "alone, greedy",
        "alone, sampled",
        "offered the tool, sampled",
        "spawns",
        "accuracy if it spawns",
        title=f"{model}: {tasks} tasks a length",
    )
    for r in records:
        spawned = "" if r["accuracy_if_spawned"] is None else f"{r['accuracy_if_spawned']:.2f}"
        shown.add_row(
            str(r["operands"]), f"{r['alone']:.2f}", f"{r['alone_sampled']:.2f}", f"{r['offered']:.2f}", f"{r['spawn_rate']:.2f}", spawned
        )
    if out is not None:
        write_json(out, [meta("models accuracy", seed), *records])
    show(shown)


SMALL = (
    "threads=1", "eval.tasks=16", "eval.budgets=[48, 96]", "eval.ood_budgets=[192]", "train.updates=6", "train.tasks=4",
    "train.group_size=4", "train.checkpoint_every=2",
)  # fmt: skip


def small_commands(seed: int) -> dict[str, Callable[[Path], None]]:
    """An evaluation and a training run of a few seconds, for `ramet bench kills`. Imports what they need, so that a fork starts at once."""
    import ramet.policy.training.trainer  # noqa: F401

    config = load(RunConfig, "nano", [f"seed={seed}", *SMALL])
    open_model(config)
    return {
        "eval": lambda folder: eval_command("nano", config, folder, True, None),
        "train": lambda folder: train_command(config, folder, True, None),
    }
