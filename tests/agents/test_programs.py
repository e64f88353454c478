"""Programs in the model's place, roles of clones, and what a watcher sees; on both of anyio's backends."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Any

import anyio
import pytest
import sniffio

from ramet.agents.budget import Budget
from ramet.agents.calls import ParsedTurn
from ramet.agents.events import BranchEnded, BranchStarted, CallEnded, CallMade, TokensSampled, TreeEnded, TurnSampled
from ramet.agents.growth import Growth, Role
from ramet.agents.program import Program, ProgramBranch
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import SampleRequest
from ramet.agents.scripted import Fault, PlainFormat, ScriptedPolicy
from ramet.agents.tasks import task_group
from ramet.agents.tools import tool
from ramet.agents.tree import Branch, Message, Status, Task, ToolStatus, Tree
from ramet.benchmarks.faults.invariants import check_growth
from ramet.errors import BudgetExhausted, ConfigError, PolicyError, ProgramError, TransientPolicyError

pytestmark = pytest.mark.anyio
PLAIN = PlainFormat()


@tool(cost=2)
async def twice(n: int) -> int:
    """Twice a number."""
    return 2 * n


def model(context: str) -> str:
    """A clone counts its documents; the root adds up what it was told."""
    if context[1:].startswith("root"):
        return f"Answer: {sum(int(line.split(': ')[1]) for line in context.rpartition('<')[2][:-1].splitlines() if ': ' in line)}\0"
    return f"Answer: {context.count(': ')}\0"


async def run(program: Program | None, budget: Budget | None = None, policy: Any = None, **options: Any) -> Tree:
    runtime = Runtime(policy or ScriptedPolicy(model), PLAIN, **options)
    return await runtime.run(Task("t", (Message("user", "root"),), dict.fromkeys("ABCDE", "x")), budget or Budget(), program=program)


async def map_reduce(branch: ProgramBranch) -> None:
    await branch.spawn([{"objective": "count", "each": ["*"], "per_clone": 2}])
    await branch.finish()


async def test_a_program_spawns_and_the_model_answers_in_one_tree_on_one_ledger():
    tree = await run(map_reduce)
    assert (tree.answer, tree.root.status, tree.usage.clones) == ("5", Status.ANSWERED, 3)
    call, answer = tree.root.turns
    assert call.written and not answer.written and len(call.clones) == 3
    assert tree.usage.generated == len(call.sampled) + len(answer.sampled) + sum(clone.generated for clone in tree.root.clones)
    trained = [i for i, sampled in zip(tree.root.ids, tree.root.mask, strict=True) if sampled]
    assert trained == list(answer.sampled)  # never what the program wrote
    # The model making the same call would have written, been told and paid the same.
    text = PLAIN.text(call.sampled).removesuffix("$")
    alone = await run(None, policy=ScriptedPolicy(lambda c: model(c) if "<" in c or not c[1:].startswith("root") else text + "\0"))
    assert alone.root.ids == tree.root.ids and alone.usage.generated == tree.usage.generated


async def test_what_is_free_is_context_and_counted():
    async def program(branch: ProgramBranch) -> None:
        await branch.spawn([{"objective": "count", "each": ["*"]}], free=True)
        await branch.finish()

    tree, paid = await run(program), await run(map_reduce)
    call = tree.root.turns[0]
    assert call.sampled == () and call.free > 0 and PLAIN.text(call.appended[: call.free]).startswith("<tool_call>")
    assert tree.answer == "5" and tree.root.generated == paid.root.generated - len(paid.root.turns[0].sampled)


async def test_a_program_may_loop_over_samples_and_tools():
    async def program(branch: ProgramBranch) -> str:
        total = 0
        for n in range(3):
            total += int((await branch.call("twice", n=n)).text)
            turn = await branch.sample(20)
            branch.tell(f"so far {total}, you said {turn.text}")
        assert branch.left["tool_calls"] == 4
        return f"{total}"

    tree = await run(program, Budget(tool_calls=10), tools=[twice])
    assert (tree.answer, tree.root.status, tree.usage.tool_calls) == ("6", Status.ANSWERED, 6)
    assert "so far 6, you said Answer: " in PLAIN.text(tree.root.ids)
    ids = [i for turn in tree.root.turns for i in (*turn.sampled, *turn.appended)]
    assert tree.root.ids == [*tree.root.prompt, *ids]


async def test_the_calls_of_a_sampled_turn_are_made_when_the_program_says_so():
    async def program(branch: ProgramBranch) -> None:
        turn = await branch.sample()
        with pytest.raises(ProgramError, match="make"):
            await branch.spawn(["a"])
        await branch.make(turn)
        await branch.finish()

    calls = '<tool_call>{"name": "twice", "arguments": {"n": 4}}</tool_call>\0'
    tree = await run(program, policy=ScriptedPolicy(lambda c: "Answer: 8\0" if "<8>" in c else calls), tools=[twice])
    assert tree.answer == "8" and tree.root.turns[0].calls[0].result.status is ToolStatus.DONE


async def test_where_the_budget_ends_so_does_the_program():
    async def forever(branch: ProgramBranch) -> None:
        while True:
            await branch.spawn(["count"])

    tree = await run(forever, Budget(generated=300))
    assert tree.root.status is Status.OUT_OF_BUDGET and tree.usage.generated <= 300 and tree.usage.clones > 0
    tree = await run(forever, Budget(generated=5))
    assert tree.root.status is Status.OUT_OF_BUDGET and tree.usage.generated == 0

    async def still(branch: ProgramBranch) -> None:
        await anyio.sleep_forever()

    assert (await run(still, Budget(seconds=0.02))).root.status is Status.TIMED_OUT

    async def nothing(branch: ProgramBranch) -> None:
        return None

    assert (await run(nothing)).root.status is Status.EMPTY
    broken = ScriptedPolicy(lambda c: "Answer: 1\0", faults=lambda request, attempt: Fault(0, error=PolicyError("gone")))
    assert (await run(map_reduce, policy=broken)).failed == "gone"


async def test_a_program_whose_calls_are_all_refused_can_still_be_stopped():
    async def endless(branch: ProgramBranch) -> None:
        while True:
            await branch.spawn(["count"], free=True)

    tree = await run(endless, Budget(generated=0, seconds=0.02))
    assert tree.root.status is Status.TIMED_OUT and tree.usage.clones == 0


async def test_calls_and_messages_of_a_program_keep_to_the_context_and_it_may_answer_after_them():
    async def told(branch: ProgramBranch) -> None:
        for _ in range(9):
            await branch.sample(10)
            branch.tell("x" * 20)

    def called(free: bool) -> Program:
        async def program(branch: ProgramBranch) -> str:
            try:
                while True:
                    await branch.spawn(["count"], free=free)
            except BudgetExhausted as error:
                with pytest.raises(BudgetExhausted, match="context"):
                    await branch.spawn(["count"], free=free)
                return f"stopped by {error.currency}"

        return program

    tree = await run(told, Budget(context=100))
    assert (tree.root.status, tree.root.reason) == (Status.OUT_OF_BUDGET, "context") and 70 < len(tree.root.ids) <= 100
    for free in (True, False):
        lengths: dict[Status, list[int]] = {Status.ANSWERED: [], Status.OUT_OF_BUDGET: []}
        for context in range(100, 200):
            tree = await run(called(free), Budget(context=context))
            lengths[tree.root.status].append(len(tree.root.ids) - context)
            assert tree.answer == "stopped by context"
        assert max(lengths[Status.ANSWERED]) < len("Answer: stopped by context$")
        # Out of budget where the call had room, with a token more, and its results had none.
        assert max(lengths[Status.OUT_OF_BUDGET]) == -1


async def test_a_cut_turn_is_closed_even_if_attempts_stand_between():
    async def program(branch: ProgramBranch) -> None:
        turn = await branch.sample(len('<tool_call>{"name"'))
        await branch.attempts(["count"])
        await branch.make(turn)
        branch.answer("1")

    tree = await run(program, policy=ScriptedPolicy(lambda c: '<tool_call>{"name":"spawn_clone"}</tool_call>\0'))
    assert "$<1: (refused: the tool call is not closed)" in PLAIN.text(tree.root.ids)


async def test_a_sample_is_no_longer_than_it_may_be_and_than_there_is_room():
    async def program(branch: ProgramBranch) -> None:
        for most in (5, 10**9):
            await branch.sample(most)
            branch.tell("go on")

    tree = await run(program, Budget(generated=20), policy=ScriptedPolicy(lambda c: "y" * 500))
    assert [len(turn.sampled) for turn in tree.root.turns] == [5, 15]


async def test_a_turn_without_a_token_is_a_turn():
    async def program(branch: ProgramBranch) -> None:
        assert (await branch.sample()).text == ""
        branch.tell("say something")
        await branch.finish()

    tree = await run(program, policy=ScriptedPolicy(lambda c: "Answer: 1\0" if "something" in c else ""))
    assert tree.answer == "1" and tree.root.turns[0].sampled == ()


async def test_a_cut_turn_is_closed_before_its_calls_are_answered():
    async def program(branch: ProgramBranch) -> None:
        await branch.make(await branch.sample(len('<tool_call>{"name"')))
        branch.answer("1")

    tree = await run(program, policy=ScriptedPolicy(lambda c: '<tool_call>{"name":"spawn_clone"}</tool_call>\0'))
    assert PLAIN.text(tree.root.turns[0].appended).startswith("$<1: (refused: the tool call is not closed)")


async def test_what_a_program_does_wrong_is_its_error():
    async def raises(branch: ProgramBranch) -> None:
        raise KeyError("x")

    async def exits(branch: ProgramBranch) -> None:
        raise SystemExit(3)

    async def cancelled(branch: ProgramBranch) -> None:
        raise asyncio.CancelledError  # of a task of its own that it waited for

    async def unknown(branch: ProgramBranch) -> None:
        await branch.call("nope")

    async def malformed(branch: ProgramBranch) -> None:
        await branch.spawn([{"objective": "a", "temperature": 1}])

    async def nobody(branch: ProgramBranch) -> None:
        await branch.spawn([{"objective": "a", "each": ["Z*"]}])

    async def twice_answered(branch: ProgramBranch) -> None:
        branch.answer("1")
        branch.answer("2")

    async def telling(branch: ProgramBranch) -> None:
        branch.tell("x")

    async def accepting(branch: ProgramBranch) -> None:
        branch.accept()

    async def none_at_all(branch: ProgramBranch) -> None:
        await branch.attempts(0)

    async def tries(branch: ProgramBranch) -> None:
        await branch.attempts(2)

    async def wordless(branch: ProgramBranch) -> None:
        await branch.attempts([[]])

    async def as_nobody(branch: ProgramBranch) -> None:
        await branch.attempts([{"objective": "a", "role": "judge"}])

    async def two_at_once(branch: ProgramBranch) -> None:
        async with task_group() as group:
            group.start_soon(branch.attempts)
            group.start_soon(branch.attempts)

    async def sampling_beside(branch: ProgramBranch) -> None:
        with branch.side_by_side():
            await branch.sample()

    async def beside_beside(branch: ProgramBranch) -> None:
        with branch.side_by_side(), branch.side_by_side():
            pass

    async def makes_twice(branch: ProgramBranch) -> None:
        turn = ParsedTurn("", ('{"name":"spawn_clone","arguments":{"objectives":["a"]}}',))
        await branch.make(turn)

    cases = {
        raises: "KeyError",
        exits: "raised SystemExit",
        cancelled: "raised CancelledError",
        unknown: "holds no tool 'nope'",
        malformed: "temperature",
        nobody: "no document",
        twice_answered: "already",
        telling: "comes after sample",
        accepting: "comes after sample",
        none_at_all: "a number from 1 up",
        wordless: "lists of messages",
        as_nobody: "no role 'judge'; there are none",
        two_at_once: "one thing at a time",
        sampling_beside: "only attempts",
        beside_beside: "already",
        makes_twice: "answered already",
    }
    if sniffio.current_async_library() != "asyncio":
        del cases[cancelled]
    for program, said in cases.items():
        with pytest.raises(ProgramError, match=said):
            await run(program)
    for program in (map_reduce, tries):
        with pytest.raises(ProgramError, match="allows no clones"):
            await run(program, Budget(depth=0))


async def test_attempts_know_nothing_of_the_branch_and_count_as_its_clones():
    prompts: list[str] = []

    def said(context: str) -> str:
        prompts.append(context)
        return f"Answer: {'x' * len(prompts)}\0"

    async def longest(branch: ProgramBranch) -> Branch:
        tried = await branch.attempts(3, keep=0)
        assert branch.left["generated"] == 90 - sum(clone.generated for clone in tried)
        tried += await branch.attempts(["another prompt"], keep=0)
        return max(tried, key=lambda clone: len(clone.answer or ""))

    tree = await run(longest, Budget(generated=90, answer_reserve=2), ScriptedPolicy(said))
    assert sorted(prompts) == sorted(PLAIN.text(clone.prompt) for clone in tree.root.clones)
    assert all("spawn_clone" not in p for p in prompts)
    assert [("root" in p, "another prompt" in p) for p in prompts] == [(True, False)] * 3 + [(False, True)]
    assert all("[left 28 tokens]" in p for p in prompts[:3])  # a third each, less its reserve
    assert (tree.answer, tree.root.status) == ("xxxx", Status.ANSWERED)
    assert tree.root.ids == [*tree.root.prompt] and tree.root.generated == 0  # a free choice, of which nothing is written
    each = [clone.generated for clone in tree.root.clones]
    assert (tree.usage.generated, tree.usage.critical_path, tree.usage.clones) == (sum(each), max(each[:3]) + each[3], 4)


async def test_attempts_at_a_task_have_its_type_and_what_is_adopted_has_to_fit_it():
    async def first(branch: ProgramBranch) -> Branch:
        return (await branch.attempts(2))[0]

    async def other(branch: ProgramBranch) -> Branch:
        return (await branch.attempts(["something else"]))[0]

    runtime = Runtime(ScriptedPolicy(lambda c: "Answer: 7\0" if "root" in c else "Answer: seven\0"), PLAIN)
    task = Task("t", (Message("user", "root"),), answer=int)
    tree = await runtime.run(task, Budget(), program=first)
    assert (tree.value, tree.answer, tree.root.status) == (7, "7", Status.ANSWERED)
    with pytest.raises(ProgramError, match="does not fit"):
        await runtime.run(task, Budget(), program=other)


async def test_attempts_one_after_another_that_do_not_wait_for_each_other_cost_the_longest_path():
    answers = iter(["Answer: 1\0", "Answer: 22222\0", "Answer: 3\0"])
    roots: list[Growth] = []

    class Checked(ScriptedPolicy):
        async def sample(self, request, partial):
            check_growth(roots[-1], {})
            try:
                return await super().sample(request, partial)
            finally:
                check_growth(roots[-1], {})

    async def until_spent(branch: ProgramBranch) -> Branch:
        with branch.side_by_side():
            while branch.left["generated"] > 3:
                await branch.attempts(keep=0)
        return branch.clones[1]

    policy = Checked(lambda c: next(answers))
    tree = await run(until_spent, Budget(generated=36, critical_path=30, clones=9), policy, watch=roots.append)
    each = [clone.generated for clone in tree.root.clones]
    assert (tree.answer, each) == ("22222", [10, 14, 10]) and len(tree.root.turns) == 1
    assert (tree.usage.generated, tree.usage.critical_path) == (34, 14)
    assert roots[0].ledger.spent("critical_path") == 14 and roots[0].ledger.spent("generated") == 34
    check_growth(roots[0], {})


@pytest.mark.parametrize("room", [None, 7])
async def test_a_turn_that_a_program_begins_is_the_models_from_there(room):
    async def delegates(branch: ProgramBranch) -> None:
        branch.begin("so", call=True)
        await branch.finish()

    rest = '{"name":"spawn_clone","arguments":{"objectives":["a","b"]}}</tool_call>\0'
    policy = ScriptedPolicy(lambda c: model(c) if "<" in c.replace("<tool_call>", "") or not c[1:].startswith("root") else rest)
    tree = await run(delegates, Budget(generated=room), policy)
    first = tree.root.turns[0]
    if room is not None:  # what is begun is charged, and cut where the budget is
        assert (first.written, len(first.sampled), tree.usage.generated) == (room, room, room) and not policy.requests
        return
    assert PLAIN.text(first.sampled).startswith('so<tool_call>{"name"') and first.written == len("so<tool_call>") and len(first.clones) == 2
    assert tree.answer == "0" and tree.usage.generated == sum(branch.generated for branch in tree.branches)
    assert sum(tree.root.mask) == tree.root.generated - first.written and not any(tree.root.mask[: len(tree.root.prompt) + first.written])
    assert not policy.requests[0].prompt[len(tree.root.prompt) + first.written :]


async def test_what_is_begun_is_begun_again_after_a_failure_and_charged_once():
    async def says(branch: ProgramBranch) -> None:
        branch.begin("Answer: ")
        await branch.finish()

    busy = lambda request, attempt: Fault(1, error=TransientPolicyError("busy", 0.0)) if attempt == 0 else None  # noqa: E731
    policy = ScriptedPolicy(lambda c: "7\0", faults=busy)
    tree = await run(says, policy=policy)
    turn = tree.root.turns[0]
    assert (tree.answer, turn.written, turn.discarded, tree.usage.generated) == ("7", 8, 1, 11)


async def test_a_critic_sends_drafts_back_until_it_has_nothing_to_say():
    drafts = iter(["Answer: 5\0", "Answer: 6\0"])

    def said(context: str) -> str:
        return f"Answer: {'good' if '6' in context else 'no, one more'}\0" if context[1:].startswith("judge") else next(drafts)

    async def critic(branch: ProgramBranch) -> None:
        for _ in range(4):
            draft = await branch.sample(20)
            (verdict,) = await branch.attempts([f"judge {draft.text}"])
            if verdict.answer == "good":
                branch.accept()
                return
            branch.tell(str(verdict.answer))

    tree = await run(critic, policy=ScriptedPolicy(said))
    assert (tree.answer, tree.root.status, tree.usage.clones) == ("6", Status.ANSWERED, 2)
    assert "5" in PLAIN.text(tree.root.ids) and "<no, one more>" in PLAIN.text(tree.root.ids)
    trained = [i for i, sampled in zip(tree.root.ids, tree.root.mask, strict=True) if sampled]
    assert PLAIN.text(trained) == "Answer: 5$Answer: 6$"


async def test_a_program_says_what_it_keeps_and_what_clones_keep():
    limits: dict[str, int] = {}

    class Noting(ScriptedPolicy):
        async def sample(self, request, partial):
            limits[request.branch] = request.max_tokens
            return await super().sample(request, partial)

    async def program(branch: ProgramBranch) -> None:
        await branch.spawn([{"objective": "count", "each": ["*"], "per_clone": 3}], text="two parts", free=True, keep=40, answer_reserve=5)
        await branch.finish(spawn=False)

    tree = await run(program, Budget(generated=240, answer_reserve=10), Noting(model))
    assert limits["0.0"] == limits["0.1"] == 100 - 5 and limits["0"] == 240 - sum(c.generated for c in tree.root.clones) - 10
    assert PLAIN.text(tree.root.turns[0].appended).startswith("two parts<tool_call>") and tree.answer == "5"
    call = '<tool_call>{"name":"spawn_clone","arguments":{"objectives":["a"]}}</tool_call>\0'
    again = ScriptedPolicy(lambda c: call if c[1:].startswith("root") and c.count("<tool_call>") < 2 else "Answer: 1\0")
    tree = await run(program, Budget(generated=900), again)
    assert tree.usage.clones == 2 and "is not available here" in PLAIN.text(tree.root.ids)


async def test_what_the_backend_raises_is_not_called_the_programs_error():
    def broken(context: str) -> str:
        raise ZeroDivisionError

    async def program(branch: ProgramBranch) -> None:
        await branch.attempts(2)

    for each in (map_reduce, program):
        with pytest.raises(ZeroDivisionError):
            await run(each, policy=ScriptedPolicy(broken))


async def test_a_role_has_its_own_policy_words_and_tools_and_its_tokens_are_not_trained():
    seen: list[SampleRequest] = []

    class Other(PlainFormat):
        """Another tokenizer: the same characters under other ids."""

        stop_ids = frozenset({10_000})

        def render(self, messages, tools):
            return [i + 10_000 for i in super().render(messages, tools)] + [10_001] * sum(m.role == "system" for m in messages)

        def after_turn(self, text, closed, role="tool"):
            return [i + 10_000 for i in super().after_turn(text, closed)]

        def parse(self, sampled):
            return super().parse([i - 10_000 for i in sampled])

        def text(self, ids):
            return super().text([i - 10_000 for i in ids])

    class Shifted(ScriptedPolicy):
        async def sample(self, request, partial):
            seen.append(request)
            prompt = tuple(i - 10_000 for i in request.prompt)
            given = await super().sample(replace(request, prompt=prompt, stop_ids=frozenset({0})), partial)
            partial.ids[:] = [i + 10_000 for i in partial.ids]
            return replace(given, ids=tuple(i + 10_000 for i in given.ids))

    def root(context: str) -> str:
        if "<" in context:
            return f"Answer: {' '.join(context.rpartition('<')[2][:-1].split())}\0"
        return '<tool_call>{"name":"spawn_clone","arguments":{"objectives":[{"objective":"r","role":"reader"},"p"]}}</tool_call>\0'

    def reader(context: str) -> str:
        return "Answer: 14\0" if "14" in context else '<tool_call>{"name": "twice", "arguments": {"n": 7}}</tool_call>\0'

    roles = {"reader": Role(Shifted(reader), Other(), system="read", tools=[twice], description="reads", trainable=False)}
    own = ScriptedPolicy(lambda c: root(c) if c[1:].startswith("root") else "Answer: plain\0")
    tree = await run(None, policy=own, roles=roles)
    assert tree.answer == "1: 14 2: plain"
    clone, plain = tree.root.clones
    assert (clone.role, clone.trainable, plain.role, plain.trainable) == ("reader", False, "", True)
    assert min(clone.ids) >= 10_000 and max(plain.ids) < 10_000 and 10_001 in clone.prompt
    assert {(r.branch, r.role, r.depth) for r in seen} == {("0.0", "reader", 1)}
    costs, whole = tree.roles(), asdict(tree.usage)
    assert costs["reader"].generated == clone.generated and (costs["reader"].clones, costs[""].clones) == (1, 1)
    summed = {name: sum(asdict(cost)[name] for cost in costs.values()) for name in whole}
    assert {name for name in whole if summed[name] != whole[name]} <= {"critical_path", "seconds"}
    assert tree.root.turns[0].clones[0].turns[0].calls[0].name == "twice"
    for wrong, said in (("x", "no role 'x'; there are reader"), ("reader", "there are none")):
        call = f'<tool_call>{{"name":"spawn_clone","arguments":{{"objectives":[{{"objective":"r","role":"{wrong}"}}]}}}}</tool_call>\0'
        policy = ScriptedPolicy(lambda c, call=call: f"Answer: {c.rpartition('<')[2][:-1]}\0" if "<" in c else call)
        assert said in (await run(None, policy=policy, roles=roles if wrong == "x" else {})).answer
    with pytest.raises(ConfigError, match="trainable=False"):
        Role(own)


async def test_a_stream_has_everything_that_happens_and_ends_with_the_tree():
    def program(context: str) -> str:
        if context[1:].startswith("root") and "<" not in context:
            call = '<tool_call>{"name": "twice", "arguments": {"n": 1}}</tool_call>'
            return f'{call}<tool_call>{{"name":"spawn_clone","arguments":{{"objectives":["a","b"]}}}}</tool_call>\0'
        return "Answer: 1\0"

    runtime = Runtime(ScriptedPolicy(program), PLAIN, tools=[twice])
    events = [event async for event in runtime.stream(Task("t", (Message("user", "root"),)), Budget(generated=5000))]
    tree = events[-1].tree
    assert isinstance(events[-1], TreeEnded) and tree.answer == "1"
    assert sorted(e.branch for e in events if isinstance(e, BranchStarted)) == ["0", "0.0", "0.1"]
    assert sorted(e.branch for e in events if isinstance(e, BranchEnded)) == ["0", "0.0", "0.1"]
    assert [e.name for e in events if isinstance(e, CallMade)] == ["twice", "spawn_clone"]
    assert [(e.name, e.result.text) for e in events if isinstance(e, CallEnded)] == [("twice", "2")]
    for branch in tree.branches:
        told = [i for e in events if isinstance(e, TokensSampled) and e.branch == branch.id for i in e.ids]
        assert told == [i for turn in branch.turns for i in turn.sampled]
        assert sum(isinstance(e, TurnSampled) and e.branch == branch.id for e in events) == len(branch.turns)
    last = next(e for e in events if isinstance(e, BranchEnded) and e.branch == "0")
    assert last.spent["generated"] == tree.usage.generated and last.spent["tool_calls"] == 2


async def test_leaving_a_stream_cancels_the_tree_and_its_errors_come_out():
    policy = ScriptedPolicy(model, delay=0.01)
    stream = Runtime(policy, PLAIN).stream(Task("t", (Message("user", "root"),)), Budget())
    async for event in stream:
        if isinstance(event, TokensSampled):
            break
    await stream.aclose()
    assert policy.running == 0

    async def raises(branch: ProgramBranch) -> None:
        raise KeyError("x")

    with pytest.raises(ProgramError, match="KeyError"):
        async for _ in Runtime(policy, PLAIN).stream(Task("t", (Message("user", "root"),)), Budget(), program=raises):
            pass
