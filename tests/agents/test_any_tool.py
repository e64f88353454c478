"""Any tool that a signature can make, and any mix of calls: schemas are true, and budgets are conserved on every way out."""

from __future__ import annotations

import datetime
import decimal
import enum
import inspect
import json
import keyword
import uuid
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Optional, Union

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from ramet.agents.budget import CURRENCIES, Budget, Ledger
from ramet.agents.protocol import render_call
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.simulation import simulate
from ramet.agents.tools import BranchView, Tool, ToolRequest, call_tool, tool
from ramet.agents.tree import Message, Task, ToolResult, ToolStatus, Tree
from ramet.errors import ConfigError
from tests.tools.calling import VIEW


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Nested(BaseModel):
    points: list[tuple[int, int]]
    colour: Colour = Colour.RED


class Typed(TypedDict):
    x: int


@dataclass
class Plain:
    y: float


ANNOTATIONS: list[tuple[Any, Any]] = [
    (int, 3),
    (float, 0.5),
    (str, "a\n\0\N{SNOWMAN}"),
    (bool, True),
    (type(None), None),
    (Any, {"a": [1]}),
    (list[int], [1, 2]),
    (dict[str, list[float]], {"a": [1.0]}),
    (tuple[int, str], [1, "b"]),
    (set[int], [1, 2]),
    (Optional[int], None),  # noqa: UP045
    (Union[int, str], "x"),  # noqa: UP007
    (int | None, 4),
    (Literal["a", 1], 1),
    (Annotated[int, Field(ge=2, description="at least two")], 2),
    (Colour, "blue"),
    (Nested, {"points": [[1, 2]]}),
    (Typed, {"x": 1}),
    (Plain, {"y": 1.5}),
    (datetime.date, "2020-02-29"),
    (decimal.Decimal, "0.10"),
    (uuid.UUID, "12345678-1234-5678-1234-567812345678"),
    (list, [1, "a"]),
    (object, 5),
]
"""Annotations, each with a JSON value that it takes."""

NAMES = ["copy", "json", "schema", "model_config", "model_fields", "self", "name", "arguments", "argument_0", "_x", "__y", "cls", "kind"]
names = st.sampled_from(NAMES) | st.from_regex(r"[a-z\u00e9\u4e00]{1,6}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
parameters = st.lists(
    st.tuples(names, st.sampled_from(ANNOTATIONS), st.booleans()), max_size=6, unique_by=lambda each: each[0]
)  # a name, what it takes, and whether it may be left out


def made(drawn: list[tuple[str, tuple[Any, Any], bool]], branch: int | None, seen: dict[str, Any]) -> Tool:
    """A tool of this signature, with the calling branch at a place in it, that notes what it is given."""

    async def odd(**given: Any) -> int:
        """Anything."""
        seen.update(given)
        return len(given)

    given = [(name, annotation, None if optional else inspect.Parameter.empty) for name, (annotation, _), optional in drawn]
    if branch is not None:
        given.insert(branch, ("the_branch", BranchView, inspect.Parameter.empty))
    kind = inspect.Parameter.KEYWORD_ONLY
    odd.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=default) for name, _, default in given])
    odd.__annotations__ = {name: annotation for name, annotation, _ in given}
    return tool(odd)


def called(each: Tool, arguments: Any) -> ToolResult:
    return simulate(partial(call_tool, each, ToolRequest("g", "0", 0, 0, each.name, json.dumps(arguments)), VIEW, 5.0), 0)[0]


