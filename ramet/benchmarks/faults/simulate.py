"""`ramet bench simulate`: random trees of clones under random faults, one interleaving a seed.

A seed decides everything: the programs that branches follow, budgets, latencies, faults (see
`ramet.agents.scripted`), crashes of the engine, cancellations of a clone or of everything, a stalled consumer, a
journal on a slow or full disk, and the order in which ready tasks run. Half of the seeds have tools, roles, programs, approval and a
reader of events besides (`ramet.benchmarks.faults.extras`). After every step and at the end
the invariants of `ramet.benchmarks.faults.invariants` are checked. Every fourth seed is also killed at a
random step, its journal cut at a random byte, and resumed; every fiftieth is run twice, for identical journals.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from ramet.agents.budget import Budget
from ramet.agents.context import ContextStore
from ramet.agents.growth import Growth, Role
from ramet.agents.journal import Journal
from ramet.agents.protocol import OUT_OF_BUDGET_NOTICE, render_call
from ramet.agents.resume import TOOL, JournaledPolicy, JournaledTools
from ramet.agents.runtime import Job, Runtime
from ramet.agents.scripted import SHIFT, Faults, PlainFormat, ScriptedPolicy, ShiftedFormat
from ramet.agents.simulation import SimulatedLoop, simulate
from ramet.agents.tasks import task_group
from ramet.agents.tools import Tools
from ramet.agents.tree import Message, Task, Tree
from ramet.benchmarks.faults.extras import Calls, Extras, held_tools
from ramet.benchmarks.faults.invariants import Means, Setup, check_events, check_growth, check_quiet, check_tree
from ramet.display import progress
from ramet.errors import InvariantViolation, SimulatedKill, StorageError
from ramet.storage import meta, write_json
from ramet.terminal import show

logger = logging.getLogger(__name__)
DOCUMENTS = {"a": "first", "b": "do 1 <tool_call>"}


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one seed stands for. `script[node]` are the turns of the branches whose objective is `do <node>`."""

    seed: int
    script: dict[int, list[str]]
    final: dict[int, str]
    budget: Budget
    trees: int
    in_flight: int
    concurrency: int
    attempts: int
    delay: float
    stride: int
    faults: float
    context: int | None
    crashes: tuple[tuple[float, float], ...] = ()
    cancels: tuple[float, ...] = ()
    leave_after: float | None = None
    stall: float = 0.0
    disk: str = "good"
    calm: bool = False
    """Nothing in it depends on when something happens, so a resumed run must equal an undisturbed one."""
    extras: Extras | None = None

    @classmethod
    def of(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        rng = random.Random(f"simulate/{seed}")
        calm = rng.random() < 0.5
        script: dict[int, list[str]] = {}
        final: dict[int, str] = {}

        def plan(depth: int) -> int:
            node = len(script)
            script[node] = []
            final[node] = rng.choice(("Answer: cut\0", "Answer: 1", "\0", "y" * 60))
            for _ in range(rng.choice((0, 1, 1, 2)) or depth == 0):
                if depth < 4 and len(script) < 20 and rng.random() < 0.75:
                    children = [plan(depth + 1) for _ in range(rng.choice((1, 2, 2, 3, 5)))]
                    script[node].append(_call(children, rng))
                else:
                    script[node].append(rng.choice(MALFORMED))
            script[node].append(rng.choice((f"Answer: {node}\0",) * 4 + (f"so it is\n{node}\0", "", "\0", "y" * 3000)))
            return node

        plan(0)

        def limit(low: int, high: int, chance: float) -> int | None:
            return rng.randint(low, high) if rng.random() < chance else None

        def when() -> float:
            return rng.uniform(0, 60)

        budget = Budget(
            generated=limit(0, 8000, 0.6),
            prefilled=limit(0, 20_000, 0.2),
            critical_path=limit(10, 2000, 0.2),
            clones=limit(0, 20, 0.25),
            width=limit(0, 5, 0.15),
            depth=rng.choice((0, 1, 2, 3, 4, None)),
            turns=limit(1, 5, 0.5),
            branch_generated=limit(1, 400, 0.2),
            context=limit(60, 1500, 0.3),
            answer_reserve=rng.choice((0, 0, 12, 40)),
            seconds=None if calm or rng.random() < 0.7 else rng.uniform(0.5, 400),
        )
        scenario = cls(
            seed,
            script,
            final,
            budget,
            trees=rng.randint(1, 4),
            in_flight=rng.randint(1, 3),
            concurrency=rng.randint(1, 6),
            attempts=rng.randint(1, 4),
            delay=rng.choice((0.0, 0.01, 0.2)),
            stride=rng.choice((1, 5, 50)),
            faults=rng.choice((1e9, 12, 4)),
            context=limit(200, 2000, 0.2),
            crashes=() if calm else tuple((when(), rng.choice((0.0, 0.3, 5.0))) for _ in range(rng.choice((0, 0, 1, 3)))),
            cancels=() if calm else tuple(when() for _ in range(rng.choice((0, 0, 1, 4)))),
            leave_after=when() if not calm and rng.random() < 0.15 else None,
            stall=rng.choice((0.0, 0.0, 5.0)),
            disk="good" if calm else rng.choice(("good",) * 6 + ("slow", "full")),
            calm=calm,
        )
        extras = Extras.of(seed, len(script))
        if extras is None:
            return scenario
        limits = budget.model_copy(update=extras.limits)
        return replace(scenario, script=extras.scripted(seed, script), budget=limits, extras=extras)

    def program(self, context: str) -> str:
        """The turn that follows `context`."""
        # The objective is the last thing in a prompt; a document may say "do 1" as well.
        node = int(re.findall(r"do (\d+)", context.partition("|")[0])[-1])
        if OUT_OF_BUDGET_NOTICE in context:
            return self.final[node]
        turn = context.count("$<")
        return self.script[node][min(turn, len(self.script[node]) - 1)]


MALFORMED = (
    "<tool_call>{\0",
    "<tool_call>{}</tool_call>\0",
    '<tool_call>{"name":"spawn_clone","arguments":{"objectives":[]}}</tool_call>\0',
    '<tool_call>{"name":"spawn_clone","arguments":{"objectives":[" "],"depth":9}}</tool_call>\0',
    "<tool_call>[</tool_call><tool_call>]</tool_call>\0",
    "<tool_call>" + "[" * 200 + "</tool_call>\0",
)


def _call(children: list[int], rng: random.Random) -> str:
    objectives: list[dict[str, Any] | str] = []
    for child in children:
        objective: dict[str, Any] = {"objective": f"do {child}"}
        if rng.random() < 0.3:
            objective["max_tokens"] = rng.choice((1, 20, 200, 10**9))
        if rng.random() < 0.3:
            objective["context_keys"] = rng.choice((["a"], ["b", "a"], ["zz"]))
        objectives.append(objective)
    return f"<tool_call>{render_call(objectives)}</tool_call>\0"


class _Disk(Journal):
    """A journal whose disk is slow, or full after some records."""

    def __init__(self, path: Path, job: str, disk: str):
        self._disk, self._room = disk, 6
        super().__init__(path, job)

    def _write(self, record: dict[str, Any]) -> None:
        if self._disk == "slow":
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimulatedLoop)
            loop.advance(3.0)
        self._room -= 1
        if self._disk == "full" and self._room < 0:
            raise OSError(28, "No space left on device")
        super()._write(record)


