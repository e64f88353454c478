"""The process that starts a run on Ray: `python -m ramet.runs.cluster_process RUN_FOLDER`. `ramet train --trainer openrlhf` starts it.

It ends with the error that ended the run in `RUN_FOLDER/openrlhf/outcome.json`, or null.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ramet import terminal
from ramet.agents import drain
from ramet.agents.equipment import Equipment
from ramet.errors import (
    CheckpointError,
    ConfigError,
    Drained,
    PartLost,
    PolicyError,
    RametError,
    StorageError,
    first_line,
    from_record,
    to_record,
)
from ramet.imports import search
from ramet.policy.models.catalogue import find
from ramet.policy.openrlhf.flags import flags, needs
from ramet.policy.openrlhf.settings import RunSpec, part_lost
from ramet.policy.training.update import LearningProblem
from ramet.runs.build import learning_problem, open_engine, run_fingerprint
from ramet.runs.equipment import equipment_of, named_equipment
from ramet.runs.settings import RunConfig, load
from ramet.storage import lock, read_text, write_text

logger = logging.getLogger("ramet.runs.cluster_process")
LOG = "openrlhf.log"
OUTCOME = Path("openrlhf") / "outcome.json"
NOTICE = Path("openrlhf") / "notice.txt"
"""What the process waits for, in a line that `ramet train` shows: on another machine's job server its own log is out of sight."""
GUARD_SECONDS = 5.0
WAIT_SECONDS = 60.0
"""How long nodes may take to join a cluster, and its job server to take jobs, after Ray has been started."""
POLL_SECONDS = 1.0


def run_spec(config: RunConfig, directory: Path, spawn: bool, fingerprint: str = "") -> RunSpec:
    """The run as its actors receive it; training needs its `fingerprint`.

    Raises `ConfigError` for settings that only the local trainer supports.
    """
    if config.backend != "transformers" or config.attention.method != "dense":
        raise ConfigError("the openrlhf trainer samples with vLLM engines of its own: leave backend and attention.method at their defaults")
    if own := [name for name, role in config.roles.items() if role.own and not role.url]:
        raise ConfigError(f"roles.{own[0]}: the openrlhf trainer's engines serve the run's model alone: give the role's model by a url")
    named_equipment(config)  # says what is wrong here, and not where the first tree grows
    return RunSpec(
        config.train, config.openrlhf, directory.resolve(), find(config.model).resolve(), config.chat, config.dtype, config.seed,
        fingerprint, config.tell_budget == "all", functools.partial(_problem, config, spawn, os.getcwd()),
        functools.partial(_equipment, config, os.getcwd()), config.transcript_bytes,
    )  # fmt: skip


def _problem(config: RunConfig, spawn: bool, folder: str, count: Callable[[str], int]) -> LearningProblem:
    search(folder)  # the actors of the run may have been started elsewhere
    return learning_problem(config, count, spawn)


def _equipment(config: RunConfig, folder: str) -> Equipment:
    search(folder)
    return equipment_of(config, open_engine)


def longest(config: RunConfig, model: Path) -> int:
    """Tokens of the longest row: the budget's context, or the model's own. Raises `ConfigError` for a vision-language model."""
    from transformers import AutoConfig

    try:
        architecture = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} is not a model directory ({first_line(error)})") from error
    if hasattr(architecture, "vision_config"):
        raise ConfigError("the openrlhf trainer does not support vision-language models: use the local trainer")
    positions = int(architecture.max_position_embeddings)
    return min(config.budget.context or positions, positions)


def wait_for(missing: Callable[[], str], expected: str, announce: Callable[[str], None]) -> str:
    """Call `missing` until it returns "" or `WAIT_SECONDS` have passed. Returns what it returned last. Raises `Drained`.

    What is waited for is announced once, in a line that ends with what is `expected` to come.
    """
    stop, announced = time.monotonic() + WAIT_SECONDS, False
    while (lack := missing()) and time.monotonic() < stop:
        if drain.requested():
            raise Drained
        if not announced:
            announce(f"{lack}: waiting up to {WAIT_SECONDS:g} seconds for {expected}")
            announced = True
        time.sleep(POLL_SECONDS)
    return lack


