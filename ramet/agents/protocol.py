"""The `spawn_clone` tool: what a branch may ask for, and what it gets back.

A call is JSON between the tool-call markers of the chat format:

    {"name": "spawn_clone", "arguments": {"objectives": [...], "context_keys": [...]}}

Each objective is a string, or `{"objective", "context_keys"?, "max_tokens"?, "role"?}`; the call's own
`context_keys` go to every clone. An objective with `{"each": ["A-I"], "per_clone"?: 2}` stands for as many clones as it takes to
give each `per_clone` of those documents (`ContextStore.resolve` says what names documents), so that fanning out over many
costs a constant number of tokens. Nothing else is accepted: no sampling parameters, no aliases, and malformed JSON is not repaired.
An invalid call raises `CallError`, whose text the branch reads and can act on.

Other tools (`ramet.agents.tools`) are called in the same form, `{"name", "arguments"}`; a turn may call several.

Results go back as one line per clone, in call order, followed by one line that says what is left. How a branch states its answer is
described in `ramet.agents.answers`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from ramet.agents.answers import extract_answer as extract_answer
from ramet.agents.answers import last_boxed as last_boxed
from ramet.agents.budget import SAMPLED
from ramet.agents.context import ContextStore
from ramet.agents.tree import Status
from ramet.errors import CallError

SPAWN = "spawn_clone"
MAX_CALL_CHARACTERS = 65_536
"""Longest call that is parsed."""
MAX_CALLS = 64
"""Calls that one turn may make."""
FEW_RESULTS, MIN_RESULT_CHARACTERS = 16, 40
"""If there are more results than the first number, none is cut to fewer characters than the second: the last ones are left out instead."""
OUT_OF_BUDGET_NOTICE = "Out of budget. Answer now."
"""What a branch is told when only its answer reserve is left."""

_Text = Annotated[str, StringConstraints(strict=True, pattern=r"\S")]
_Positive = Annotated[int, Field(strict=True, ge=1)]
_Keys = Annotated[list[Annotated[str, Field(strict=True)]], Field(default_factory=list)]


class Objective(BaseModel):
    """The work of one clone: what to do, the documents that it gets, and its share of generated tokens (None: a fair share)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: _Text
    context_keys: _Keys
    max_tokens: _Positive | None = None
    each: Annotated[list[Annotated[str, Field(strict=True)]], Field(min_length=1)] | None = None
    """Documents to be divided among clones with this objective, `per_clone` each."""
    per_clone: _Positive = 1
    role: Annotated[str, Field(strict=True)] | None = None
    """The role that the clone takes; by default its parent's."""
    expects: Annotated[Any, Field(alias="schema", exclude=True)] = None
    """The type that its answer has to fit (`ramet.agents.typed`). Only a program can give one: `Objective(objective=..., schema=Model)`."""

    @field_validator("expects")
    @classmethod
    def _no_json(cls, value: Any) -> Any:
        if isinstance(value, (dict, list, str, int, float)):
            raise ValueError("a schema is a Python type, which only a program can give")
        return value

    @model_validator(mode="after")
    def _per_clone_of_each(self) -> Objective:
        if self.each is None and self.per_clone != 1:
            raise ValueError("per_clone goes with each")
        return self


class SpawnClone(BaseModel):
    """The arguments of a call: one clone per objective is started, in parallel, and the branch waits for their answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objectives: Annotated[list[_Text | Objective], Field(min_length=1)]
    context_keys: _Keys

    def requests(self, store: ContextStore) -> tuple[list[Objective], list[str]]:
        """One objective a clone, in full: the call's shared keys added, each `each` expanded. And what names no document of `store`.

        Raises `CallError` for an `each` that names no document at all.
        """
        made: list[Objective] = []
        unknown: dict[str, None] = {}
        for item in self.objectives:
            whole = Objective(objective=item, context_keys=[]) if isinstance(item, str) else item
            keys = self.context_keys + whole.context_keys
            if keys:
                unknown.update(dict.fromkeys(store.resolve(keys)[1]))
            shares: list[list[str]] = [[]]
            if whole.each is not None:
                known, missing = store.resolve(whole.each)
                if not known:
                    raise CallError(f"each: no document is called {_short(', '.join(whole.each))}")
                unknown.update(dict.fromkeys(missing))
                shares = [known[i : i + whole.per_clone] for i in range(0, len(known), whole.per_clone)]
            elif keys == whole.context_keys:
                made.append(whole)
                continue
            made += [whole.model_copy(update={"context_keys": keys + share, "each": None, "per_clone": 1}) for share in shares]
        return made, list(unknown)


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["spawn_clone"]
    arguments: SpawnClone


def tool_schema(roles: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The tool in the JSON-schema form that chat templates take. `roles`: what clones may be, and what each is for."""
    keys = {"type": "array", "items": {"type": "string"}}
    properties: dict[str, Any] = {
        "objective": {"type": "string", "description": "What the clone is to do. It sees nothing else of your context."},
        "context_keys": {**keys, "description": "Documents that this clone gets."},
        "max_tokens": {"type": "integer", "minimum": 1, "description": "Share of your budget for this clone."},
        "each": {**keys, "description": "Documents to divide among clones that all get this objective; keys, ranges (A-I) or globs (*)."},
        "per_clone": {"type": "integer", "minimum": 1, "description": "Documents of `each` for one clone; by default 1."},
    }
    if roles:
        described = "; ".join(f"{name}: {text}" if text else name for name, text in roles.items())
        properties["role"] = {"type": "string", "enum": list(roles), "description": f"Who does it, if not a clone of yourself. {described}"}
    objective = {"type": "object", "properties": properties, "required": ["objective"], "additionalProperties": False}
    parameters = {
        "type": "object",
        "properties": {
            "objectives": {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, objective]}},
            "context_keys": {**keys, "description": "Documents that every clone of this call gets."},
        },
        "required": ["objectives"],
        "additionalProperties": False,
    }
    description = (
        "Hand parts of the work to clones of yourself that run in parallel, each in a context of its own. "
        "They spend your budget. You get one line per clone with its answer."
    )
    return {"type": "function", "function": {"name": SPAWN, "description": description, "parameters": parameters}}