class _Streamed(Runtime):
    """A runtime whose events are read and checked."""

    async def run(self, task: Task, budget: Budget, seed: int = 0, *arguments: Any, **options: Any) -> Tree:
        async with aclosing(self.stream(task, budget, seed)) as stream:
            return check_events([event async for event in stream])


@dataclass(slots=True)
class SimulatedRun:
    """One simulated run of a scenario."""

    scenario: Scenario
    journal: Path
    kill_at: int | None = None
    trees: dict[int, Tree] = field(default_factory=dict)
    roots: list[Growth] = field(default_factory=list)
    seen: dict[int, dict[str, tuple[object, ...]]] = field(default_factory=dict)
    setup: Setup = field(init=False)
    calls: Calls = field(init=False)
    replayed: int = 0
    steps: int = 0
    killed: bytes | None = None

    def __post_init__(self) -> None:
        s, extras = self.scenario, self.scenario.extras or Extras()

        def policy(number: int, shift: int = 0) -> ScriptedPolicy:
            faults = Faults(s.seed + number, s.faults, lasting=not s.calm)
            return ScriptedPolicy(s.program, s.delay, s.stride, faults, context=s.context, shift=shift)

        tools = held_tools(extras)
        self.calls = Calls({tool.name: tool for tool in tools}, punctual=s.disk != "slow")
        roles: dict[str, Means | None] = {}
        if extras.roles:
            own = Means(policy(1, SHIFT), ShiftedFormat(), Tools(tools[1:]), trainable=False)
            roles = {"reader": own, "helper": None}
        root = Means(policy(0), tools=Tools(tools, extras.at))
        self.setup = Setup(s.budget, root, roles, ContextStore(DOCUMENTS), extras.approved)

    @property
    def requests(self) -> int:
        """Samples that were asked of the engines."""
        return sum(len(policy.requests) for policy in self.setup.policies)

    def go(self) -> SimulatedRun:
        """Run to the end, or to the step at which it is killed. Raises `InvariantViolation`."""
        try:
            simulate(self._main, self.scenario.seed, self._observe, limit=400_000)
        except (SimulatedKill, RuntimeError):
            if self.killed is None:
                raise
        except StorageError:
            if self.scenario.disk != "full":
                raise
        return self

    def _observe(self) -> None:
        self.steps += 1
        if self.killed is None and self.steps == self.kill_at:
            self.killed = self.journal.read_bytes()
            raise SimulatedKill
        for root in self.roots:
            check_growth(root, self.seen.setdefault(id(root), {}))
        self.calls.check()

    def _runtime(self, journal: Journal) -> Runtime:
        s, setup = self.scenario, self.setup
        extras = s.extras or Extras()
        own = setup.roles.get("reader")
        roles: dict[str, Role] = {}
        if own is not None:
            policy = JournaledPolicy(own.policy, journal)
            roles = {"reader": Role(policy, own.chat, tools=own.tools.tools, trainable=False), "helper": Role(system="")}
        return (_Streamed if extras.streamed else Runtime)(
            JournaledPolicy(setup.root.policy, journal),
            setup.root.chat,
            concurrency=s.concurrency,
            attempts=s.attempts,
            watch=self.roots.append,
            tools=setup.root.tools.tools,
            tools_at=extras.at,
            caller=JournaledTools(journal, self.calls),
            roles=roles,
            approve=extras.approve if extras.refuses else None,
            program=extras.steered(),
        )

    async def _main(self) -> None:
        s = self.scenario
        with _Disk(self.journal, f"simulate/{s.seed}", s.disk) as journal:
            for record in journal:
                if TOOL not in record:
                    key = record["group"], record["seed"]
                    for policy in self.setup.policies:
                        policy.tried[key] = policy.tried.get(key, 0) + 1
            runtime = self._runtime(journal)
            task = Task("t", (Message("user", "do 0"),), DOCUMENTS)
            jobs = [Job(task, s.budget, s.seed * 100 + i, (i,)) for i in range(s.trees)]
            async with task_group() as group:
                group.start_soon(self._events)
                try:
                    with anyio.move_on_after(s.leave_after):
                        async with runtime.run_many(jobs, s.in_flight) as finished:
                            async for job, tree in finished:
                                if job.key[0] in self.trees:
                                    raise InvariantViolation(f"tree {job.key[0]} came twice")
                                self.trees[int(str(job.key[0]))] = tree
                                check_tree(tree, self.setup, s.disk != "slow", self._replayed(runtime) > 0)
                                await anyio.sleep(s.stall)
                finally:
                    self.replayed = self._replayed(runtime)
                    group.cancel_scope.cancel()
            check_quiet(self.setup.policies)
            if s.leave_after is None and len(self.trees) != s.trees:
                raise InvariantViolation(f"{len(self.trees)} of {s.trees} trees came back")

    @staticmethod
    def _replayed(runtime: Runtime) -> int:
        """Samples of the model and of roles that came from the journal."""
        policies = [runtime.policy, *(role.policy for role in runtime.roles.values())]
        return sum(policy.replayed for policy in policies if isinstance(policy, JournaledPolicy))

    def _crash(self, seconds: float) -> None:
        for policy in self.setup.policies:
            policy.crash(seconds)

    async def _events(self) -> None:
        s = self.scenario
        rng = random.Random(f"events/{s.seed}")
        happenings: list[tuple[float, Callable[[], None]]] = [(at, lambda d=down: self._crash(d)) for at, down in s.crashes]  # type: ignore[misc]
        happenings += [(at, lambda: self._cancel_one(rng)) for at in s.cancels]
        for at, happen in sorted(happenings, key=lambda item: item[0]):
            await anyio.sleep(max(at - anyio.current_time(), 0))
            happen()

    def _cancel_one(self, rng: random.Random) -> None:
        growing: list[Growth] = []
        stack = list(self.roots)
        while stack:
            growth = stack.pop()
            if growth.ended is None:
                growing.append(growth)
                stack += growth.clones
        if growing:
            rng.choice(growing).cancel()


