"""What a user may put around a runtime: follow-ups, middleware, approval, the tree of a cancelled run; on both of anyio's backends."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Any

import anyio
import pytest

from ramet.agents.budget import Budget
from ramet.agents.growth import Role
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleFunction, SampleRequest
from ramet.agents.scripted import Fault, PlainFormat, ScriptedPolicy
from ramet.agents.tree import Message, Segment, Status, Task, Tree
from ramet.errors import PolicyError, TaskError, TransientPolicyError

pytestmark = pytest.mark.anyio
PLAIN = PlainFormat()
SPAWN = '<tool_call>{"name":"spawn_clone","arguments":{"objectives":["left","right"]}}</tool_call>\0'


def model(context: str) -> str:
    """The root spawns two clones and answers what they told it; to "and then?" it says how often it was asked."""
    if not context[1:].startswith("root"):
        return "Answer: 1\0"
    if context.count("|") > 1:
        return f"Answer: asked {context.count('|')} times\0"
    return "Answer: 2\0" if "<" in context.replace("<tool_call>", "").replace("</tool_call>", "") else SPAWN


def task(text: str = "root", **more: Any) -> Task:
    return Task("t", (Message("user", text),), **more)


async def test_a_message_goes_on_with_a_finished_tree():
    runtime = Runtime(ScriptedPolicy(model), PLAIN, always_show_budget=False)
    first = await runtime.run(task(), Budget())
    second = await runtime.run(task("and then?"), Budget(depth=0), after=first)
    third = await runtime.run(task("and then?"), Budget(depth=0), after=second)
    assert (first.answer, second.answer, third.answer) == ("2", "asked 2 times", "asked 3 times")
    assert list(second.root.prompt[: len(first.root.ids)]) == first.root.ids  # ids, not text that is encoded again
    assert PLAIN.text(second.root.prompt[len(first.root.ids) :]) == "and then?|"
    assert not any(second.root.mask[: len(second.root.prompt)])  # what was trained with the first tree is not trained again
    assert second.usage.generated == len("Answer: asked 2 times$")


@pytest.mark.parametrize("budget", [Budget(generated=4), Budget(generated=len(SPAWN) + 2, depth=1)])
async def test_a_tree_that_was_cut_can_be_gone_on_with(budget: Budget):
    runtime = Runtime(ScriptedPolicy(model), PLAIN, always_show_budget=False)
    cut = await runtime.run(task(), budget)
    assert cut.root.status is not Status.ANSWERED
    after = await runtime.run(task("and then?"), Budget(depth=0), after=cut)
    assert after.answer == "asked 2 times" and PLAIN.text(after.root.prompt).endswith("$and then?|")


async def test_only_one_message_of_the_user_follows():
    runtime = Runtime(ScriptedPolicy(model), PLAIN)
    first = await runtime.run(task(), Budget())
    for messages in [(), (Message("user", "a"), Message("user", "b")), (Message("system", "a"),), (Message("user", "a", (Segment("v"),)),)]:
        with pytest.raises(TaskError, match="message"):
            await runtime.run(Task("t", messages), Budget(), after=first)


async def test_every_request_goes_through_the_middleware_in_order():
    passed: list[tuple[str, str]] = []

    def layer(name: str) -> Any:
        async def middleware(request: SampleRequest, partial: Partial, sample: SampleFunction) -> Sample:
            passed.append((name, request.branch))
            return await sample(request, partial)

        return middleware

    roles = {"reader": Role(policy=ScriptedPolicy(model), trainable=False)}
    call = SPAWN.replace('"right"', '{"objective":"right","role":"reader"}')
    policy = ScriptedPolicy(lambda context: call if model(context) == SPAWN else model(context))
    tree = await Runtime(policy, PLAIN, middleware=[layer("outer"), layer("inner")], roles=roles).run(task(), Budget())
    assert tree.answer == "2" and passed[::2] == [("outer", branch) for _, branch in passed[1::2]]
    assert sorted(branch for _, branch in passed[1::2]) == ["0", "0", "0.0", "0.1"]


async def test_middleware_may_ask_again_and_what_that_cost_is_charged():
    async def retrying(request: SampleRequest, partial: Partial, sample: SampleFunction) -> Sample:
        if request.branch == "0.0":
            raise TransientPolicyError("not yet") if request.max_tokens == 50 else PolicyError("never")
        return await sample(request, partial)

    tree = await Runtime(ScriptedPolicy(model), PLAIN, middleware=[retrying], attempts=1).run(task(), Budget(generated=500))
    assert tree.root.clones[0].status is Status.FAILED and tree.root.clones[0].reason == "never" and tree.answer == "2"


async def test_middleware_that_raises_or_changes_a_prompt_fails_its_branch_alone():
    async def raising(request: SampleRequest, partial: Partial, sample: SampleFunction) -> Sample:
        return await sample(request, partial) if request.branch == "0" else 1 / 0  # type: ignore[return-value]

    async def changing(request: SampleRequest, partial: Partial, sample: SampleFunction) -> Sample:
        return await sample(request if request.branch == "0" else replace(request, prompt=(1, 2)), partial)

    for middleware, why in ((raising, "the middleware raising raised ZeroDivisionError"), (changing, "changed a prompt")):
        tree = await Runtime(ScriptedPolicy(model), PLAIN, middleware=[middleware]).run(task(), Budget())
        assert tree.answer == "2" and all(why in clone.reason for clone in tree.root.clones)


async def test_an_approval_that_raises_refuses_the_call():
    async def approve(branch: str, name: str, arguments: str) -> bool:
        raise KeyError("nobody there")

    tree = await Runtime(ScriptedPolicy(model), PLAIN, approve=approve).run(task(), Budget())
    assert tree.usage.clones == 0 and "not approved: asking raised KeyError" in PLAIN.text(tree.root.ids)


async def test_a_run_that_is_cancelled_leaves_its_tree_as_it_stood():
    left: list[Tree] = []
    policy = ScriptedPolicy(model, faults=lambda request, attempt: Fault(2, 3600) if request.branch == "0.1" else None)
    with anyio.move_on_after(0.05) as scope:
        await Runtime(policy, PLAIN, on_cancel=left.append).run(task(), Budget(generated=500))
    assert scope.cancelled_caught
    (tree,) = left
    assert tree.root.status is Status.CANCELLED and [clone.status for clone in tree.root.clones] == [Status.ANSWERED, Status.CANCELLED]
    assert tree.usage.generated == sum(branch.generated for branch in tree.branches) and tree.root.clones[1].generated == 2


async def test_leaving_a_stream_leaves_its_tree_too():
    left: list[Tree] = []
    async with aclosing(Runtime(ScriptedPolicy(model), PLAIN, on_cancel=left.append).stream(task(), Budget())) as events:
        async for event in events:
            if event.branch == "0.1":
                break
    (tree,) = left
    assert tree.root.status is Status.CANCELLED and tree.usage.clones == 2
