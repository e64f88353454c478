"""A cluster of engines under the virtual clock: where should the requests of a tree go?

The runtime is the real one: trees, ledgers, spawn calls, results. The engines are models of one, the hardware is numbers:

- an engine decodes all its rows together, a token each in `step + rows * row_step` seconds, at most `batch` rows, the others wait;
- before a request decodes, its uncached prompt is read, at `prefill` tokens a second, while the engine's other rows stand still;
- an engine has what it has read or written cached: the question that the trees of a task share, the documents that the clones of a call
  share, the root's own context.

What is compared is how requests are placed (`PLACEMENTS`). Sizes are skewed: clones of a tree and tokens of a branch are drawn from
log-normal distributions, and some engines are slow.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from ramet.agents.budget import Budget
from ramet.agents.protocol import render_call
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.scripted import STOP, PlainFormat
from ramet.agents.simulation import simulate
from ramet.agents.tree import Message, StopReason, Task
from ramet.display import progress
from ramet.display.plots import save, subplots
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

RESULT = 30
"""Tokens of a clone's answer in the root's context."""
PLACEMENTS = ("task", "tree", "spill", "request")
"""Each request to: the engine of its task; that of its tree; that of its tree unless it is crowded; whichever has the fewest rows."""


@dataclass(frozen=True)
class EngineHardware:
    """One engine. The defaults are computed for 4 billion parameters in bfloat16 on a GPU of 3.35 TB/s and 989 TFLOP/s:

    step      seconds to read the weights: 8.04 GB / 3.35 TB/s
    row_step  to read the keys and values of a row of 1,500 tokens: 1,500 * 147,456 B / 3.35 TB/s
    prefill   tokens a second: 0.4 * 989 TFLOP/s / (2 * 4.02 billion)
    batch     rows that decode together
    hop       seconds that a request takes to another engine than its tree's
    """

    step: float = 0.0024
    row_step: float = 0.000066
    prefill: float = 49_200.0
    batch: int = 256
    hop: float = 0.002


@dataclass(frozen=True)
class UpdateLoad:
    """What there is to do in one update.

    trees     of each engine, on average; group: of each task
    clones    median of a tree that spawns; tokens: median of a branch; spread: of the logarithms of both
    question  tokens that the trees of a task share; shared, own: tokens of a clone's prompt that its siblings share, and that they do not
    slow      share of engines that are three times slower
    """

    trees: int = 16
    group: int = 8
    clones: float = 3.0
    tokens: float = 300.0
    spread: float = 0.8
    question: int = 600
    shared: int = 1000
    own: int = 300
    slow: float = 0.01


@dataclass
class SimulatedUpdate:
    """What one simulated update took. `busy` is the share of engine-seconds with a row to decode, until the last tree ends."""

    seconds: float
    busy: float
    latencies: list[float]
    prefilled: int
    cached: int
    generated: int
    requests: int


class SimulatedEngine:
    """Rows that share one machine: each has got as many tokens as any other since both were admitted."""

    def __init__(self, hardware: EngineHardware, factor: float) -> None:
        self.hardware, self.factor = hardware, factor
        self.rows = 0
        self.busy = 0.0
        self._served = self._since = self._stalled = 0.0
        self._active: list[tuple[float, int, asyncio.Future[None]]] = []
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0
        self.known: dict[object, int] = {}
        """Tokens that are cached, by the tree, task or call that they belong to."""

    @property
    def _pace(self) -> float:
        return self.factor * (self.hardware.step + len(self._active) * self.hardware.row_step)

    def _advance(self) -> None:
        """Bring the tokens that every row has got up to now. Time spent reading prompts gives none."""
        now = asyncio.get_running_loop().time()
        passed = now - self._since
        self._since = now
        if self._active:
            self.busy += passed
            stalled = min(passed, self._stalled)
            self._stalled -= stalled
            self._served += (passed - stalled) / self._pace

    async def serve(self, prefill: int, tokens: int) -> None:
        """Read `prefill` tokens and decode `tokens`."""
        self._advance()
        self.rows += 1
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((prefill, tokens, done))
        self._admit()
        await done

    def _admit(self) -> None:
        """Take waiting requests while there is room, and wait for the row that ends first."""
        while self._waiting and len(self._active) < self.hardware.batch:
            prefill, tokens, done = self._waiting.popleft()
            self._stalled += self.factor * prefill / self.hardware.prefill
            self._count += 1
            heapq.heappush(self._active, (self._served + tokens, self._count, done))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._active:
            left = self._stalled + max(self._active[0][0] - self._served, 0.0) * self._pace
            self._timer = asyncio.get_running_loop().call_later(left, self._end)

    def _end(self) -> None:
        self._timer = None
        self._advance()
        while self._active and self._active[0][0] <= self._served + 1e-6:
            self.rows -= 1
            heapq.heappop(self._active)[2].set_result(None)
        self._admit()


@dataclass(frozen=True)
class TreeShape:
    """The size of a tree: tokens of the root's two turns, and of each clone."""

    turns: tuple[int, int]
    clones: tuple[int, ...]