SPAWN_SCHEMA = tool_schema()
"""Without roles, the same for every branch: made once, not for each clone's prompt."""


def render_call(objectives: Sequence[Mapping[str, Any] | str], context_keys: Sequence[str] = ()) -> str:
    """The compact JSON of a call, for demonstrations and scripted policies."""
    arguments: dict[str, Any] = {"objectives": list(objectives)}
    if context_keys:
        arguments["context_keys"] = list(context_keys)
    return json.dumps({"name": "spawn_clone", "arguments": arguments}, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A call of a tool as the branch wrote it; `arguments` is a JSON object."""

    name: str
    arguments: str


def parse_call(text: str) -> SpawnClone:
    """Validate one call of `spawn_clone`. Whatever `text` is, the only error raised is `CallError`, with a message for the model."""
    return _spawn_call(_json(text))


def parse_calls(texts: Sequence[str], spawns: bool, tools: Collection[str]) -> list[SpawnClone | ToolUse | CallError]:
    """The calls of one turn, in order, each read or with what is wrong with it. `tools`: those that the branch holds.

    A turn calls `spawn_clone` once at most. Without other tools it is one call a turn.
    """
    if not tools:
        return [_only_spawn(texts, spawns)]
    calls = [_call(text, spawns, tools) for text in texts[:MAX_CALLS]]
    if sum(isinstance(call, SpawnClone) for call in calls) > 1:
        twice = CallError(f"one {SPAWN} a turn: put all objectives into one call")
        calls = [twice if isinstance(call, SpawnClone) else call for call in calls]
    return [*calls, *[CallError(f"at most {MAX_CALLS} calls a turn")] * (len(texts) - len(calls))]


def _only_spawn(texts: Sequence[str], spawns: bool) -> SpawnClone | CallError:
    if not spawns:
        return CallError(NO_SPAWNING)
    if len(texts) > 1:
        return CallError("one call a turn: put all objectives into one call")
    try:
        return parse_call(texts[0])
    except CallError as error:
        return error


def _call(text: str, spawns: bool, tools: Collection[str]) -> SpawnClone | ToolUse | CallError:
    try:
        data = _json(text)
        if not isinstance(data, dict) or not isinstance(name := data.get("name"), str):
            raise CallError(f"a call is {_FORM}")
        if name == SPAWN and spawns:
            return _spawn_call(data)
        if name == SPAWN:
            raise CallError(NO_SPAWNING)
        if name not in tools:
            there = ", ".join([*([SPAWN] if spawns else []), *tools])
            raise CallError(f"no tool {_short(name, 40)!r}; there are {there}")
        if data.keys() - {"name", "arguments"} or not isinstance(data.get("arguments", {}), dict):
            raise CallError(f"{name}: a call is {_FORM} and nothing else")
        return ToolUse(name, json.dumps(data.get("arguments", {}), ensure_ascii=False))
    except CallError as error:
        return error


_FORM = '{"name": ..., "arguments": {...}}'
NO_SPAWNING = f"{SPAWN} is not available here; answer yourself"


def _json(text: str) -> Any:
    if len(text) > MAX_CALL_CHARACTERS:
        raise CallError(f"call of {len(text)} characters; at most {MAX_CALL_CHARACTERS} are read")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except RecursionError:
        raise CallError("call is nested too deeply") from None
    except ValueError as error:
        raise CallError(f"call is not valid JSON: {_short(str(error))}") from None


def _spawn_call(data: Any) -> SpawnClone:
    try:
        return _Call.model_validate(data).arguments
    except ValidationError as error:
        raise CallError(explain(error)) from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {_short(key)!r}")
        result[key] = value
    return result


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _short(text: str, limit: int = 80) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[:limit] + "…"


def explain(error: ValidationError) -> str:
    """The first three problems of arguments, each with its place."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False)[:3]:
        where = ".".join(_short(str(part), 40) for part in problem["loc"] if part not in ("Objective",)) or "call"
        lines.append(f"{where}: {problem['msg']}")
    return "; ".join(lines)


@dataclass(frozen=True, slots=True)
class CloneResult:
    """What a parent receives from one clone: how it ended, its answer if it stated one, and the reason if it ended early."""

    status: Status
    answer: str | None = None
    reason: str = ""
    value: Any = None
    """What the answer says, where it had to be of a type."""

    def line(self) -> str:
        """The result as the parent reads it: the answer, with the status and reason in parentheses unless it ended normally."""
        if self.status is Status.ANSWERED and self.answer is not None:
            return self.answer
        # The status already says that tokens ran out.
        reason = "" if self.status is Status.OUT_OF_BUDGET and self.reason in SAMPLED else self.reason
        note = f"({self.status.value}{': ' + reason if reason else ''})"
        return note if self.answer is None else f"{self.answer} {note}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What one call of a turn gives back: the results of its clones, or a tool's text."""

    name: str
    results: tuple[CloneResult, ...] = ()
    text: str = ""

    @property
    def parts(self) -> int:
        """The number of results, by which replies share the space of a message: at least 1."""
        return max(len(self.results), 1)

    def block(self, limit: int) -> str:
        """The reply as text within `limit` characters."""
        return render_results(self.results, "", limit) if self.results else elide(self.text, limit)


def render_replies(replies: Sequence[Reply], left: str, limit: int) -> list[str]:
    """The replies of a turn's calls within `limit` characters in all, in call order; the last ends with the line on what is left.

    A single one stands by itself; of several, each says which tool it is from, and long ones are cut as `render_results` cuts.
    """
    if len(replies) == 1 and replies[0].results:
        return [render_results(replies[0].results, left, limit)]
    heads = [f"{reply.name}: " if len(replies) > 1 else "" for reply in replies]
    whole = [reply.block(limit) for reply in replies]
    allowance = _fair_allowance([len(block) for block in whole], limit - sum(len(head) + 1 for head in heads))
    blocks = [
        head + ("\n" if head and reply.results else "") + (block if len(block) <= allowance else reply.block(allowance))
        for head, reply, block in zip(heads, replies, whole, strict=True)
    ]
    return [*blocks[:-1], f"{blocks[-1]}\n{left}"] if left else blocks


def render_results(results: Sequence[CloneResult], left: str, limit: int) -> str:
    """Numbered results in call order within `limit` characters, followed by the line `left`.

    Short results are kept whole. Long ones share the remaining space equally, each cut in the middle with a marker that says how much
    is missing; none is cut while a longer one is whole. If there are so many that each would be cut to nearly nothing, as many as fit
    are shown, and one line says how many are left out.
    """
    lines = [" ".join(result.line().split()) for result in results]
    room = limit - sum(len(f"{number}: \n") for number in range(1, len(lines) + 1))
    if len(lines) > FEW_RESULTS and sum(min(len(line), MIN_RESULT_CHARACTERS) for line in lines) > room:
        numbered = _first(lines, limit)
    else:
        allowance = _fair_allowance([len(line) for line in lines], room)
        numbered = [f"{number}: {elide(line, allowance)}" for number, line in enumerate(lines, 1)]
    return "\n".join([*numbered, left] if left else numbered)


def _first(lines: Sequence[str], limit: int) -> list[str]:
    """The first numbered lines, as many as fit `limit` characters, and one line about those that do not."""
    numbered: list[str] = []
    room = limit - len(f"[... results {len(lines)} to {len(lines)} left out: no room ...]")
    for number, line in enumerate(lines, 1):
        numbered.append(f"{number}: {elide(line, MIN_RESULT_CHARACTERS)}")
        room -= len(numbered[-1]) + 1
        if room < 0:
            numbered[-1] = f"[... results {number} to {len(lines)} left out: no room ...]"
            break
    return numbered


def _fair_allowance(lengths: Sequence[int], limit: int) -> int:
    """The largest cap, at least 1, such that the lengths capped at it sum to at most `limit`."""
    left, waiting = limit, len(lengths)
    for length in sorted(lengths):
        share = left // waiting
        if length > share:
            return max(share, 1)
        left -= length
        waiting -= 1
    return max(lengths, default=1)


def elide(text: str, limit: int) -> str:
    """`text` shortened to `limit` characters: its head and tail, with a mark between them that, if there is room, counts what is cut."""
    if len(text) <= limit:
        return text
    room = limit - len(f"[... {len(text)} characters cut ...]")
    if room < 2:
        return text[: max(limit - 1, 0)] + "…"
    head, tail = room - room // 2, room // 2
    return f"{text[:head]}[... {len(text) - room} characters cut ...]{text[-tail:]}"


def left_line(generated: int | None, clones: int | None, calls: int | None = None) -> str:
    """The line that tells a branch what it may still spend; empty if nothing is limited."""
    parts = []
    if generated is not None:
        parts.append(f"{generated} tokens")
    if clones is not None:
        parts.append(f"{clones} clones")
    if calls is not None:
        parts.append(f"{calls} tool calls")
    return f"[left {', '.join(parts)}]" if parts else ""
