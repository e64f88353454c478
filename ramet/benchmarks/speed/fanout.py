"""`ramet bench runtime`: the cost of a clone compared with a task of a bare anyio task group.

The policy answers at once, so what is measured is the runtime: ledgers, records, messages, scheduling. The
bare group opens the same tree of tasks, each of which yields as often as the policy does. Each measurement runs in
its own process, the two programs in turns. Memory is the growth of the process's peak resident memory (Linux).
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio

from ramet.agents.budget import Budget
from ramet.agents.protocol import render_call
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.scripted import STOP, PlainFormat
from ramet.agents.tree import Message, StopReason, Task
from ramet.errors import RametError
from ramet.terminal import Table, show

PROGRAMS: dict[str, tuple[int, tuple[int, ...]]] = {
    "one tree, 1,000 clones": (1, (1000,)),
    "one tree, 10,000 clones": (1, (100, 99)),
    "one tree, 100,000 clones": (1, (316, 316)),
    "1,000 trees, 100 clones each": (1000, (100,)),
}
"""Trees, and how many clones a branch of each level opens."""


class Instant:
    """A policy that answers at once: a branch of level n opens `fan[n]` clones, then answers; others answer."""

    version = 0
    context: int | None = None

    def __init__(self, fan: tuple[int, ...]):
        def turn(text: str) -> Sample:
            ids = (*map(ord, text), STOP)
            return Sample(ids, (-0.5,) * len(ids), StopReason.END)

        self._calls = [turn(f"<tool_call>{render_call([f'r{level + 1}'] * n)}</tool_call>") for level, n in enumerate(fan)]
        self._answer = turn("Answer: 1")

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """The call of the branch's level, or an answer; see `Policy`."""
        await anyio.lowlevel.checkpoint()
        level, answered = request.prompt[2] - ord("0"), request.prompt[-1] == ord(">")
        return self._answer if answered or level >= len(self._calls) else self._calls[level]


async def _ours(trees: int, fan: tuple[int, ...]) -> int:
    runtime = Runtime(Instant(fan), PlainFormat(), max_turn_tokens=10**6)
    budget = Budget(depth=len(fan), width=None)
    task = Task("t", (Message("user", "r0"),))
    clones = 0
    async with runtime.run_many((Job(task, budget, i) for i in range(trees)), in_flight=8) as finished:
        async for _, tree in finished:
            clones += tree.usage.clones
    return clones


async def _bare(trees: int, fan: tuple[int, ...]) -> int:
    clones = 0

    async def branch(level: int) -> None:
        nonlocal clones
        await anyio.lowlevel.checkpoint()
        if level < len(fan):
            async with anyio.create_task_group() as group:
                for _ in range(fan[level]):
                    group.start_soon(branch, level + 1)
            clones += fan[level]
            await anyio.lowlevel.checkpoint()

    for _ in range(trees):
        await branch(0)
    return clones


def _peak() -> int:
    """The peak of this process's resident memory, KiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def measure(framework: str, program: str) -> dict[str, Any]:
    """One measurement, in this process."""
    trees, fan = PROGRAMS[program]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    wall, cpu = time.perf_counter(), time.process_time()
    clones = anyio.run({"ramet": _ours, "anyio": _bare}[framework], trees, fan)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    held = _peak() - before
    return {
        "framework": framework,
        "program": program,
        "clones": clones,
        "cpu_us_per_clone": cpu / clones * 1e6,
        "wall_seconds": wall,
        "peak_mib": held / 1024,
        "kib_per_clone": held / clones,
    }


def bench_runtime(repeats: int, out: Path | None) -> None:
    """Print and write a record per framework and program: medians over `repeats`, and the ratio of each pair."""
    from ramet.storage import meta, write_json

    records: list[dict[str, Any]] = [meta("bench runtime", 0)]
    shown = Table("program", "framework", "clones", "CPU µs a clone", "seconds", "peak MiB", "KiB a clone", "ratio in CPU")
    for column in shown.columns[2:]:
        column.justify = "right"
    for program in PROGRAMS:
        runs: dict[str, list[dict[str, Any]]] = {"anyio": [], "ramet": []}
        for _ in range(repeats):
            for framework, measured in runs.items():
                command = [sys.executable, "-m", __name__, framework, program]
                done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
                if done.returncode:
                    raise RametError(f"{framework}, {program}: {done.stderr.strip().splitlines()[-1:]}")
                measured.append(json.loads(done.stdout))
        ratios = [r["cpu_us_per_clone"] / b["cpu_us_per_clone"] for r, b in zip(runs["ramet"], runs["anyio"], strict=True)]
        for framework, measured in runs.items():
            record = {"record": "runtime", **measured[0]}
            for name in ("cpu_us_per_clone", "wall_seconds", "peak_mib", "kib_per_clone"):
                record[name] = statistics.median(m[name] for m in measured)
            if framework == "ramet":
                record |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            records.append(record)
            shown.add_row(
                program,
                framework,
                f"{record['clones']:,}",
                f"{record['cpu_us_per_clone']:.0f}",
                f"{record['wall_seconds']:.1f}",
                f"{record['peak_mib']:.0f}",
                f"{record['kib_per_clone']:.1f}",
                f"{record['ratio']:.1f} ({min(ratios):.1f}-{max(ratios):.1f})" if framework == "ramet" else "",
            )
    if out is not None:
        write_json(out, records)
    show(shown)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