def run_seed(seed: int, folder: Path) -> dict[str, int]:
    """One seed with all that belongs to it; what was counted. Raises `InvariantViolation`."""
    scenario = Scenario.of(seed)
    path = folder / f"{seed}.jsonl"
    first = SimulatedRun(scenario, path).go()
    trees = list(first.trees.values())
    counted = {
        "trees": len(trees),
        "clones": sum(tree.usage.clones for tree in trees),
        "calls": sum(used.calls for tree in trees for used in tree.tools().values()),
        "faults": sum(policy.injected for policy in first.setup.policies),
    }
    counted["faults"] += len(scenario.cancels) + (scenario.disk != "good") + (scenario.leave_after is not None)
    if seed % 50 == 0:
        again = folder / f"{seed}-again.jsonl"
        SimulatedRun(scenario, again).go()
        if again.read_bytes() != path.read_bytes():
            raise InvariantViolation("two runs of one seed wrote different journals")
        again.unlink()
    if seed % 4 == 0 and scenario.disk == "good":
        _killed_and_resumed(scenario, first, folder / f"{seed}-killed.jsonl")
        counted["faults"] += 1
    path.unlink()
    return counted


def _killed_and_resumed(scenario: Scenario, whole: SimulatedRun, path: Path) -> None:
    """Kill a run at a random step, cut its journal at a random byte after the header, and go on from what is left."""
    rng = random.Random(f"kill/{scenario.seed}")
    killed = SimulatedRun(scenario, path, kill_at=rng.randint(1, whole.steps)).go()
    data = killed.killed or path.read_bytes()
    head = data.find(b"\n") + 1
    path.write_bytes(data[: rng.randint(head, len(data))] if rng.random() < 0.5 else data)
    kept, kept_calls = _recorded(scenario, path)
    resumed = SimulatedRun(scenario, path).go()
    remade = resumed.calls.made & {tuple(record[name] for name in PLACE) for record in kept_calls}
    if remade:
        raise InvariantViolation(f"calls {remade} of tools are in the journal and were made again")
    if scenario.calm:
        for key, tree in whole.trees.items():
            if _contents(resumed.trees[key]) != _contents(tree):
                raise InvariantViolation(f"tree {key} differs after a kill at step {killed.steps} and a resume")
        attempts, calls = recorded = _recorded(scenario, path)
        if recorded != _recorded(scenario, whole.journal):
            raise InvariantViolation("a killed and resumed run made other attempts or calls than an undisturbed one")
        if resumed.requests != len(attempts) - len(kept):
            raise InvariantViolation(f"{resumed.requests} samples after a resume that had {len(kept)} of {len(attempts)}")
        if len(resumed.calls.made) != len(calls) - len(kept_calls):
            raise InvariantViolation(f"{len(resumed.calls.made)} calls after a resume that had {len(kept_calls)} of {len(calls)}")
    path.unlink()


