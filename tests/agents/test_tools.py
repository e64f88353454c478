"""Tools beside clones: their schemas, their results, their budget, their place in the tree; on both of anyio's backends."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import anyio
import pytest
import sniffio
from pydantic import BaseModel, Field

from ramet.agents.budget import Budget, Ledger
from ramet.agents.context import ContextStore
from ramet.agents.journal import Journal
from ramet.agents.program import ProgramBranch
from ramet.agents.protocol import CloneResult, Reply, render_call, render_replies
from ramet.agents.resume import JournaledPolicy, JournaledTools
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.simulation import simulate
from ramet.agents.tools import BranchView, Tool, ToolRequest, budget, call_tool, read, tool
from ramet.agents.tree import Message, Status, Task, ToolResult, ToolStatus, Tree
from ramet.errors import ConfigError

pytestmark = pytest.mark.anyio
VIEW = BranchView("0", ContextStore({}), Ledger.for_root(Budget()))


class Point(BaseModel):
    """A value that is no text."""

    x: int


@tool
async def twice(n: Annotated[int, Field(ge=0)], kind: Literal["a", "b"] = "a") -> int:
    """Twice a number."""
    return 2 * n


@tool(cost=3, name="look-up", timeout=5.0)
def slow(copy: str, _x: Point | None = None) -> Point:
    """A function that is not async, with parameters that pydantic would not take for fields."""
    return Point(x=len(copy))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def spawn(*objectives: Any, keys: Sequence[str] = ()) -> str:
    return f"<tool_call>{render_call(objectives, keys)}</tool_call>"


async def grow(
    program: Callable[[str], str], *tools: Tool, limits: Budget | None = None, documents: dict[str, str] | None = None, **options: Any
) -> Tree:
    runtime = Runtime(ScriptedPolicy(program), PlainFormat(), tools=tools, **options)
    return await runtime.run(Task("t", (Message("user", "root"),), documents or {}), limits or Budget())


def once(*calls: str) -> Callable[[str], str]:
    """A root that makes these calls and answers with what it is told."""
    return lambda context: f"Answer: {' '.join(context.rpartition('<')[2][:-1].split())}\0" if "<" in context else "".join(calls) + "\0"


async def run(made: Tool, text: str, timeout: float = 5.0) -> tuple[ToolStatus, str]:
    result, _ = await call_tool(made, ToolRequest("g", "0", 0, 0, made.name, text), VIEW, timeout)
    return result.status, result.text


def test_a_schema_is_made_of_signature_and_docstring():
    function = twice.schema["function"]
    assert (function["name"], function["description"]) == ("twice", "Twice a number.")
    properties = function["parameters"]["properties"]
    assert properties["n"] == {"minimum": 0, "type": "integer"} and properties["kind"]["enum"] == ["a", "b"]
    assert function["parameters"]["required"] == ["n"] and function["parameters"]["additionalProperties"] is False
    assert list(slow.schema["function"]["parameters"]["properties"]) == ["copy", "_x"]
    assert "branch" not in read.schema["function"]["parameters"]["properties"]


async def test_arguments_are_validated_and_values_written():
    assert await run(twice, '{"n": 4}') == (ToolStatus.DONE, "8")
    assert await run(slow, '{"copy": "abc", "_x": {"x": 1}}') == (ToolStatus.DONE, '{"x":3}')
    for wrong, said in (({"n": -1}, "n: "), ({"n": "x"}, "n: "), ({}, "n: "), ({"n": 1, "m": 2}, "m: "), ({"n": 1, "kind": "c"}, "kind: ")):
        status, text = await run(twice, json.dumps(wrong))
        assert status is ToolStatus.INVALID and said in text and "\n" not in text, wrong


async def test_whatever_a_tool_does_is_its_result():
    @tool(max_characters=100)
    async def odd(what: str) -> Any:
        """Does what it is told."""
        if what == "raise":
            raise RuntimeError("broken\nin two lines")
        if what == "group":
            raise ExceptionGroup("several", [ValueError("one"), ValueError("two")])
        if what == "hang":
            await anyio.sleep_forever()
        if what == "exit":
            raise SystemExit(3)
        if what == "endless":
            return itertools.count()
        if what == "timeout":
            raise TimeoutError("its own")
        if what == "cancel":
            raise asyncio.CancelledError
        own = ToolResult(ToolStatus.TIMED_OUT, "y" * 10**6)
        return {"nothing": None, "object": object(), "own": own, "surrogate": "\ud800", "big": "x" * 10**6}[what]

    assert await run(odd, '{"what": "raise"}') == (ToolStatus.FAILED, "RuntimeError: broken")
    assert (await run(odd, '{"what": "group"}'))[0] is ToolStatus.FAILED
    assert await run(odd, '{"what": "timeout"}') == (ToolStatus.FAILED, "TimeoutError: its own")
    assert await run(odd, '{"what": "hang"}', 0.01) == (ToolStatus.TIMED_OUT, "no result within 0.01 seconds")
    if sniffio.current_async_library() == "asyncio":  # a task of its own that it awaited was cancelled
        assert await run(odd, '{"what": "cancel"}') == (ToolStatus.FAILED, "CancelledError: CancelledError")
    assert await run(odd, '{"what": "nothing"}') == (ToolStatus.DONE, "")
    assert (await run(odd, '{"what": "object"}'))[0] is ToolStatus.FAILED
    for what in ("exit", "surrogate", "endless"):
        status, text = await run(odd, json.dumps({"what": what}))
        assert status is (ToolStatus.DONE if what == "surrogate" else ToolStatus.FAILED) and text.encode()
    status, text = await run(odd, '{"what": "own"}')
    assert status is ToolStatus.TIMED_OUT and text.startswith("yyy") and len(text) <= 100
    status, text = await run(odd, '{"what": "big"}')
    assert status is ToolStatus.DONE and len(text) <= 100 and "characters cut" in text


async def test_functions_that_never_end_keep_neither_others_nor_the_process_waiting():
    ends = threading.Event()

    @tool
    def hang() -> None:
        """Never ends."""
        ends.wait()

    @tool
    def quick() -> str:
        """Ends."""
        return "done"

    async def hung() -> None:
        assert (await run(hang, "{}", 0.01))[0] is ToolStatus.TIMED_OUT

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(hung)
    assert await run(quick, "{}") == (ToolStatus.DONE, "done")
    left = [thread for thread in threading.enumerate() if thread.name == "tool hang"]
    assert left and all(thread.daemon for thread in left)
    ends.set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_tool_or_program_does_not_swallow_the_cancellation_of_its_task():
    waits = asyncio.Event()

    @tool
    async def wait() -> None:
        """Waits."""
        waits.set()
        await anyio.sleep_forever()

    async def calling(branch: ProgramBranch) -> None:
        await branch.call("wait")

    async def waiting(branch: ProgramBranch) -> None:
        await wait()

    for program in (calling, waiting):
        waits.clear()
        runtime = Runtime(ScriptedPolicy(lambda context: "Answer: 1\0"), PlainFormat(), tools=[wait])
        task = asyncio.create_task(runtime.run(Task("t", (Message("user", "root"),)), Budget(), program=program))
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_what_cannot_be_a_tool_is_refused_in_one_line():
    async def unannotated(x) -> str:
        """Something."""

    async def undocumented(x: int) -> str: ...

    async def many(*x: int) -> str:
        """Something."""

    async def unwritable(x: Callable[[], int]) -> str:
        """Something."""

    async def undefined(x: Nowhere) -> str:  # noqa: F821
        """Something."""

    async def spawn_clone(x: int) -> str:
        """Something."""

    cases = {
        unannotated: "x has no annotation",
        undocumented: "no docstring",
        many: "cannot be given by name",
        unwritable: "no JSON schema",
        undefined: "Nowhere",
        spawn_clone: "is taken",
    }
    for function, said in cases.items():
        with pytest.raises(ConfigError, match=said) as error:
            tool(function)
        assert "\n" not in str(error.value)
    for options in ({"cost": -1}, {"cost": 0.5}, {"timeout": 0}, {"timeout": float("inf")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            tool(**options)(twice.call)
    for tools, said in (([twice, twice], "two tools are called twice"), ([twice.call], "not a tool")):
        with pytest.raises(ConfigError, match=said):
            Runtime(ScriptedPolicy(once()), PlainFormat(), tools=tools)
    with pytest.raises(ConfigError, match="tools_at"):
        Runtime(ScriptedPolicy(once()), PlainFormat(), tools_at="nowhere")


async def test_a_call_stands_in_the_tree_and_on_the_bill_and_is_never_trained():
    tree = await grow(once(call("look-up", copy="abc")), slow)
    assert (tree.answer, tree.root.status) == ('{"x":3}', Status.ANSWERED)
    made = tree.root.turns[0].calls[0]
    assert (made.name, json.loads(made.arguments), made.result.status, made.cost) == ("look-up", {"copy": "abc"}, ToolStatus.DONE, 3)
    assert tree.usage.tool_calls == 3 and tree.usage.tool_seconds == made.seconds == tree.tools()["look-up"].seconds
    sampled = [i for i, trained in zip(tree.root.ids, tree.root.mask, strict=True) if trained]
    assert "".join(map(chr, sampled)).count("abc") == 1  # as it wrote it, and not as it was told


async def test_several_calls_a_turn_beside_clones_are_answered_in_call_order():
    def program(context: str) -> str:
        if "part" in context and not context.startswith("Troot"):
            return "Answer: 5\0"
        return once(call("twice", n=1), spawn("part", "part"), call("nope"), call("twice", n="x"))(context)

    tree = await grow(program, twice)
    wrong = "call: (invalid: no tool 'nope'; there are spawn_clone, twice) twice: (invalid: n:"
    assert tree.answer.startswith(f"twice: 2 spawn_clone: 1: 5 2: 5 {wrong}")
    assert tree.usage.clones == 2 and [c.number for c in tree.root.turns[0].calls] == [0, 3]
    tree = await grow(once(spawn("part"), spawn("part")), twice)
    assert tree.usage.clones == 0 and "one spawn_clone a turn" in tree.answer
    tree = await grow(once(*[call("twice", n=1)] * 70), twice, max_turn_tokens=10_000)
    assert len(tree.root.turns[0].calls) == 64 and "at most 64 calls a turn" in tree.answer


async def test_calls_run_in_parallel_but_where_a_tool_does_not_allow_it():
    running, most = {"free": 0, "single": 0}, {"free": 0, "single": 0}

    async def enter(which: str) -> None:
        running[which] += 1
        most[which] = max(most[which], running[which])
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        running[which] -= 1

    @tool
    async def free() -> None:
        """Runs beside others."""
        await enter("free")

    @tool(parallel=False)
    async def single() -> None:
        """Runs alone."""
        await enter("single")

    await grow(once(*[call("free"), call("single")] * 3), free, single)
    assert most == {"free": 3, "single": 1}


def test_calls_take_the_time_that_they_take_beside_clones_and_one_another():
    """On a virtual clock: two tools that run alone beside one that does not and beside a clone, and where each call stands."""
    requests: list[ToolRequest] = []

    @tool(timeout=60.0, parallel=False)
    async def alone(seconds: float) -> None:
        """Runs alone."""
        await anyio.sleep(seconds)

    @tool(timeout=60.0)
    async def beside(seconds: float) -> None:
        """Runs beside others."""
        await anyio.sleep(seconds)

    async def caller(made: Tool, request: ToolRequest, view: BranchView, timeout: float) -> tuple[ToolResult, float]:
        requests.append(request)
        return await call_tool(made, request, view, timeout)

    def program(context: str) -> str:
        if context.startswith("Troot") and context.count("$<") < 2:
            return call("alone", seconds=2) + call("beside", seconds=4) + spawn("part") + call("alone", seconds=1) + "\0"
        return "Answer: 1\0"

    async def main() -> Tree:
        policy = ScriptedPolicy(program, 0.25, stride=1000)
        runtime = Runtime(policy, PlainFormat(), tools=[alone, beside], caller=caller, max_turn_tokens=1000)
        return await runtime.run(Task("t", (Message("user", "root"),)), Budget(tool_seconds=300))

    tree = simulate(main, 0)
    first, second, _ = tree.root.turns
    assert [[each.seconds for each in turn.calls] for turn in (first, second)] == [[2.0, 4.0, 1.0]] * 2
    sampled = 0.25 * sum(len(turn.sampled) for turn in tree.root.turns)
    assert tree.usage.tool_seconds == 14.0 and tree.usage.seconds == sampled + 2 * 4.0
    places = {(each.branch, each.turn, each.number, each.name) for each in requests}
    assert places == {("0", turn, number, name) for turn in (0, 1) for number, name in ((0, "alone"), (1, "beside"), (3, "alone"))}


async def test_calls_beyond_the_budget_are_refused_and_shares_return():
    tree = await grow(once(*[call("look-up", copy="a")] * 3), slow, limits=Budget(tool_calls=7))
    assert [c.result.status for c in tree.root.turns[0].calls] == [ToolStatus.DONE, ToolStatus.DONE, ToolStatus.REFUSED]
    assert tree.usage.tool_calls == 6 and "(refused: no tool_calls left)" in tree.answer and "[left 1 tool calls]" in tree.answer

    @tool
    async def hang() -> None:
        """Never returns."""
        await anyio.sleep_forever()

    tree = await grow(once(call("hang"), call("hang")), hang, limits=Budget(tool_seconds=0.02))
    assert [c.seconds for c in tree.root.turns[0].calls] == [0.01, 0.01]
    assert {c.result.status for c in tree.root.turns[0].calls} == {ToolStatus.TIMED_OUT}
    tree = await grow(once(call("hang")), hang, limits=Budget(tool_seconds=0))
    assert tree.answer.startswith("(refused: no tool_seconds left)")

    def program(context: str) -> str:  # each clone has half of what is left, and what it did not use returns
        if context.startswith("Troot"):
            return once(spawn("part", "part"))(context)
        return once(call("budget"))(context)

    tree = await grow(program, budget, slow, limits=Budget(tool_calls=9))
    assert tree.answer.count('"tool_calls":4') == 2 and tree.answer.endswith("[left 9 tool calls]")


async def test_reading_brings_documents_into_the_branch_by_key_range_or_glob():
    documents = {"A": "one", "B": "two", "C": "three", "notes/x": "four"}
    cases = ((["B"], "B: two"), (["A-C"], "A: one B: two C: three"), (["NOTES/*", "zz"], "notes/x: four (unknown context keys: zz)"))
    for keys, said in cases:
        tree = await grow(once(call("read", keys=keys)), read, documents=documents)
        assert tree.answer == said and tree.usage.tool_calls == 0
    assert tree.usage.prefilled > len(tree.root.prompt) + len("notes/x: four")


async def test_documents_are_fanned_out_without_being_spelled():
    def program(context: str) -> str:
        if context.startswith("Troot"):
            return once(spawn({"objective": "add", "each": ["A-D", "E*"], "per_clone": 2}, keys=["Q"]))(context)
        return f"Answer: {'+'.join(line[0] for line in context[1:].split('|')[0].splitlines()[:-1])}\0"

    documents = {key: key.lower() for key in "ABCDEQ"}
    tree = await grow(program, documents=documents)
    assert tree.answer == "1: A+B+Q 2: C+D+Q 3: E+Q" and [c.objective for c in tree.root.clones] == ["add"] * 3
    tree = await grow(once(spawn({"objective": "add", "each": ["Z*"]})), documents=documents)
    assert tree.answer == "1: (refused: each: no document is called Z*)"
    tree = await grow(once(spawn({"objective": "a", "per_clone": 2})))
    assert "per_clone goes with each" in tree.answer


async def test_tools_are_held_where_they_should_be():
    def program(context: str) -> str:
        told = once(call("twice", n=2))(context)
        return told if not context.startswith("Troot") or "<" in context else spawn("part") + "\0"

    assert (await grow(program, twice, tools_at="clones")).answer == "1: 4"
    assert "spawn_clone is not available" in (await grow(program, twice, tools_at="root")).answer
    assert (await grow(once(call("twice", n=2)), twice, tools_at="root", limits=Budget(depth=0))).answer == "4"


async def test_a_call_that_is_not_approved_is_not_made():
    asked = []

    async def approve(branch: str, name: str, arguments: str) -> bool:
        asked.append((branch, name))
        return name != "twice"

    root = once(call("twice", n=2), spawn("part"))
    tree = await grow(lambda c: root(c) if c.startswith("Troot") else "Answer: 1\0", twice, approve=approve)
    assert asked == [("0", "twice"), ("0", "spawn_clone")] and tree.answer == "twice: (refused: not approved) spawn_clone: 1: 1"


def test_a_cancelled_call_is_charged_and_on_record():
    """On a virtual clock."""

    @tool
    async def hang() -> None:
        """Never returns."""
        await anyio.sleep_forever()

    tree = simulate(lambda: grow(once(call("hang")), hang, limits=Budget(seconds=5)), 0)
    made = tree.root.turns[0].calls[0]
    assert tree.root.status is Status.TIMED_OUT and made.result.status is ToolStatus.CANCELLED
    assert made.seconds == tree.usage.tool_seconds == 5.0 and tree.usage.tool_calls == 1


async def test_a_journal_gives_back_what_tools_returned(tmp_path):
    numbers = iter(range(100))

    @tool
    async def count() -> int:
        """The next number."""
        return next(numbers)

    async def again() -> tuple[Tree, int]:
        with Journal(tmp_path / "j", "job") as journal:
            caller = JournaledTools(journal)
            policy = JournaledPolicy(ScriptedPolicy(once(call("count"), call("count"))), journal)
            runtime = Runtime(policy, PlainFormat(), tools=[count], caller=caller)
            return await runtime.run(Task("t", (Message("user", "root"),)), Budget()), caller.called

    (first, called), (second, later) = await again(), await again()
    assert (called, later) == (2, 0) and first.root.turns == second.root.turns
    assert sorted(first.answer.split()) == ["0", "1", "count:", "count:"]


@pytest.mark.parametrize("limit", [10, 60, 400])
def test_replies_are_cut_alike(limit):
    results = (CloneResult(Status.ANSWERED, "y" * 300), CloneResult(Status.EMPTY))
    replies = [Reply("a", text="x" * 300), Reply("spawn_clone", results), Reply("b", text="z")]
    text = "\n".join(render_replies(replies, "[left]", limit))
    assert text.endswith("b: z\n[left]") and len(text) <= max(limit, 60) + len("\n[left]")