@given(parameters, st.none() | st.integers(0, 6))
def test_the_schema_of_any_signature_says_what_is_taken(drawn, branch):
    seen: dict[str, Any] = {}
    each = made(drawn, branch, seen)
    schema = json.loads(json.dumps(each.schema))["function"]["parameters"]
    Draft202012Validator.check_schema(schema)
    accepted = Draft202012Validator(schema)
    assert list(schema.get("properties", {})) == [name for name, _, _ in drawn]
    assert set(schema.get("required", [])) == {name for name, _, optional in drawn if not optional}

    whole = {name: value for name, (_, value), _ in drawn}
    least = {name: value for name, (_, value), optional in drawn if not optional}
    for arguments in (whole, least):
        accepted.validate(arguments)
        seen.clear()
        assert called(each, arguments).status is ToolStatus.DONE
        assert seen.keys() == whole.keys() | ({"the_branch"} if branch is not None else set())
        assert branch is None or seen["the_branch"] is VIEW
    for wrong in ({**whole, "unheard_of": 1}, *({k: v for k, v in whole.items() if k != missing} for missing in least)):
        assert called(each, wrong).status is ToolStatus.INVALID and not accepted.is_valid(wrong)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(parameters, json_values | st.dictionaries(names, json_values, max_size=6))
def test_whatever_it_is_given_a_tool_is_called_or_says_what_is_wrong(drawn, arguments):
    seen: dict[str, Any] = {}
    result = called(made(drawn, None, seen), arguments)
    assert result.status in (ToolStatus.DONE, ToolStatus.INVALID)
    assert result.status is ToolStatus.DONE or (result.text and "\n" not in result.text and not seen)


@given(st.text() | st.binary().map(lambda data: data.decode(errors="replace")))
def test_whatever_text_stands_for_its_arguments_is_answered(text):
    each = made([("x", (int, 1), False)], None, {})
    result, _ = simulate(partial(call_tool, each, ToolRequest("g", "0", 0, 0, "odd", text), VIEW, 5.0), 0)
    assert result.status is ToolStatus.INVALID and result.text


def test_what_is_bound_beforehand_is_not_the_models_to_give():
    async def add(a: int, b: int, c: int = 0) -> int:
        """Adds."""
        return a + b + c

    each = tool(partial(partial(add, 1), c=5))
    assert each.name == "add" and each.description == "Adds." and list(each.parameters["properties"]) == ["b"]
    assert called(each, {"b": 2}).text == "8" and called(each, {"b": 2, "c": 1}).status is ToolStatus.INVALID


def test_methods_callable_objects_and_wrapped_functions_are_tools_as_they_are_called():
    class Adder:
        """Adds to a number of its own."""

        def __init__(self, own: int):
            self.own = own

        def __call__(self, n: int) -> int:
            return self.own + n

        async def twice(self, n: int) -> int:
            """Twice a number."""
            return 2 * n

    def indirect(n: int):
        """A function that is not async and gives what is to be awaited."""
        return Adder(0).twice(n)

    for function, value in ((Adder(5), "7"), (Adder(5).twice, "4"), (indirect, "4")):
        result, _ = anyio.run(call_tool, tool(function), ToolRequest("g", "0", 0, 0, "t", '{"n": 2}'), VIEW, 5.0)
        assert (result.status, result.text) == (ToolStatus.DONE, value)


def test_what_no_tool_can_be_made_of_is_refused_in_one_line():
    def generator(a: int):
        """Yields."""
        yield a

    async def asynchronous(a: int):
        """Yields."""
        yield a

    def branches(a: BranchView, b: BranchView) -> None:
        """Two branches."""

    def pattern(a: Annotated[str, Field(pattern="(")]) -> None:
        """No regular expression."""

    def literal(a: Literal[print]) -> None:
        """No JSON."""

    def attribute(a: decimal.Nothing) -> None:
        """No such type."""

    cases = [generator, asynchronous, branches, pattern, literal, attribute, Colour, "text", 5, print, partial(int)]
    for case in [*cases, made([], None, {})]:
        with pytest.raises(ConfigError) as error:
            tool(case)
        assert "\n" not in str(error.value) and str(error.value), case


@tool(cost=0)
async def free() -> str:
    """Costs nothing."""
    return "ok"


@tool(cost=3, max_characters=100)
async def dear() -> str:
    """Costs much, and says much."""
    await anyio.sleep(0.3)
    return "x" * 100_000