def start_ray(spec: RunSpec) -> None:
    """Connect to the cluster that this process stands in, or start one on this machine.

    A cluster that is too small is given time for more nodes to join; then it raises `ConfigError`.
    """
    import ray

    from ramet.policy.openrlhf import cpu

    wanted, own = needs(spec.cluster), dict[str, Any]()
    alone = "RAY_ADDRESS" not in os.environ
    variables = {"TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    if spec.cluster.cpu:
        variables |= cpu.ENVIRONMENT | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        os.environ.update(cpu.ENVIRONMENT)
        cpu.without_flash_attention()
        if alone:
            # Ray is told of GPUs that are not there, since the run's parts each ask for one.
            own = {"num_gpus": wanted["GPU"], "num_cpus": wanted["CPU"], "object_store_memory": 2**28}
    if alone:
        own |= {"address": "local", "include_dashboard": False}
    ray.init(runtime_env={"env_vars": variables}, **own)
    announce = functools.partial(_announce, spec.directory)
    if short := wait_for(functools.partial(_short, spec), "more nodes to join", announce):
        raise ConfigError(f"{short}; start Ray on more nodes, or lower openrlhf.trainers and openrlhf.engines")
    if short := _short(spec, free=True):
        announce(f"{short} and free: waiting until others give theirs back")


def _announce(directory: Path, line: str) -> None:
    """Say in the log, and to `ramet train`, what is waited for."""
    logger.info(line)
    write_text(directory / NOTICE, line + "\n")


def _short(spec: RunSpec, free: bool = False) -> str:
    """What the cluster lacks for this run, or of what is free in it; "" if nothing."""
    import ray

    here = ray.available_resources() if free else ray.cluster_resources()
    lacks = [f"{here.get(kind, 0):g} {kind}s where {n} are needed" for kind, n in needs(spec.cluster).items() if here.get(kind, 0) < n]
    return f"this Ray cluster has {' and '.join(lacks)}" if lacks else ""


def _guard(spec: RunSpec, directory: Path, over: threading.Event) -> None:
    """End this process when the cluster has become too small: what waits for a place on it would wait for ever."""
    while not over.wait(GUARD_SECONDS):
        if short := _short(spec):
            _write(directory, PartLost(short))
            os._exit(1)


def ours(error: BaseException, log: Path) -> RametError:
    """What ended a run, as an error of ours: `PartLost` where a part of the run has died. `log` says more about what nobody foresaw."""
    import ray.exceptions as r

    while isinstance(error, r.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, RametError):
        return error
    shown = f"{type(error).__name__}: {first_line(error)[:200]}"
    if getattr(error, "actor_init_failed", False):
        # It would fail again. What it raised stands last.
        return PolicyError(f"the run ended with {str(error).strip().splitlines()[-1][:200]}; see {log}")
    gone = (r.RaySystemError, r.RayActorError, r.WorkerCrashedError, r.OutOfMemoryError, r.ObjectLostError, r.NodeDiedError)
    if isinstance(error, gone) or part_lost(error):
        return PartLost(shown)
    if isinstance(error, OSError):
        return StorageError(f"{shown}; free space or mend it, and run again to resume")
    return PolicyError(f"the run ended with {shown}; see {log}")


def main() -> None:
    """Train in the folder that the command line names; exits with 0 once it is done."""
    directory, spawn = Path(sys.argv[1]), "--no-spawn" not in sys.argv
    terminal.log_to(terminal.messages)
    ended: RametError | None = None
    over = threading.Event()
    try:
        # Whoever started this may be gone while it goes on.
        lock(directory / "openrlhf")
        config = load(RunConfig, directory / "config.toml")
        spec = run_spec(config, directory, spawn, run_fingerprint(config, spawn))
        start_ray(spec)
        threading.Thread(target=_guard, args=(spec, directory, over), daemon=True).start()
        from ramet.policy.openrlhf.install import run

        run(spec, flags(spec, longest(config, spec.model)))
    except BaseException as error:
        traceback.print_exc()
        ended = ours(error, directory / LOG)
    over.set()
    _write(directory, ended)
    sys.exit(1 if ended else 0)


def _write(directory: Path, ended: RametError | None) -> None:
    write_text(directory / OUTCOME, json.dumps(None if ended is None else to_record(ended)) + "\n")


def read_outcome(directory: Path) -> RametError | None:
    """The error that ended the run; None if it is done."""
    record = json.loads(read_text(directory / OUTCOME))
    return None if record is None else from_record(record)


if __name__ == "__main__":
    main()