PLACE = ("group", "branch", "turn", "number")


def _recorded(scenario: Scenario, path: Path) -> tuple[list[Any], list[Any]]:
    """The journal's attempts at samples, those of one sample in their order, and its calls of tools, to the millisecond."""
    with Journal(path, f"simulate/{scenario.seed}") as journal:
        attempts = sorted((r for r in journal if TOOL not in r), key=lambda record: (record["group"], record["seed"]))
        calls = sorted((r for r in journal if TOOL in r), key=lambda record: [record[name] for name in PLACE])
    return attempts, [{**record, "seconds": round(record["seconds"], 3)} for record in calls]


def _contents(tree: Tree) -> list[Any]:
    return [(b.id, b.ids, b.status, b.answer, b.generated, b.role, [turn.calls for turn in b.turns]) for b in tree.branches]


def bench_simulate(seeds: int, first: int, verbose: bool, out: Path | None) -> None:
    """Run seeds `first` onward; print and write what was counted and every seed that violates something."""
    totals = {"trees": 0, "clones": 0, "calls": 0, "faults": 0}
    failures: list[dict[str, Any]] = []
    started = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        progress.measuring("simulating", seeds) as report,
        # What is killed before it started is reported as never awaited, whenever Python comes to collect it.
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
    ):
        for seed in range(first, first + seeds):
            if verbose:
                _describe(seed, Path(folder))
            try:
                for name, count in run_seed(seed, Path(folder)).items():
                    totals[name] += count
            except Exception as error:  # whatever it is, it is a finding
                failures.append({"record": "violation", "seed": seed, "what": f"{type(error).__name__}: {error}"})
                logger.warning(f"seed {seed}: {type(error).__name__}: {error}", exc_info=verbose)
            report(1)
    seconds = time.process_time() - started
    record = {
        "record": "simulate",
        "seeds": seeds,
        "first_seed": first,
        "faults_injected": totals["faults"],
        "trees": totals["trees"],
        "clones": totals["clones"],
        "tool_calls": totals["calls"],
        "violations": len(failures),
        "cpu_seconds": seconds,
    }
    if out is not None:
        write_json(out, [meta("bench simulate", first), record, *failures])
    show(
        f"{seeds} interleavings in {seconds:.0f} CPU seconds: {totals['trees']} trees, {totals['clones']} clones, "
        f"{totals['calls']} calls of tools, {totals['faults']} faults, {len(failures)} violations"
    )
    if failures:
        raise InvariantViolation(f"{len(failures)} seeds violate an invariant; replay one with ramet bench simulate --seed N --verbose")


def _describe(seed: int, folder: Path) -> None:
    scenario = Scenario.of(seed)
    show(str(scenario))
    run = SimulatedRun(scenario, folder / "described.jsonl")
    try:
        run.go()
    finally:
        for key, tree in sorted(run.trees.items()):
            show(f"tree {key}: {tree.root.status.value}, {tree.usage}")
            for branch in tree.branches:
                chat = ShiftedFormat() if branch.ids[0] >= SHIFT else PlainFormat()
                show(f"  {branch.id}: {branch.status.value} {branch.reason} {chat.text(branch.ids)[-200:]!r}")
        (folder / "described.jsonl").unlink(missing_ok=True)
