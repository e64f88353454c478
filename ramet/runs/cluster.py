"""`ramet train --trainer openrlhf`: a run on Ray, started, watched, restarted, stopped; its plan and its flags."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ramet.agents import drain
from ramet.display import progress
from ramet.env.grading import reward_function
from ramet.errors import ConfigError, PartLost, RunLost, first_line, require
from ramet.policy.models.checkpoint import checkpoint_path, latest_checkpoint
from ramet.policy.openrlhf import supported
from ramet.policy.openrlhf.flags import STOP, flags
from ramet.policy.openrlhf.placement import GIB, ModelDimensions, check_fits, place
from ramet.policy.openrlhf.settings import FREE, ClusterConfig
from ramet.runs.build import read_metrics, score_name
from ramet.runs.cluster_process import LOG, NOTICE, OUTCOME, longest, read_outcome, run_spec, wait_for
from ramet.runs.commands import claim_folder
from ramet.runs.settings import RunConfig, held, write
from ramet.storage import meta, read_text, write_json
from ramet.terminal import Table, show

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 30.0
SETTLE_SECONDS = 30.0
"""Ray takes that long to notice that a node is gone; until then it puts what is new there."""


def print_flags(config: RunConfig, directory: Path, spawn: bool) -> None:
    """`--dry-run`: the command that OpenRLHF is started with. Starts nothing and writes nothing."""
    spec = run_spec(config, directory, spawn)
    made = flags(spec, longest(config, spec.model))
    lines = ["python -m openrlhf.cli.train_ppo_ray"]
    for word in made:
        if word.startswith("--"):
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    show(" \\\n".join(lines), soft_wrap=True)


def print_plan(config: RunConfig, directory: Path, spawn: bool, out: Path | None) -> None:
    """`--plan`: placement and memory. Raises `ConfigError` if it does not fit."""
    require("torch", "--plan")
    spec = run_spec(config, directory, spawn)
    context = longest(config, spec.model)
    flags(spec, context)
    placement = place(ModelDimensions.from_config(spec.model), config.train, config.openrlhf, context)
    dimensions, cluster = placement.dimensions, config.openrlhf
    show(
        f"{config.model}: {dimensions.parameters / 1e9:.2f} billion parameters, {dimensions.layers} layers of {dimensions.hidden}, "
        f"rows of {context:,} tokens at most, batches of {max(config.train.batch_tokens, context):,}"
    )
    names = list(dict.fromkeys(name for part in placement.parts for name in part.bytes))
    table = Table("GiB of one GPU", title=f"{cluster.gpus} GPUs of {cluster.gpu_memory:g} GiB")
    for part in placement.parts:
        table.add_column(f"{part.gpus} x {part.name}", justify="right")
    for name in names:
        table.add_row(name, *(f"{part.bytes[name] / GIB:.1f}" if part.bytes.get(name) else "" for part in placement.parts))
    table.add_section()
    table.add_row("needed", *(f"{part.needed / GIB:.1f}" for part in placement.parts))
    table.add_row("offered", *(f"{part.offered / GIB:.1f}" for part in placement.parts))
    show(table)
    for number, node in enumerate(placement.nodes):
        show(f"node {number}: " + ", ".join(f"{count} GPUs {role}" for role, count in node.items()))
    show(
        f"an engine holds {placement.rows:,} rows of full length; an update sends {placement.sync / GIB:.1f} GiB of weights to each engine"
        + (f"; a node's host keeps {placement.host / GIB:.0f} GiB of optimiser" if placement.host else "")
    )
    if out is not None:
        parts = [
            {"record": "part", "part": part.name, "gpus": part.gpus, "needed_gib": part.needed / GIB, "offered_gib": part.offered / GIB}
            | {f"{name.replace(' ', '_')}_gib": size / GIB for name, size in part.bytes.items()}
            for part in placement.parts
        ]
        write_json(out, [meta("train --plan", config.seed), *parts])
    check_fits(placement)


def train_on_cluster(config: RunConfig, directory: Path, spawn: bool, out: Path | None, accept_code: bool = False) -> None:
    """Train in `directory`, resuming what is there. A run that loses a part begins again from its last checkpoint."""
    if not config.openrlhf.address:
        supported.check()
    config = _absolute(config)
    spec = run_spec(config, directory, spawn)
    context = longest(config, spec.model)
    flags(spec, context)
    if not config.openrlhf.cpu:
        check_fits(place(ModelDimensions.from_config(spec.model), config.train, config.openrlhf, context))
    # What is wrong with the tasks or the reward is reported now, and not by an actor in a minute.
    env = config.env.without_reward_model().build()
    reward_function(env, config.reward.function)
    env.tasks("train", 1, config.seed)
    _claim(directory, config, accept_code)
    (directory / STOP).unlink(missing_ok=True)
    final = checkpoint_path(directory / "checkpoints", config.train.updates)
    if not final.exists():
        _run(config, directory, spawn)
    metrics = read_metrics(directory)
    records = [meta("train", config.seed), *({"record": "update", **m} for m in metrics)]
    write_json(directory / "training.json", records)
    if out is not None:
        write_json(out, records)
    logger.info(f"run folder {directory}: metrics.jsonl, tensorboard/, {LOG}, checkpoints/{final.name}; its trees: ramet show {directory}")
    logger.info(f"measure it: ramet eval --policy {directory} --config {directory / 'config.toml'}")


def _run(config: RunConfig, directory: Path, spawn: bool) -> None:
    """Run the cluster process to its end, and again from the last checkpoint each time that it loses a part.

    Raises the error that ended it; `RunLost` where it may not be started again.
    """
    lost: PartLost | None = None
    for left in reversed(range(config.openrlhf.restarts + 1)):
        try:
            _attempt(config, directory, spawn)
            return
        except PartLost as error:
            lost = error
        if drain.requested():
            break
        again = f"; beginning again from the last checkpoint ({left} times more)" if left else ""
        logger.warning(f"lost: {lost}{again}")
        if left and config.openrlhf.address:
            time.sleep(SETTLE_SECONDS)
    raise RunLost(f"{lost}; the last checkpoint and all finished trees are kept: run the same command again to resume") from lost


def _absolute(config: RunConfig) -> RunConfig:
    """With absolute paths: the cluster process and its actors may run in another folder."""
    roles = {name: role.model_copy(update={"model": _whole(role.model)}) for name, role in config.roles.items()}
    return config.model_copy(update={"model": _whole(config.model), "roles": roles, "env": config.env.absolute()})


def _whole(model: str) -> str:
    return str(Path(model).resolve()) if model not in ("", "nano") and Path(model).exists() else model


def _claim(directory: Path, config: RunConfig, accept_code: bool = False) -> None:
    """As `claim_folder`; a run may go on at another address, and with another number of restarts."""
    path = directory / "config.toml"
    if path.exists():
        before = held(path)
        if before.model_copy(update={"openrlhf": _placed(before, config)}).identity() == config.identity():
            write(config, path)
    claim_folder(directory, config, accept_code)


def _placed(before: RunConfig, config: RunConfig) -> ClusterConfig:
    return before.openrlhf.model_copy(update={name: getattr(config.openrlhf, name) for name in FREE})


_Watched = tuple[Callable[[], bool], Callable[[], str]]
"""Is a cluster process running? And when it is not: how did it end?"""


def _attempt(config: RunConfig, directory: Path, spawn: bool) -> None:
    """Run the cluster process once. Raises the error that ended it, `PartLost` where it has left none."""
    for path in (OUTCOME, NOTICE):
        (directory / path).unlink(missing_ok=True)
    last = latest_checkpoint(directory / "checkpoints")
    done = int(last.name.removeprefix("step-")) if last else 0
    command = [sys.executable, "-m", "ramet.runs.cluster_process", str(directory.resolve()), *([] if spawn else ["--no-spawn"])]
    start = _submitted if config.openrlhf.address else _started
    shown_progress = progress.training("openrlhf", config.train.updates, done, score_name(config))
    with shown_progress as report, start(config, directory, command) as (running, why):
        shown, notice, stopping = done, "", False
        while running():
            time.sleep(0.5)
            shown, notice = _report(directory, shown, report), _show_notice(directory, notice)
            if drain.requested() and not stopping:
                stopping = True
                (directory / STOP).touch()
        _report(directory, shown, report)
        end = why()
    if not (directory / OUTCOME).exists():
        raise PartLost(f"the process that holds the run has died ({end}); see {directory / LOG}")
    if (error := read_outcome(directory)) is not None:
        raise error


def _report(directory: Path, shown: int, report: Callable[[dict[str, Any]], None]) -> int:
    """Report the updates that came since `shown`."""
    for entry in read_metrics(directory):
        if entry["update"] >= shown:
            report(entry)
            shown = entry["update"] + 1
    return shown


def _show_notice(directory: Path, shown: str) -> str:
    """Show what the cluster process waits for, unless that has been `shown`. Returns it."""
    notice = read_text(directory / NOTICE).strip() if (directory / NOTICE).exists() else ""
    if notice and notice != shown:
        logger.info(notice)
    return notice


@contextmanager
def _started(config: RunConfig, directory: Path, command: list[str]) -> Iterator[_Watched]:
    """The cluster process on this machine, with a Ray of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"), "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's workers look for compilers and for ninja where this Python is.
    environment.pop("RAY_ADDRESS", None)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with (directory / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        yield lambda: process.poll() is None, lambda: f"exit status {process.poll()}"
    finally:
        if process.poll() is None:
            # Its Ray ends with it.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _submit(client: Any, entrypoint: str, address: str) -> str:
    """Submit a job to a Ray job server; its id. A server that has just started refuses jobs until it has an agent for them, so one that
    refuses is asked again for a while. Raises `ConfigError` if it still refuses then."""
    submissions: list[str] = []

    def refusal() -> str:
        try:
            submissions.append(client.submit_job(entrypoint=entrypoint))
        except RuntimeError as error:
            return f"the Ray job server at {address} refuses the run ({first_line(error)})"
        return ""

    if lack := wait_for(refusal, "it to take jobs", logger.info):
        raise ConfigError(f"{lack}; see what its nodes do: ray status")
    return submissions[0]


@contextmanager
def _submitted(config: RunConfig, directory: Path, command: list[str]) -> Iterator[_Watched]:
    """The cluster process on an existing cluster, as a job of Ray's. The run folder must be one that its nodes see."""
    try:
        from ray.job_submission import JobStatus, JobSubmissionClient
    except ImportError as error:
        raise ConfigError("submitting to a cluster needs Ray here: pip install 'ray[default]==2.55.0'") from error
    try:
        client = JobSubmissionClient(config.openrlhf.address)
        submission = _submit(client, shlex.join(["python", *command[1:]]), config.openrlhf.address)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray job server answers at {config.openrlhf.address} ({error}): start Ray there, or leave openrlhf.address out"
        ) from error
    logger.info(f"submitted as {submission} to {config.openrlhf.address}")
    ended = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)

    silent = 0.0

    def running() -> bool:
        nonlocal silent
        try:
            status, silent = client.get_job_status(submission), 0.0
        except (OSError, RuntimeError):  # what it uses raises OSErrors
            silent = silent or time.monotonic()
            return time.monotonic() - silent < SETTLE_SECONDS
        return status not in ended

    def why() -> str:
        with contextlib.suppress(OSError, RuntimeError):
            return " ".join(str(client.get_job_info(submission).message).split())[:300]
        return f"no job server answers at {config.openrlhf.address}"

    try:
        yield running, why
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            if client.get_job_status(submission) not in ended:
                client.stop_job(submission)
            with (directory / LOG).open("a", encoding="utf-8") as log:
                log.write(client.get_job_logs(submission))