@tool(parallel=False, timeout=2.0)
async def alone(seconds: float) -> None:
    """Takes its time, by itself."""
    await anyio.sleep(seconds)


@tool(timeout=1.5)
async def hang() -> None:
    """Never returns."""
    await anyio.sleep_forever()


@tool(cost=2)
async def broken(how: int) -> Any:
    """Raises."""
    raise [ValueError("x"), SystemExit(3), ExceptionGroup("g", [OSError()]), TimeoutError()][how]


@tool
async def spend(branch: BranchView) -> dict[str, float]:
    """Looks at what is left."""
    return branch.ledger.remaining()


def text(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


calls = st.one_of(
    st.sampled_from([text("free"), text("dear"), text("hang"), text("spend")]),
    st.floats(0, 3).map(lambda seconds: text("alone", seconds=seconds)),
    st.integers(0, 3).map(lambda how: text("broken", how=how)),
    st.sampled_from([text("nothing"), text("dear", more=1), text("alone", seconds="soon"), "<tool_call>{</tool_call>"]),
    st.integers(1, 2).map(lambda clones: f"<tool_call>{render_call(['part'] * clones)}</tool_call>"),
)
turns = st.lists(calls, min_size=1, max_size=4).map("".join)
limits = st.builds(
    Budget,
    tool_calls=st.none() | st.integers(0, 12),
    tool_seconds=st.none() | st.integers(0, 60).map(lambda tenths: tenths / 10),
    generated=st.none() | st.integers(0, 3000),
    clones=st.integers(0, 8),
    depth=st.integers(0, 2),
    seconds=st.none() | st.floats(0.1, 5),
)


@settings(max_examples=30)
@given(st.lists(turns, max_size=3), st.lists(turns, max_size=2), limits, st.integers(0, 1000), st.none() | st.floats(0, 6))
def test_budgets_are_conserved_over_any_mix_of_calls(root, clone, budget, seed, cancelled):
    """In virtual time, in any interleaving, and if all of it is cancelled from outside."""
    ledgers: dict[str, Ledger] = {}

    async def caller(each: Tool, request: ToolRequest, view: BranchView, timeout: float) -> tuple[ToolResult, float]:
        ledgers[view.id] = view.ledger
        return await call_tool(each, request, view, timeout)

    def program(context: str) -> str:
        script, turn = root if context.startswith("Troot") else clone, context.count("\0")
        return script[turn] + "\0" if turn < len(script) else "Answer: done\0"

    async def run() -> Tree | None:
        tools = [free, dear, alone, hang, broken, spend]
        runtime = Runtime(ScriptedPolicy(program), PlainFormat(), tools=tools, caller=caller, max_turn_tokens=2000)
        with anyio.move_on_after(cancelled):
            return await runtime.run(Task("t", (Message("user", "root"),)), budget, seed=seed)
        return None

    tree = simulate(run, seed)
    for ledger in ledgers.values():
        assert not any(ledger.reserved(currency) for currency in CURRENCIES)
    if "0" in ledgers:
        ledgers["0"].check()
    if tree is None:
        return
    made = [call for branch in tree.branches for turn in branch.turns for call in turn.calls]
    assert tree.usage.tool_calls == sum(call.cost for call in made) <= (budget.tool_calls if budget.tool_calls is not None else 10**9)
    spent = sum(round(1000 * call.seconds) for call in made)
    assert round(1000 * tree.usage.tool_seconds) == spent
    assert budget.tool_seconds is None or spent <= 1000 * budget.tool_seconds
    if "0" in ledgers:
        assert (ledgers["0"].spent("tool_calls"), ledgers["0"].spent("tool_milliseconds")) == (tree.usage.tool_calls, spent)
    assert all(call.cost == call.seconds == 0 for call in made if call.result.status is ToolStatus.REFUSED)
    assert {call.name for call in made} == tree.tools().keys()
    bill = Counter({name: usage.calls for name, usage in tree.tools().items()})
    assert bill == Counter(call.name for call in made)
