"""`ramet bench kills`: kill -9 at random moments, resume, and compare with an undisturbed run.

A small `ramet eval` and a small `ramet train` of the nano model are started, killed and started again until they
end, over and over. Lost: work that the undisturbed run did and the killed one did not. Duplicated: work
recorded twice. Differing: another answer, other costs, another metric (times apart, and the prompt tokens of
an evaluation, which depend on what the engine happens to hold), another tree among the transcripts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ramet.agents.journal import read_records
from ramet.agents.transcripts import TREES, read_transcripts
from ramet.display import progress
from ramet.errors import InvariantViolation, RametError
from ramet.storage import meta, read_text, write_json
from ramet.terminal import Table, show

RunResults = dict[tuple[Any, ...], Any]
"""What a run has produced, by what identifies each result."""


def eval_work(folder: Path) -> tuple[RunResults, int]:
    """Outcomes by what was measured, and how many records repeat one."""
    records = read_records(folder / "journal.jsonl")
    work: RunResults = {
        (r["policy"], r["split"], r["budget"], r["task"]): {n: v for n, v in r["outcome"].items() if n != "seconds"} for r in records
    }
    repeated = len(records) - len(work)
    trees, twice = _trees(folder)
    return work | trees, repeated + twice


def _trees(folder: Path) -> tuple[RunResults, int]:
    """The token ids and rewards of the trees that a run kept, by their place, and how many places stand there twice."""
    kept = list(read_transcripts(folder / TREES))
    work: RunResults = {("tree", *k.place.values()): (k.reward, [branch.ids for branch in k.tree.branches]) for k in kept}
    return work, len(kept) - len(work)


def train_work(folder: Path) -> tuple[RunResults, int]:
    """Metrics by update and the final evaluation's points, and how many updates stand there twice."""
    lines = [json.loads(line) for line in read_text(folder / "metrics.jsonl").splitlines()]
    repeated = sum(count - 1 for count in Counter(line["update"] for line in lines).values())
    work: RunResults = {("update", line["update"]): {n: v for n, v in line.items() if not n.startswith("seconds")} for line in lines}
    for record in json.loads(read_text(folder / "evaluation.json")):
        if record["record"] == "point":
            work["point", record["split"], record["budget"]] = {n: v for n, v in record.items() if n != "seconds"}
    trees, twice = _trees(folder)
    return work | trees, repeated + twice


READ: dict[str, Callable[[Path], tuple[RunResults, int]]] = {"eval": eval_work, "train": train_work}
Command = Callable[[Path], None]
"""Runs in a folder, from its start or from where it was killed, to its end."""


def start(command: Command, folder: Path) -> int:
    """Run a command in a child process; its process id. A fork, so that a start costs little: this process runs no model itself."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, 1)
        os.dup2(void, 2)
        command(folder)
        status = 0
    finally:
        os._exit(status)


def bench_kills(commands: Mapping[str, Command], kills: int, seed: int, out: Path | None) -> None:
    """Kill each of `commands`, a small "eval" and a small "train", `kills` times; report what was lost, duplicated and different."""
    rng = random.Random(f"kills/{seed}")
    records: list[dict[str, Any]] = [meta("bench kills", seed)]
    shown = Table("command", "kills", "runs", "lost", "duplicated", "differing")
    with tempfile.TemporaryDirectory() as scratch:
        for name, command in commands.items():
            read = READ[name]
            calm = Path(scratch) / f"{name}-calm"
            begun = time.perf_counter()
            _, status = os.waitpid(start(command, calm), 0)
            if status:
                raise RametError(f"the undisturbed {name} failed; run ramet doctor")
            seconds = time.perf_counter() - begun
            expected, _ = read(calm)
            counts = Counter(kills=0, runs=0, lost=0, duplicated=0, differing=0)
            with progress.measuring(name, kills, "kills") as report:
                while counts["kills"] < kills:
                    folder = Path(scratch) / name
                    killed = _until_done(command, folder, rng, seconds)
                    done, repeated = read(folder)
                    counts["kills"] += killed
                    counts["runs"] += 1
                    counts["lost"] += len(expected.keys() - done.keys())
                    counts["duplicated"] += repeated + len(done.keys() - expected.keys())
                    counts["differing"] += sum(done[key] != value for key, value in expected.items() if key in done)
                    shutil.rmtree(folder)
                    report(killed)
            records.append({"record": "kills", "job": name, "pieces": len(expected), **counts})
            shown.add_row(name, *(str(counts[column]) for column in ("kills", "runs", "lost", "duplicated", "differing")))
    if out is not None:
        write_json(out, records)
    show(shown)
    if any(r.get("lost") or r.get("duplicated") or r.get("differing") for r in records):
        raise InvariantViolation("a killed and resumed run is not the undisturbed one")


def _until_done(command: Command, folder: Path, rng: random.Random, seconds: float) -> int:
    """Start and kill the command until it ends by itself. Returns the number of kills."""
    kills = 0
    while True:
        child = start(command, folder)
        deadline = time.perf_counter() + rng.uniform(0, seconds)
        status: int | None = None
        while time.perf_counter() < deadline and status is None:
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else None
            time.sleep(0.002)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        elif status == 0:
            return kills
        else:
            raise RametError(f"a resumed run failed with status {os.waitstatus_to_exitcode(status)} in {folder}")
