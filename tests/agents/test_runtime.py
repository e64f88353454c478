"""The runtime, with programs for policies, on both of anyio's backends."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable

import anyio
import pytest

from ramet.agents.budget import Budget
from ramet.agents.growth import Growth
from ramet.agents.protocol import render_call
from ramet.agents.runtime import Job, Runtime
from ramet.agents.scripted import Fault, PlainFormat, ScriptedPolicy
from ramet.agents.tree import Branch, Message, Status, StopReason, Task, Tree
from ramet.errors import PolicyError, TaskError, TransientPolicyError

pytestmark = pytest.mark.anyio


def failing(errors: dict[int, PolicyError], after: int = 2) -> Callable[[object, int], Fault | None]:
    """Errors by the number of the request."""
    numbers = itertools.count()

    def fault(request: object, attempt: int) -> Fault | None:
        number = next(numbers)
        return Fault(after, error=errors[number]) if number in errors else None

    return fault


def task(text: str = "root", **documents: str) -> Task:
    return Task("t", (Message("user", text),), documents)


def spawn(*objectives, keys=()) -> str:
    return f"<tool_call>{render_call(list(objectives), keys)}</tool_call>\0"


async def grow(program: Callable[[str], str], budget: Budget | None = None, documents: dict[str, str] | None = None, **options) -> Tree:
    runtime = Runtime(ScriptedPolicy(program, **options), PlainFormat())
    return await runtime.run(task(**(documents or {})), budget or Budget())


async def test_an_answer_alone():
    tree = await grow(lambda _: "Answer: 7\0")
    assert (tree.answer, tree.root.status, tree.usage.generated, tree.usage.clones) == ("7", Status.ANSWERED, 10, 0)
    assert tree.root.turns[0].version == 3


def delegating(context: str) -> str:
    if not context.startswith("T"):
        return f"Answer: {context.count('x')}\0"
    if "1: " in context:
        return "Answer: " + context.rpartition("<")[2].replace("\n", " ").rstrip(">") + "\0"
    return spawn("xx", {"objective": "xxx", "context_keys": ["b", "a"]})


async def test_parallel_clones_and_their_results_in_call_order():
    tree = await grow(delegating, documents={"a": "first", "b": "second"})
    assert tree.answer == "1: 2 2: 3"
    clones = tree.root.clones
    assert [c.id for c in clones] == ["0.0", "0.1"] and [c.objective for c in clones] == ["xx", "xxx"]
    assert PlainFormat().text(clones[1].prompt) == "-a: first\nb: second\nxxx|"
    assert tree.usage.clones == 2 and tree.usage.critical_path == tree.usage.generated - len(clones[0].turns[0].sampled)


async def test_ids_mask_and_logprobs_line_up_over_turns():
    tree = await grow(delegating, documents={"a": "1", "b": "2"})
    root = tree.root
    assert len(root.ids) == len(root.mask) == len(root.logprobs)
    sampled = [i for i, m in zip(root.ids, root.mask, strict=True) if m]
    assert sampled == [i for t in root.turns for i in t.sampled]
    assert all((p == -0.5) == m for p, m in zip(root.logprobs, root.mask, strict=True))


async def test_series_over_turns_number_their_clones_on():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return "Answer: c\0"
        rounds = context.count("1: c")
        return spawn("x") if rounds < 3 else "Answer: done\0"

    tree = await grow(program)
    assert [c.id for c in tree.root.clones] == ["0.0", "0.1", "0.2"] and tree.answer == "done"


async def test_nesting_as_deep_as_the_budget_allows():
    def program(context: str) -> str:
        if "1: " in context:
            return "Answer: up\0"
        return spawn("deeper") if context.startswith("T") else "Answer: bottom\0"

    tree = await grow(program, Budget(depth=5))
    assert max(b.depth for b in tree.branches) == 5 and tree.usage.clones == 5 and tree.answer == "up"
    assert not (await grow(program, Budget(depth=0))).spawned


async def test_a_bad_call_comes_back_and_can_be_repaired():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return "Answer: 1\0"
        if "refused: arguments.objectives: Field required" in context:
            return "Answer: fixed\0" if "1: 1" in context else spawn("x")
        return '<tool_call>{"name": "spawn_clone", "arguments": {}}</tool_call>\0'

    tree = await grow(program)
    assert tree.answer == "fixed" and len(tree.root.turns) == 3


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        ("<tool_call>{", "not closed"),
        ("<tool_call>{}</tool_call><tool_call>{}</tool_call>", "one call a turn"),
        ("<tool_call>x</tool_call>", "JSON"),
    ],
)
async def test_malformed_turns_are_answered_and_not_dropped(turn, error):
    tree = await grow(lambda context: "Answer: ok\0" if error in context else turn + "\0")
    assert tree.answer == "ok"


async def test_a_branch_without_the_tool_that_calls_it_is_told():
    tree = await grow(lambda c: "Answer: ok\0" if "not available" in c else spawn("x"), Budget(depth=0))
    assert tree.answer == "ok" and not tree.spawned


async def test_width_clones_and_tokens_refuse_by_name_and_visibly():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return "Answer: 1\0"
        return "Answer: " + context.rpartition("<")[2].replace("\n", ";") + "\0" if "1: " in context else spawn(*"abcd")

    tree = await grow(program, Budget(width=2))
    assert tree.answer == "1: 1;2: 1;3: (refused: at most 2 clones a call);4: (refused: at most 2 clones a call)>"
    tree = await grow(program, Budget(clones=3))
    assert "4: (refused: no clones left);[left 0 clones]" in tree.answer and tree.usage.clones == 3
    tokens = len(spawn(*"abcd"))
    tree = await grow(program, Budget(generated=tokens + 300, answer_reserve=300))
    assert "1: (refused: no tokens left for clones)\n2: (refused" in PlainFormat().text(tree.root.ids)


async def test_unknown_keys_are_reported_to_both():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return f"Answer: {'unknown context keys: zz' in context}\0"
        return (
            "Answer: ok\0"
            if "Unknown context keys: zz" in context and "1: True" in context
            else spawn({"objective": "x", "context_keys": ["zz"]})
        )

    assert (await grow(program)).answer == "ok"


async def test_max_tokens_bounds_a_clone_and_the_rest_returns():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return "y" * 1000
        return "Answer: ok\0" if "1: " in context else spawn({"objective": "x", "max_tokens": 20}, "z")

    tree = await grow(program, Budget(generated=400))
    first, second = tree.root.clones
    assert first.generated == 20 and first.status is Status.OUT_OF_BUDGET
    assert second.generated == 400 - len(spawn({"objective": "x", "max_tokens": 20}, "z")) - 20
    assert tree.answer is None and tree.usage.generated == 400 and tree.root.status is Status.OUT_OF_BUDGET


async def test_the_answer_reserve_lets_a_branch_that_ran_out_answer():
    tree = await grow(lambda c: "Answer: 5\0" if "Out of budget" in c else "y" * 1000, Budget(generated=50, answer_reserve=10))
    assert (tree.answer, tree.root.status, tree.usage.generated) == ("5", Status.OUT_OF_BUDGET, 50)
    assert [t.stop for t in tree.root.turns] == [StopReason.LENGTH, StopReason.END]
    tree = await grow(lambda _: "y" * 1000, Budget(generated=50, answer_reserve=10))
    assert tree.answer is None and tree.usage.generated == 50


async def test_zero_tokens_sample_nothing():
    policy = ScriptedPolicy(lambda _: "Answer: 1\0")
    tree = await Runtime(policy, PlainFormat()).run(task(), Budget(generated=0))
    assert tree.root.status is Status.OUT_OF_BUDGET and not policy.requests


async def test_turns_and_context_end_a_branch():
    tree = await grow(lambda _: "<tool_call>x</tool_call>\0", Budget(turns=3))
    assert tree.root.status is Status.OUT_OF_BUDGET and len(tree.root.turns) == 3 and tree.root.reason == "turns"
    tree = await grow(lambda _: "<tool_call>x</tool_call>\0", Budget(context=200, turns=None))
    assert tree.root.status is Status.OUT_OF_BUDGET and len(tree.root.ids) <= 200


async def test_results_shrink_to_fit_the_context():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return "Answer: " + "w" * 400 + "\0"
        return "Answer: ok\0" if "1: " in context else spawn("a", "b")

    tree = await grow(program, Budget(context=480, answer_reserve=0))
    assert tree.answer == "ok" and "characters cut" in PlainFormat().text(tree.root.ids) and len(tree.root.ids) <= 480


async def test_only_transient_errors_are_retried_and_what_they_generated_is_charged():
    flaky = ScriptedPolicy(
        lambda _: "Answer: 9\0", faults=failing({0: TransientPolicyError("reset", retry_after=0.0), 1: TransientPolicyError("reset")})
    )
    tree = await Runtime(flaky, PlainFormat()).run(task(), Budget(generated=100))
    assert tree.answer == "9" and len(flaky.requests) == 3
    assert tree.usage.generated == 10 + 2 * 2 and tree.root.turns[0].discarded == 4
    assert len({r.seed for r in flaky.requests}) == 1
    broken = ScriptedPolicy(lambda _: "Answer: 9\0", faults=failing({0: PolicyError("no such model")}))
    tree = await Runtime(broken, PlainFormat()).run(task(), Budget())
    assert (tree.root.status, tree.error, len(broken.requests)) == (Status.FAILED, "no such model", 1)
    assert tree.usage.generated == 2


async def test_retries_end_with_the_budget_and_with_the_attempts():
    always = ScriptedPolicy(
        lambda _: "Answer: 9\0", faults=failing(dict.fromkeys(range(99), TransientPolicyError("reset", retry_after=0.0)))
    )
    tree = await Runtime(always, PlainFormat(), attempts=3).run(task(), Budget())
    assert tree.root.status is Status.FAILED and len(always.requests) == 3 and tree.usage.generated == 6
    always.requests.clear()
    tree = await Runtime(always, PlainFormat(), attempts=2).run(task(), Budget(generated=4))
    assert tree.usage.generated <= 4 and (tree.root.status, tree.error) == (Status.FAILED, "reset")


async def test_a_failed_attempt_costs_no_turn_and_not_the_answer_reserve():
    reset = TransientPolicyError("reset", retry_after=0.0)
    once = ScriptedPolicy(lambda _: "Answer: 9\0", faults=failing({0: reset}))
    tree = await Runtime(once, PlainFormat()).run(task(), Budget(turns=1))
    assert tree.answer == "9" and tree.usage.prefilled == 2 * len(tree.root.prompt)
    program = lambda c: "Answer: 5\0" if "Out of budget" in c else "y" * 1000  # noqa: E731
    late = ScriptedPolicy(program, faults=failing({0: reset}, after=10))
    tree = await Runtime(late, PlainFormat()).run(task(), Budget(generated=50, answer_reserve=10))
    assert (tree.answer, tree.usage.generated) == ("5", 50)


@pytest.mark.parametrize("context", range(100, 300, 7))
async def test_an_answer_fits_whatever_the_context(context):
    def program(text: str) -> str:
        if not text.startswith("T"):
            return "Answer: 1\0"
        return "Answer: ok\0" if "Out of budget" in text or "1: 1" in text else spawn("a")

    tree = await grow(program, Budget(context=context, answer_reserve=16))
    assert tree.answer == "ok" and len(tree.root.ids) <= context


async def test_a_parents_own_limit_is_not_its_clones():
    call = spawn("a", "b")
    tree = await grow(
        lambda c: call if c.startswith("T") and "1: " not in c else "Answer: 1\0",
        Budget(generated=1000, branch_generated=len(call) + 12, answer_reserve=12),
    )
    assert [c.status for c in tree.root.clones] == [Status.ANSWERED] * 2 and tree.answer == "1"


async def test_an_error_is_not_hidden_by_a_deadline_that_cancels_its_siblings():
    def program(context: str) -> str:
        if context.startswith("T"):
            return spawn("slow", "slow", "bug")
        if "bug" in context:
            raise ZeroDivisionError
        return "y" * 100_000

    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            await grow(program, Budget(seconds=5.0))


async def test_a_clone_that_breaks_is_a_result_and_its_siblings_go_on():
    def program(context: str) -> str:
        if context.startswith("-bad"):
            raise PolicyError("out of memory")
        if not context.startswith("T"):
            return "Answer: 1\0"
        return "Answer: ok\0" if "1: (failed: out of memory)\n2: 1" in context else spawn("bad", "good")

    assert (await grow(program)).answer == "ok"


async def test_a_bug_is_not_hidden():
    def program(_: str) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await grow(program)


async def test_the_deadline_returns_what_there_is_and_charges_it():
    def program(context: str) -> str:
        return spawn("a", "b") if context.startswith("T") else "y" * 10_000

    policy = ScriptedPolicy(program, delay=0.001)
    tree = await Runtime(policy, PlainFormat()).run(task(), Budget(seconds=1))
    assert tree.root.status is Status.TIMED_OUT and policy.running == 0
    assert [c.status for c in tree.root.clones] == [Status.TIMED_OUT] * 2 or [c.status for c in tree.root.clones] == [Status.CANCELLED] * 2
    assert tree.usage.generated == sum(b.generated for b in tree.branches) > len(spawn("a", "b"))
    assert all(c.turns[-1].stop is StopReason.CANCELLED and c.turns[-1].sampled for c in tree.root.clones)


async def test_cancelling_reaches_the_engine():
    policy = ScriptedPolicy(lambda _: "y" * 10_000)
    with anyio.move_on_after(0.05):
        await Runtime(policy, PlainFormat()).run(task(), Budget())
    assert policy.running == 0 and len(policy.requests) == 1


async def test_samples_in_flight_are_bounded():
    policy = ScriptedPolicy(lambda c: spawn(*map(str, range(20))) if c.startswith("T") and "1: " not in c else "Answer: 1\0")
    await Runtime(policy, PlainFormat(), concurrency=4).run(task(), Budget())
    assert policy.most_running == 4


async def test_many_trees_stream_and_a_stalled_consumer_stops_new_ones():
    policy = ScriptedPolicy(lambda _: "Answer: 1\0")
    jobs = [Job(task(), Budget(), seed=i, key=(i,)) for i in range(40)]
    seen = []
    async with Runtime(policy, PlainFormat()).run_many(jobs, in_flight=5) as trees:
        seen.append((await trees.receive())[0].key)
        await anyio.sleep(0.05)
        assert len(policy.requests) <= 6 + 1
        async for job, tree in trees:
            assert tree.seed == job.seed
            seen.append(job.key)
    assert sorted(seen) == [(i,) for i in range(40)]


async def test_a_tree_that_was_taken_is_held_by_nobody_else():
    """What is alive is what still grows, however many trees have been consumed."""
    policy = ScriptedPolicy(lambda c: spawn("a", "b") if c.startswith("T") and "1: " not in c else "Answer: 1\0")
    alive = []
    gc.freeze()  # what other tests have left is not looked at
    try:
        async with Runtime(policy, PlainFormat()).run_many((Job(task(), Budget(), seed=i) for i in range(60)), in_flight=4) as trees:
            async for _, tree in trees:
                assert len(tree.branches) == 3
                del tree, _
                gc.collect()
                alive.append(sum(isinstance(thing, Branch | Growth) for thing in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert max(alive[30:]) <= max(alive[:30]) <= 4 * 2 * 3


async def test_leaving_early_cancels_what_still_grows():
    policy = ScriptedPolicy(lambda _: "y" * 5000)
    async with Runtime(policy, PlainFormat()).run_many([Job(task(), Budget())] * 9, in_flight=3):
        await anyio.sleep(0.02)
    assert policy.running == 0


async def test_leaving_while_a_finished_tree_waits_is_no_error():
    policy = ScriptedPolicy(lambda _: "Answer: 1\0")
    async with Runtime(policy, PlainFormat()).run_many([Job(task(), Budget(), seed=i) for i in range(9)], in_flight=3) as trees:
        async for _ in trees:
            await anyio.sleep(0.02)
            break
    assert policy.running == 0


async def test_an_error_of_the_consumer_comes_out_as_it_is():
    policy = ScriptedPolicy(lambda _: "Answer: 1\0")
    with pytest.raises(ZeroDivisionError):
        async with Runtime(policy, PlainFormat()).run_many([Job(task(), Budget(), seed=i) for i in range(9)], in_flight=3) as trees:
            async for _ in trees:
                await anyio.sleep(0.02)
                raise ZeroDivisionError


async def test_the_same_seed_asks_for_the_same_samples():
    runs = []
    for _ in range(2):
        policy = ScriptedPolicy(delegating)
        await Runtime(policy, PlainFormat()).run(task(a="1", b="2"), Budget(generated=500), seed=11)
        runs.append(sorted((r.prompt, r.seed, r.max_tokens) for r in policy.requests))
    assert runs[0] == runs[1]
    assert len({seed for _, seed, _ in runs[0]}) == len(runs[0])


async def test_a_task_without_messages_is_refused():
    with pytest.raises(TaskError, match="no messages"):
        await Runtime(ScriptedPolicy(lambda _: ""), PlainFormat()).run(Task("t", ()), Budget())


@pytest.mark.parametrize("seed", range(60))
async def test_random_programs_keep_every_limit(seed):
    """Random trees under random budgets with random failures: conservation and limits, whatever happens."""
    rng = random.Random(seed)

    def program(context: str) -> str:
        what = rng.choice(["answer", "spawn", "spawn", "malformed", "runaway", "silence", "transient", "broken"])
        if what == "spawn":
            return spawn(
                *[{"objective": "x", "max_tokens": rng.randint(1, 80)} if rng.random() < 0.5 else "y" for _ in range(rng.randint(1, 4))]
            )
        if what == "transient":
            raise TransientPolicyError("busy", retry_after=0.0)
        if what == "broken":
            raise PolicyError("gone")
        return {"answer": "Answer: 1\0", "malformed": "<tool_call>{\0", "runaway": "z" * 500, "silence": "\0"}[what]

    budget = Budget(
        generated=rng.randint(0, 600), critical_path=rng.choice([None, 300]), clones=rng.choice([None, 5]), width=3, depth=2,
        turns=4, context=900, answer_reserve=rng.choice([0, 12]), prefilled=rng.choice([None, 4000]),
    )  # fmt: skip
    policy = ScriptedPolicy(program)
    tree = await Runtime(policy, PlainFormat()).run(task(), budget)
    usage = tree.usage
    assert policy.running == 0
    assert usage.generated <= budget.generated and (budget.clones is None or usage.clones <= budget.clones)
    assert budget.critical_path is None or usage.critical_path <= budget.critical_path
    assert budget.prefilled is None or usage.prefilled <= budget.prefilled
    for branch in tree.branches:
        assert branch.depth <= 2 and len(branch.turns) <= 4 + 1 and len(branch.ids) <= 900
        assert all(len(turn.clones) <= 3 for turn in branch.turns)
        assert branch.status is not Status.CANCELLED
