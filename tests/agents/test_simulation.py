"""The simulated loop, faults, and what random runs of the runtime must obey."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
import pytest

from ramet.agents import actor, dispatch, program, resume, tools
from ramet.agents.budget import Budget, CallGrant, Ledger
from ramet.agents.growth import Growth, Setting
from ramet.agents.journal import Journal
from ramet.agents.protocol import render_call
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.scripted import Fault, Faults, PlainFormat, ScriptedPolicy
from ramet.agents.simulation import PATIENCE, simulate
from ramet.agents.tasks import Slots
from ramet.agents.tools import Tools, budget, call_tool
from ramet.agents.tree import Branch, Message, Status, StopReason, Task, Tree, Turn
from ramet.benchmarks.faults import extras
from ramet.benchmarks.faults.invariants import check_growth
from ramet.benchmarks.faults.simulate import Scenario, SimulatedRun, run_seed
from ramet.errors import BudgetExhausted, InvariantViolation, LedgerError, PolicyError, RametError, SimulationError, TransientPolicyError


async def order() -> list[tuple[int, int, float]]:
    seen = []

    async def worker(number: int) -> None:
        for step in range(3):
            await anyio.sleep(number * 10 if step == 1 else 0)
            seen.append((number, step, anyio.current_time()))

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(worker, number)
    return seen


def test_one_seed_is_one_interleaving_and_seeds_differ():
    runs = [simulate(order, seed) for seed in range(40)]
    assert all(simulate(order, seed) == runs[seed] for seed in range(40))
    assert len({tuple(run) for run in runs}) > 20


def test_time_is_virtual_and_in_order():
    async def hour() -> tuple[float, bool]:
        with anyio.move_on_after(3600) as scope:
            await anyio.sleep(1e9)
        return anyio.current_time(), scope.cancelled_caught

    assert simulate(hour, 0) == (3600.0, True)
    times = [time for _, _, time in simulate(order, 5)]
    assert times == sorted(times) and times[-1] == 30.0


def test_a_deadlock_and_an_endless_loop_are_errors():
    async def still() -> None:
        await anyio.Event().wait()

    async def endless() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    with pytest.raises(SimulationError, match="deadlock"):
        simulate(still, 0)
    with pytest.raises(SimulationError, match="no end after 500"):
        simulate(endless, 0, limit=500)


def test_whoever_waits_gets_a_turn():
    """A task is overtaken by at most `PATIENCE` others, however busily they run."""

    async def starved() -> int:
        waited = 0
        ran = False

        async def patient() -> None:
            nonlocal ran
            ran = True

        async with anyio.create_task_group() as group:
            group.start_soon(patient)
            while not ran:
                await anyio.lowlevel.cancel_shielded_checkpoint()
                waited += 1
        return waited

    waits = [simulate(starved, seed, limit=5000) for seed in range(300)]
    assert max(waits) <= PATIENCE
    assert min(waits) < 5 < max(waits)


@pytest.mark.parametrize("seed", range(200))
def test_slots_are_never_lost_and_never_doubled(seed):
    """Random holders, some cancelled while they wait, some while they hold, and some just as they are handed one."""
    rng = random.Random(seed)
    count = rng.randint(1, 3)
    holding = most = served = 0

    async def main() -> None:
        nonlocal holding, most, served
        slots = Slots(count)

        async def holder(patience: float, hold: float) -> None:
            nonlocal holding, most, served
            with anyio.move_on_after(patience):
                await slots.acquire()
                holding += 1
                most = max(most, holding)
                try:
                    await anyio.sleep(hold)
                    served += 1
                finally:
                    holding -= 1
                    slots.release()

        async with anyio.create_task_group() as group:
            for _ in range(12):
                group.start_soon(holder, rng.choice((0, 1, 2, 3, 1e9)), rng.choice((0, 1, 2)))
        for _ in range(count):  # all are free again
            with anyio.fail_after(1):
                await slots.acquire()
        assert not slots._waiting

    simulate(main, seed)
    assert holding == 0 and most <= count and served


def test_a_chain_of_clones_is_checked_at_every_step_and_cut_by_its_deadline():
    """300 deep; cut when the last clone has begun to answer."""
    depth, roots, totals = 300, [], []
    seen: dict[str, tuple[object, ...]] = {}

    def program(context: str) -> str:
        number = int(context.split()[1].split("|")[0])
        if "<" in context or number == depth:
            return "Answer: 1\0"
        return f"<tool_call>{render_call([f'go {number + 1}'])}</tool_call>\0"

    async def main() -> Tree:
        before = sum(len(program(f"go {number}")) for number in range(depth))
        runtime = Runtime(ScriptedPolicy(program, 1.0, stride=5), PlainFormat(), clone_system="", watch=roots.append)
        task = Task("t", (Message("user", "go 0"),))
        return await runtime.run(task, Budget(depth=None, seconds=before + 7.5))

    def observe() -> None:
        for root in roots:
            check_growth(root, seen)
        totals.append(roots[0].ledger.total("generated") if roots and len(totals) % 1000 == 0 else 0)

    tree = simulate(main, 0, observe)
    assert len(tree.branches) == depth + 1 and max(totals) > 0
    assert tree.root.status is Status.TIMED_OUT
    assert tree.usage.generated == sum(branch.generated for branch in tree.branches)
    assert len(tree.branches[-1].turns[0].sampled) == 5


def _nested(depth: int) -> Callable[[str], str]:
    """A program whose branches send one clone each, down to `depth` levels if they may."""

    def program(context: str) -> str:
        number = int(context.split()[1].split("|")[0])
        if "<" in context or number == depth or context.startswith("-"):
            return f"Answer: {number}\0"
        return f"<tool_call>{render_call([f'go {number + 1}'])}</tool_call>\0"

    return program


@pytest.mark.parametrize("tools", [[], [budget]])
def test_a_chain_far_deeper_than_python_recurses_is_cut_by_its_deadline(tools):
    """Every level nests several cancel scopes, and all of them are cancelled."""
    program = _nested(640)

    async def main() -> Tree:
        before = sum(len(program(f"Tgo {number}")) for number in range(640))
        runtime = Runtime(ScriptedPolicy(program, 1.0, stride=50), PlainFormat(), clone_system="", tools=tools, watch=lambda root: None)
        return await runtime.run(Task("t", (Message("user", "go 0"),)), Budget(depth=None, seconds=before + 7.5))

    tree = simulate(main, 0)
    assert len(tree.branches) == 641 and tree.root.status is Status.TIMED_OUT
    assert {branch.status for branch in tree.branches[1:]} == {Status.CANCELLED}


@pytest.mark.anyio
async def test_levels_are_limited_where_a_budget_does_not_limit_them(monkeypatch):
    monkeypatch.setattr("ramet.agents.growth.MAX_LEVELS", 5)
    runtime = Runtime(ScriptedPolicy(_nested(9)), PlainFormat(), clone_system="")
    for depth, levels in ((None, 5), (9, 5), (3, 3)):
        tree = await runtime.run(Task("t", (Message("user", "go 0"),)), Budget(depth=depth))
        assert (len(tree.branches), tree.branches[-1].answer) == (levels + 1, str(levels))


def test_what_the_observer_raises_comes_out():
    def observe() -> None:
        raise InvariantViolation("no")

    with pytest.raises(InvariantViolation, match="no"):
        simulate(order, 0, observe)


# What a kill stops before it started is reported as never awaited.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_runs_hold(first, tmp_path):
    counted = [run_seed(seed, tmp_path) for seed in range(first, first + 100)]
    assert sum(c["clones"] for c in counted) > 200 and sum(c["faults"] for c in counted) > 100


def test_a_stream_that_is_cancelled_from_outside_does_not_end_like_a_whole_one(tmp_path):
    """The one of 10,000 seeds in which the end of the events came before the cancellation."""
    scenario = Scenario.of(8472)
    assert scenario.extras is not None and scenario.extras.streamed and scenario.leave_after is not None
    SimulatedRun(scenario, tmp_path / "journal.jsonl").go()


def test_scenarios_are_many_sided(tmp_path):
    statuses: set[Status] = set()
    kinds = {"crashes": 0, "cancels": 0, "leaves": 0, "full": 0, "slow": 0}
    for seed in range(300):
        scenario = Scenario.of(seed)
        kinds["crashes"] += bool(scenario.crashes)
        kinds["cancels"] += bool(scenario.cancels)
        kinds["leaves"] += scenario.leave_after is not None
        kinds[scenario.disk] = kinds.get(scenario.disk, 0) + 1
    assert min(kinds.values()) >= 5
    for seed in range(60):
        run = SimulatedRun(Scenario.of(seed), tmp_path / f"{seed}.jsonl")
        run.go()
        statuses |= {branch.status for tree in run.trees.values() for branch in tree.branches}
    assert {Status.ANSWERED, Status.EMPTY, Status.OUT_OF_BUDGET, Status.FAILED, Status.CANCELLED} <= statuses


def _spend_without_refund(self, held, used):
    for currency in held:
        self._spent[currency] += used.get(currency, 0)


def _lose_what_clones_spent(self, held, used):
    for currency, amount in held.items():
        self._held[currency] -= amount
        self._spent[currency] += 0 if "clones" in held else used.get(currency, 0)


def _hold_anything_where_the_limit_is_zero(self, wanted):
    for currency, amount in wanted.items():
        if self._limit[currency] and amount > self.left(currency):
            raise BudgetExhausted(currency, amount, self.left(currency))
        self._held[currency] += amount


BUGS: dict[str, dict[str, Any]] = {
    "a refund that is forgotten": {"_settle": _spend_without_refund},
    "a clone's spending that is lost": {"_settle": _lose_what_clones_spent},
    "a reservation that is not made": {"_hold": lambda self, wanted: None},
    "zero read as unlimited": {
        "_hold": _hold_anything_where_the_limit_is_zero,
        "sampleable": lambda self, final=False: (self.left("generated") or None) if self._limit["generated"] else None,
    },
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug, tmp_path, monkeypatch):
    for name, broken in BUGS[bug].items():
        monkeypatch.setattr(Ledger, name, broken)
    failures = 0
    for seed in range(40):
        try:
            run_seed(seed, tmp_path)
        except RametError:
            failures += 1
    assert failures


def _spend_all_of_the_time(self, seconds):
    self._close(self._held)
    return seconds


def _settle_twice_the_cost(self, seconds):
    used = {**self._held, "tool_calls": 2 * self._held["tool_calls"]}
    self._close(used)
    return seconds


async def _unlimited(tool, request, view, timeout):
    return await call_tool(tool, request, view, 10 * tool.timeout)


async def _answer_backwards(setting, growth, calls, run, run_calls=dispatch.run_calls):
    made = await run_calls(setting, growth, calls, run)
    return replace(made, replies=made.replies[::-1])


async def _all_at_once(setting, growth, uses, replies, spawned, beside=dispatch._beside):
    tools = [replace(tool, parallel=True) for tool in setting.tools.tools]
    await beside(replace(setting, tools=Tools(tools, setting.tools.at)), growth, uses, replies, spawned)


async def _asked_and_ignored(setting, growth, call, disapproved=dispatch._disapproved):
    await disapproved(setting, growth, call)
    return ""


async def _approved_by_an_error(setting, growth, call, disapproved=dispatch._disapproved):
    why = await disapproved(setting, growth, call)
    return "" if "raised" in why else why


async def _whole(tool, text, view, result=tools._result):
    return await result(replace(tool, max_characters=10**9), text, view)


def _mask(branch, trained):
    mask = [False] * len(branch.prompt)
    for turn in branch.turns:
        sampled, appended = trained(turn)
        mask += [sampled] * len(turn.sampled) + [appended] * len(turn.appended)
    return mask


def _kept_before_the_newest(self, call):
    self.turns[-1] = replace(self.turns[-1], calls=(call, *self.turns[-1].calls))


MORE_BUGS: dict[str, list[tuple[Any, str, Any]]] = {
    "a call that is not on record": [(Growth, "record", lambda self, call: None)],
    "calls on record in the order in which they end": [(Growth, "record", _kept_before_the_newest)],
    "a call that is charged the longest that it may take": [(CallGrant, "settle_call", _spend_all_of_the_time)],
    "a call that is charged twice": [(CallGrant, "settle_call", _settle_twice_the_cost)],
    "a call that is not charged": [(CallGrant, "settle_call", lambda self, seconds: self._close({}) or seconds)],
    "calls that reserve nothing": [(Ledger, "reserve_call", lambda self, calls, ms, reserve=Ledger.reserve_call: reserve(self, 0, ms))],
    "a call that may take as long as it likes": [(extras, "call_tool", _unlimited)],
    "replies out of order": [(dispatch, "run_calls", _answer_backwards)],
    "recorded calls that are made again": [(resume, "_place", lambda record: object())],
    "tools side by side that must not be": [(dispatch, "_beside", _all_at_once)],
    "an objection that is ignored": [(dispatch, "_disapproved", _asked_and_ignored)],
    "an error that is taken for approval": [(dispatch, "_disapproved", _approved_by_an_error)],
    "results of any length": [(tools, "_result", _whole)],
    "tools held where they should not be": [(Tools, "held", lambda self, depth: self.named)],
    "a role that keeps its parent's tools": [(Setting, "of", lambda self, name, of=Setting.of: replace(of(self, name), tools=self.tools))],
    "a role that the model itself plays": [(Setting, "of", lambda self, name: replace(self, role=name))],
    "a role that is trained": [(Setting, "of", lambda self, name, of=Setting.of: replace(of(self, name), trainable=True))],
    "a role that is forgotten": [(Setting, "of", lambda self, name: self)],
    "what a program writes is trained": [(Branch, "mask", property(lambda self: _mask(self, lambda turn: (True, False))))],
    "what tools return is trained": [(Branch, "mask", property(lambda self: _mask(self, lambda turn: (not turn.written, True))))],
    "what a program writes is free": [(program, "Turn", lambda *a, **k: Turn(*a, **{**k, "free": len(a[0]) or k.get("free", 0)}))],
    "an end that nobody is told of": [(actor, "_tell_ended", lambda setting, growth: None)],
    "a beginning that nobody is told of": [(actor, "_tell_started", lambda setting, growth: None)],
}


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("bug", MORE_BUGS)
def test_bugs_planted_in_tools_roles_programs_and_events_are_found(bug, tmp_path, monkeypatch):
    for place, name, broken in MORE_BUGS[bug]:
        monkeypatch.setattr(place, name, broken)
    with pytest.raises((InvariantViolation, LedgerError)):
        for seed in range(0, 600, 4 if "again" in bug else 1):
            scenario = Scenario.of(seed)
            drawn = scenario.extras
            if drawn is None or (not drawn.roles and "role" in bug) or (not drawn.tools and "tool" in bug):
                continue
            if "again" in bug:
                run_seed(seed, tmp_path)
            else:
                SimulatedRun(scenario, tmp_path / f"{seed}.jsonl").go()


def spawning(context: str) -> str:
    if context.startswith("T") and "1: " not in context:
        return f"<tool_call>{render_call(['a', 'b'])}</tool_call>\0"
    return "Answer: ok\0" if context.startswith("T") else "y" * 500


@pytest.mark.anyio
async def test_one_clone_can_be_cancelled_and_its_parent_goes_on():
    roots: list[Growth] = []
    runtime = Runtime(ScriptedPolicy(spawning, delay=0.001), PlainFormat(), watch=roots.append)
    trees = []

    async def grow() -> None:
        trees.append(await runtime.run(Task("t", (Message("user", "go"),)), Budget(branch_generated=400)))

    async with anyio.create_task_group() as group:
        group.start_soon(grow)
        while not (roots and roots[0].clones and roots[0].clones[0].started):
            await anyio.sleep(0.001)
        roots[0].clones[0].cancel()
    clones = trees[0].root.clones
    assert [c.status for c in clones] == [Status.CANCELLED, Status.OUT_OF_BUDGET] and trees[0].answer == "ok"
    assert clones[0].generated < 400 and clones[0].turns[-1].stop is StopReason.CANCELLED
    assert "1: (cancelled)\n2: (out of budget" in PlainFormat().text(trees[0].root.ids)


@pytest.mark.anyio
async def test_samples_in_the_journal_are_not_sampled_again(tmp_path):
    def flaky(request: SampleRequest, attempt: int) -> Fault | None:
        return Fault(3, error=TransientPolicyError("reset", 0.0)) if attempt == 0 else None

    async def grow(policy: ScriptedPolicy) -> tuple[Any, JournaledPolicy]:
        with Journal(tmp_path / "samples.jsonl", "job") as journal:
            journaled = JournaledPolicy(policy, journal)
            return await Runtime(journaled, PlainFormat()).run(Task("t", (Message("user", "go"),)), Budget(generated=900), 5), journaled

    whole, _ = await grow(ScriptedPolicy(spawning, faults=flaky))
    policy = ScriptedPolicy(spawning, faults=flaky)
    again, journaled = await grow(policy)
    assert not policy.requests and journaled.sampled == 0 and journaled.replayed == 2 * len([t for b in whole.branches for t in b.turns])
    assert [(b.ids, b.logprobs, b.generated, b.status) for b in again.branches] == [
        (b.ids, b.logprobs, b.generated, b.status) for b in whole.branches
    ]
    assert again.usage.generated == whole.usage.generated and again.usage.prefilled == whole.usage.prefilled


@pytest.mark.anyio
async def test_a_record_of_another_prompt_is_not_used(tmp_path):
    def request(prompt: str) -> SampleRequest:
        return SampleRequest(tuple(map(ord, prompt)), 50, frozenset({0}), 7, group="g")

    with Journal(tmp_path / "j", "job") as journal:
        await JournaledPolicy(ScriptedPolicy(lambda c: f"was {c}\0"), journal).sample(request("one"), Partial())
    with Journal(tmp_path / "j", "job") as journal:
        policy = JournaledPolicy(ScriptedPolicy(lambda c: f"is {c}\0"), journal)
        sample = await policy.sample(request("two"), Partial())
    assert "".join(map(chr, sample.ids)) == "is two\0" and (policy.replayed, policy.sampled) == (0, 1)


@pytest.mark.anyio
async def test_a_lasting_failure_is_replayed_with_its_cost(tmp_path):
    request = SampleRequest((65,), 50, frozenset({0}), 7, group="g")
    for _ in range(2):
        partial = Partial()
        with Journal(tmp_path / "j", "job") as journal:
            policy = JournaledPolicy(ScriptedPolicy(lambda c: "yyyyyyyy\0", faults=lambda *_: Fault(4, error=PolicyError("gone"))), journal)
            with pytest.raises(PolicyError, match="gone"):
                await policy.sample(request, partial)
        assert len(partial.ids) == 4 and partial.prefilled == 1
    assert policy.replayed == 1


@pytest.mark.anyio
async def test_a_record_that_does_not_match_hides_none_that_does(tmp_path):
    """Four runs; in the second another prompt is asked for, as after a clone that had failed."""
    made = []
    for prompt in ((1, 2), (1, 3), (1, 3), (1, 2)):
        with Journal(tmp_path / "j", "job") as journal:
            policy = JournaledPolicy(ScriptedPolicy(lambda _: "ok\0"), journal)
            await policy.sample(SampleRequest(prompt, 8, frozenset({0}), 5, group="g"), Partial())
            made.append(policy.sampled)
    assert made == [1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(60))
def test_what_was_cut_is_charged_when_the_run_goes_on(seed, tmp_path):
    """Stopped at random moments and gone on with: every token that any run generated is charged, once."""
    rng = random.Random(seed)
    budget = Budget(generated=rng.choice((None, 900)), critical_path=rng.choice((None, 700)))
    emitted = 0

    def run(patience: float) -> Any:
        nonlocal emitted
        policy = ScriptedPolicy(spawning, delay=0.01, faults=Faults(seed, 4, lasting=False))

        async def main() -> Any:
            with Journal(tmp_path / "j", "job") as journal, anyio.move_on_after(patience):
                runtime = Runtime(JournaledPolicy(policy, journal), PlainFormat(), attempts=9, max_turn_tokens=450)
                return await runtime.run(Task("t", (Message("user", "go"),)), budget, seed)

        tree = simulate(main, seed)
        emitted += sum(map(sum, policy.emitted.values()))
        return tree

    for _ in range(rng.randint(1, 6)):
        if (tree := run(rng.uniform(0, 12))) is not None:
            break
    else:
        tree = run(1e9)
    assert tree.usage.generated == emitted


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_is_not_the_shorter_for_having_been_interrupted(seed, tmp_path):
    """The budget is used up to the last token: what was cut is charged beside it."""
    budget, task = Budget(generated=600), Task("t", (Message("user", "go"),))

    def run(patience: float, path: str) -> Any:
        async def main() -> Any:
            with Journal(tmp_path / path, "job") as journal, anyio.move_on_after(patience):
                return await Runtime(JournaledPolicy(ScriptedPolicy(spawning, delay=0.01), journal), PlainFormat()).run(task, budget, seed)

        return simulate(main, seed)

    whole = run(1e9, "whole")
    rng, tree = random.Random(seed), None
    while tree is None:
        tree = run(rng.uniform(0, 6), "cut")
    assert [(b.ids, b.status, b.answer) for b in tree.branches] == [(b.ids, b.status, b.answer) for b in whole.branches]
    assert tree.usage.generated >= whole.usage.generated


def test_faults_are_functions_of_the_request_and_the_attempt():
    faults = Faults(3, 2.0)
    requests = [SampleRequest((1,), 9, frozenset(), seed) for seed in range(200)]
    shuffled = random.Random(0).sample(requests, 200)
    fault_of = {r.seed: repr(faults(r, 0)) for r in shuffled}
    assert all(repr(faults(r, 0)) == fault_of[r.seed] for r in requests)
    assert 60 < sum(v != "None" for v in fault_of.values()) < 140
