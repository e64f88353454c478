"""Tools: typed functions that a branch may call beside `spawn_clone`, under the same ledger.

    @tool(cost=1)
    async def search(query: str, k: int = 3) -> str:
        "Search the corpus."

The schema comes from the signature and the docstring. Arguments are validated before the function runs; whatever goes
wrong (arguments, an exception, a time limit, a result too long or not writable) becomes a typed `ToolResult` that the
branch reads, never an exception in the tree. A parameter annotated with `BranchView` is not the model's: it is handed
the calling branch, for tools that need its documents or its budget.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import typing
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, overload

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.json_schema import PydanticJsonSchemaWarning
from pydantic_core import to_json

from ramet.agents.budget import Ledger
from ramet.agents.context import ContextStore
from ramet.agents.protocol import SPAWN, elide, explain
from ramet.agents.tasks import cancelled_from_outside
from ramet.agents.threads import in_thread
from ramet.agents.tree import ToolResult, ToolStatus
from ramet.errors import ConfigError, first_line

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class BranchView:
    """The branch that calls a tool: its name in the tree, its documents, and what it may still spend."""

    id: str
    store: ContextStore
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    call            takes validated arguments by name (and the branch, where `branch` names a parameter); gives any value, or a
                    `ToolResult` where it is for the tool to say how the call ended
    parameters      JSON schema of the arguments
    cost            of the currency `tool_calls`, for each call
    timeout         seconds that one call may take
    max_characters  of one result; longer ones are cut in their middle, with a mark that says how much
    parallel        may run beside the other calls of its turn; if not, those run one after another, in order
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[..., Awaitable[Any]]
    arguments: type[BaseModel] | None = None
    branch: str = ""
    cost: int = 1
    timeout: float = 60.0
    max_characters: int = 100_000
    parallel: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == SPAWN:
            raise ConfigError(f"a tool cannot be called {self.name!r}: a name has letters, digits, _ and -, and {SPAWN} is taken")
        if self.cost < 0 or self.cost != int(self.cost):
            raise ConfigError(f"tool {self.name}: a cost is a whole number of tool_calls, 0 or more, not {self.cost}")
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"tool {self.name}: a timeout is a positive number of seconds, not {self.timeout}")
        if self.max_characters < 1:
            raise ConfigError(f"tool {self.name}: max_characters is {self.max_characters}; give at least 1")

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the JSON-schema form that chat templates and servers take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    async def __call__(self, **arguments: Any) -> Any:
        """Call the function itself, for tests and programs: nothing is validated, limited or charged."""
        return await self.call(**arguments)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *, name: str = "", cost: int = 1, timeout: float = 60.0, max_characters: int = 100_000, parallel: bool = True
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, *, name: str = "", **options: Any) -> Any:
    """Make a `Tool` of a function: `@tool`, or `@tool(cost=2, timeout=10)`; the options are those of `Tool`.

    A function that is not async runs in a worker thread, which goes on, ignored, when its time is up. What a `functools.partial` has
    bound is not the model's to give. Raises `ConfigError` for what cannot be a tool: a parameter without an annotation, one that no
    JSON can fill, no docstring, a function that yields.
    """
    if function is None:
        return partial(_tool, name=name, **options)
    return _tool(function, name=name, **options)


def _tool(function: Callable[..., Any], name: str, **options: Any) -> Tool:
    inner, bound = _unbound(function)
    name = name or getattr(inner, "__name__", type(inner).__name__)
    description = inspect.cleandoc(inspect.getdoc(inner) or "")
    if not description:
        raise ConfigError(f"tool {name} has no docstring; write there what the tool does, for the model reads it")
    try:
        hints = typing.get_type_hints(inner if inspect.isroutine(inner) else type(inner).__call__, include_extras=True)
        parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in bound]
    except NameError as error:
        raise ConfigError(f"tool {name}: {error.name} in its annotations is not defined where it stands") from None
    except Exception as error:  # an annotation may be any expression
        raise ConfigError(f"tool {name}: its signature cannot be read: {first_line(error)}") from None
    branch, fields = "", {}
    for number, parameter in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"tool {name}: {parameter} cannot be given by name; give it named parameters only")
        if parameter.name not in hints:
            raise ConfigError(f"tool {name}: parameter {parameter.name} has no annotation, from which its schema would come")
        if hints[parameter.name] is BranchView and branch:
            raise ConfigError(f"tool {name}: both {branch} and {parameter.name} are the branch that calls; there is one")
        if hints[parameter.name] is BranchView:
            branch = parameter.name
        else:
            default = ... if parameter.default is parameter.empty else parameter.default
            # By alias: pydantic does not take every name (`copy`, `_x`) for a field.
            fields[f"argument_{number}"] = (hints[parameter.name], Field(default, alias=parameter.name))
    arguments, schema = _schema(name, fields)
    return Tool(name, description, schema, _awaitable(function), arguments, branch, **options)


def _unbound(function: Any) -> tuple[Any, frozenset[str]]:
    """What a `functools.partial` is of, and the names that it has bound. Raises `ConfigError` for what is not a function."""
    inner: Any = function
    bound = frozenset[str]()
    while isinstance(inner, partial):
        inner, bound = inner.func, bound | inner.keywords.keys()
    if isinstance(inner, Tool):
        raise ConfigError(f"tool {inner.name} is a tool already")
    if not callable(inner) or isinstance(inner, type):
        raise ConfigError(f"{str(inner)[:80]!r} is not a function, of which a tool could be made")
    if any(yields(each) for yields in (inspect.isgeneratorfunction, inspect.isasyncgenfunction) for each in (inner, inner.__call__)):
        raise ConfigError(f"{getattr(inner, '__name__', type(inner).__name__)} yields, which a tool cannot; return a list")
    return inner, bound


def _schema(name: str, fields: Mapping[str, Any]) -> tuple[type[BaseModel], dict[str, Any]]:
    """A model of a tool's arguments, and its JSON schema."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # of a default that is no JSON
            arguments = create_model(f"{name}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
            schema = arguments.model_json_schema()
    except Exception as error:  # an annotation may be of any type, and bring any code
        raise ConfigError(f"tool {name}: no JSON schema can be made of its parameters: {first_line(error)}") from None
    schema.pop("title", None)
    for described in schema.get("properties", {}).values():
        described.pop("title", None)
    return arguments, schema


def _awaitable(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return function

    async def threaded(**arguments: Any) -> Any:
        value = await in_thread(partial(function, **arguments), f"tool {getattr(function, '__name__', type(function).__name__)}")
        return await value if inspect.isawaitable(value) else value

    return threaded


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """One call to be made. `group`, `branch`, `turn` and `number` say where in which tree: no two calls of a job share them."""

    group: str
    branch: str
    turn: int
    number: int
    name: str
    arguments: str


class ToolCaller(Protocol):
    """Who makes the calls: the tools themselves, or a journal that has them already."""

    async def __call__(self, tool: Tool, request: ToolRequest, view: BranchView, timeout: float) -> tuple[ToolResult, float]:
        """The result of a call, within `timeout` seconds, and the seconds that it took."""


async def call_tool(tool: Tool, request: ToolRequest, view: BranchView, timeout: float) -> tuple[ToolResult, float]:
    """Validate the arguments, run the tool within `timeout` seconds, and write what it returns as text.

    Raises nothing but cancellation from outside: whatever the tool does becomes its result.
    """
    started = anyio.current_time()
    result = ToolResult(ToolStatus.TIMED_OUT, f"no result within {timeout:g} seconds")
    try:
        with anyio.move_on_after(timeout):
            result = await _result(tool, request.arguments, view)
    except anyio.get_cancelled_exc_class() as error:
        if cancelled_from_outside():
            raise
        # Nobody outside has asked for it: the tool awaited something that was cancelled.
        result = ToolResult(ToolStatus.FAILED, f"{type(error).__name__}: {first_line(error)}")
    return result, anyio.current_time() - started


async def _result(tool: Tool, text: str, view: BranchView) -> ToolResult:
    try:
        given = json.loads(text)
        if tool.arguments is not None:
            model = tool.arguments.model_validate(given)
            given = {str(info.alias): getattr(model, name) for name, info in type(model).model_fields.items()}
    except ValidationError as error:
        return ToolResult(ToolStatus.INVALID, explain(error))
    except (ValueError, RecursionError) as error:
        return ToolResult(ToolStatus.INVALID, f"call is not valid JSON: {first_line(error)}")
    if tool.branch:
        given = {**given, tool.branch: view}
    try:
        value = await tool.call(**given)
        result = value if isinstance(value, ToolResult) else ToolResult(ToolStatus.DONE, as_text(value))
    except (Exception, SystemExit) as error:  # a tool is anybody's code; what it raises is for the branch to read
        result = ToolResult(ToolStatus.FAILED, f"{type(error).__name__}: {first_line(error)}")
    # Half a surrogate pair is no text that can be written to a file.
    return replace(result, text=elide(result.text, tool.max_characters).encode(errors="replace").decode())


def as_text(value: Any) -> str:
    """A tool's value as the model reads it: text as it is, nothing as nothing, all else as JSON. Raises for what is no JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, Iterator):
        raise TypeError(f"a {type(value).__name__} is not a value, and may have no end; return a list")
    return "" if value is None else to_json(value).decode()


@tool(cost=0, timeout=10.0)
async def read(keys: list[str], branch: BranchView) -> str:
    """Read documents into your own context: by key, by range (A-I) or by glob (*). It costs the tokens of their text."""
    known, unknown = branch.store.resolve(keys)
    parts = [branch.store.render(known)] if known else []
    if branch.store.media(known):
        parts.append("(a video is watched by a clone that gets its key, not read)")
    if unknown:
        parts.append(f"(unknown context keys: {', '.join(unknown)})")
    return "\n".join(parts)


@tool(cost=0, timeout=10.0)
async def budget(branch: BranchView) -> dict[str, float]:
    """What you may still spend, by currency. What is not named is unlimited."""
    return branch.ledger.remaining()


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one runtime by name, and which branches hold them.

    at  "everywhere", "clones" (not the root) or "root" (not its clones)
    """

    tools: Sequence[Tool] = ()
    at: str = "everywhere"
    named: Mapping[str, Tool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.at not in ("everywhere", "clones", "root"):
            raise ConfigError(f"tools_at is {self.at!r}; it takes everywhere, clones, root")
        for each in self.tools:
            if not isinstance(each, Tool):
                raise ConfigError(f"{each!r} is not a tool; put @ramet.tool above the function")
            if each.name in self.named:
                raise ConfigError(f"two tools are called {each.name}; give one another name: @ramet.tool(name=...)")
            self.named[each.name] = each  # type: ignore[index]

    def held(self, depth: int) -> Mapping[str, Tool]:
        """The tools of a branch at this depth, by name."""
        return self.named if self.at == "everywhere" or (self.at == "root") == (depth == 0) else {}