def shape_of(load: UpdateLoad, seed: int, task: int, number: int) -> TreeShape:
    """The tree `number` of a task. The trees of one task resemble one another: half of the spread is the task's."""
    shared, own = random.Random(f"{seed}/{task}"), random.Random(f"{seed}/{task}/{number}")
    half = load.spread / 2**0.5
    lean = shared.gauss(0, half)

    def tokens() -> int:
        return max(1, min(4096, round(load.tokens * float(np.exp(lean + own.gauss(0, half))))))

    count = min(16, round(load.clones * float(np.exp(lean + own.gauss(0, half)))))
    return TreeShape((tokens() // 4 + 1, tokens() // 4 + 1), tuple(tokens() for _ in range(count)))


class SimulatedCluster:
    """A policy: engines, and the placement of requests on them."""

    version = 0
    context: int | None = None

    def __init__(self, engines: int, hardware: EngineHardware, load: UpdateLoad, placement: str, seed: int) -> None:
        rng = random.Random(f"slow/{seed}")
        slow = set(rng.sample(range(engines), round(load.slow * engines)))
        self.engines = [SimulatedEngine(hardware, 3.0 if n in slow else 1.0) for n in range(engines)]
        self.hardware, self.load, self.placement = hardware, load, placement
        self.shapes: dict[str, TreeShape] = {}
        self._homes: dict[str, int] = {}
        self._rows, self._trees = np.zeros(engines), np.zeros(engines)
        self.prefilled = self.cached = self.generated = self.requests = 0

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """The turn that the tree's shape has next, once its engine has served it; see `Policy`."""
        tree, task = request.group, request.group.rpartition("/")[0]
        shape = self.shapes[tree]
        prompt_text = "".join(map(chr, request.prompt))
        root = prompt_text.startswith("T")
        if root:
            second = ">" in prompt_text
            text = "Answer: 1" if second or not shape.clones else render_call([f"{n}" for n in range(len(shape.clones))])
            if not second and shape.clones:
                text = f"<tool_call>{text}</tool_call>"
            tokens, prompt, known = shape.turns[second], self.load.question, self.load.question
            key: object = task
            if second:
                key, known = tree, self.load.question + shape.turns[0]
                prompt = known + RESULT * len(shape.clones)
        else:
            text, tokens = "Answer: 1", shape.clones[int(prompt_text[1 : prompt_text.index("|")])]
            key, known, prompt = (tree, "documents"), self.load.shared, self.load.shared + self.load.own
        place = self._place(task, tree)
        engine = self.engines[place]
        self._rows[place] += 1
        if place != self._homes[tree]:
            await anyio.sleep(self.hardware.hop)
        # A root that comes to another engine may find its task's question there.
        cached = min(max(engine.known.get(key, 0), engine.known.get(task, 0) if root else 0), known)
        # What it reads is there for whoever comes after it, also while it is being read.
        engine.known[key] = known
        try:
            await engine.serve(prompt - cached, tokens)
        finally:
            self._rows[place] -= 1
        if root:
            engine.known[tree] = prompt + tokens
        self.prefilled += prompt - cached
        self.cached += cached
        self.generated += tokens
        self.requests += 1
        ids = (*map(ord, text), STOP)
        return Sample(ids, (-0.5,) * len(ids), StopReason.END)

    def _place(self, task: str, tree: str) -> int:
        if tree not in self._homes:
            whole = task if self.placement == "task" else tree
            # Trees begin together: the fewest trees, not yet rows, say where there is room.
            home = self._homes.setdefault(whole, int(self._trees.argmin()))
            self._homes[tree] = home
            self._trees[home] += 1
        home = self._homes[tree]
        if self.placement == "request" or (self.placement == "spill" and self._rows[home] > 4 + 1.5 * self._rows.mean()):
            return int(self._rows.argmin())
        return home


def simulate_update(engines: int, hardware: EngineHardware, load: UpdateLoad, placement: str, seed: int) -> SimulatedUpdate:
    """One update's trees, all begun at once."""
    cluster = SimulatedCluster(engines, hardware, load, placement, seed)
    latencies: list[float] = []

    async def main() -> float:
        runtime = Runtime(cluster, PlainFormat(), concurrency=10**9, clone_system="")
        jobs = []
        for number in range(engines * load.trees):
            task, n = divmod(number, load.group)
            cluster.shapes[f"t{task}/{number}"] = shape_of(load, seed, task, n)
            jobs.append(Job(Task(f"t{task}", (Message("user", "q"),)), Budget(depth=1), number))
        async with runtime.run_many(jobs, in_flight=len(jobs)) as trees:
            async for _, tree in trees:
                assert tree.answer == "1", tree
                latencies.append(tree.usage.seconds)
        return anyio.current_time()

    seconds = simulate(main, seed, limit=10**9)
    busy = sum(engine.busy for engine in cluster.engines) / (engines * seconds)
    return SimulatedUpdate(seconds, busy, latencies, cluster.prefilled, cluster.cached, cluster.generated, cluster.requests)


def bench_cluster(engines: int, seeds: int, seed: int, png: Path | None, out: Path | None) -> None:
    """`ramet bench cluster`: every placement on the same updates."""
    started = time.perf_counter()
    hardware, load = EngineHardware(), UpdateLoad()
    records, latencies = [], {}
    with progress.measuring("updates", seeds * len(PLACEMENTS)) as report:
        for placement in PLACEMENTS:
            updates = []
            for n in range(seed, seed + seeds):
                updates.append(simulate_update(engines, hardware, load, placement, n))
                report(1)
            latencies[placement] = np.concatenate([o.latencies for o in updates])
            records.append(_record(placement, updates, latencies[placement]))
    title = f"{engines:,} engines, {engines * load.trees:,} trees an update, {seeds} updates; seconds are simulated"
    shown = Table("placement", "update s", "90% done s", "tree p50 s", "tree p99 s", "busy", "prompt cached", title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for r in records:
        shown.add_row(
            r["placement"], f"{r['seconds']:.1f} ({r['seconds_min']:.1f}-{r['seconds_max']:.1f})", f"{r['p90']:.1f}", f"{r['p50']:.1f}",
            f"{r['p99']:.1f}", f"{r['busy']:.0%}", f"{r['cached']:.0%}",
        )  # fmt: skip
    if png is not None:
        _draw(latencies, png)
    if out is not None:
        settings = {"record": "settings", "engines": engines, "seeds": seeds, **asdict(hardware), **asdict(load)}
        write_json(out, [meta("bench cluster", seed, time.perf_counter() - started), settings, *records])
    show(shown)


def _record(placement: str, updates: list[SimulatedUpdate], latencies: Any) -> dict[str, Any]:
    seconds = [o.seconds for o in updates]
    prompts = sum(o.prefilled + o.cached for o in updates)
    quantiles = {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 90, 99)}
    return {
        "record": "placement", "placement": placement, "seconds": float(np.mean(seconds)), "seconds_min": min(seconds),
        "seconds_max": max(seconds), **quantiles, "busy": float(np.mean([o.busy for o in updates])),
        "cached": sum(o.cached for o in updates) / prompts, "requests": sum(o.requests for o in updates),
        "generated": sum(o.generated for o in updates),
    }  # fmt: skip


def _draw(latencies: dict[str, Any], path: Path) -> None:
    figure, axes = subplots(1, 1)
    for placement, values in latencies.items():
        left = 1 - np.arange(1, len(values) + 1) / len(values)
        axes[0][0].plot(np.sort(values)[:-1], left[:-1], label=placement)
    axes[0][0].set(yscale="log", xlabel="simulated seconds", ylabel="share of trees that still grow", title="Where a tree's requests go")
    axes[0][0].legend(frameon=False)
    save(figure, path)
