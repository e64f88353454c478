"""The `spawn_clone` tool: what a branch may ask for, and what it gets back.

A call is JSON between the tool-call markers of the chat format:

    {"name": "spawn_clone", "arguments": {"objectives": [...], "context_keys": [...]}}

Each objective is a string, or `{"objective", "context_keys"?, "max_tokens"?}`; the call's own `context_keys` go to every clone.
Nothing else is accepted: no sampling parameters, no aliases, and malformed JSON is not repaired. An invalid call raises `CallError`,
whose text the branch reads and can act on.

Results go back as one line per clone, in call order, followed by one line that says what is left. How a branch states its answer is
described in `ramet.agents.answers`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ramet.agents.answers import extract_answer as extract_answer
from ramet.agents.answers import last_boxed as last_boxed
from ramet.agents.budget import SAMPLED
from ramet.agents.tree import Status
from ramet.errors import CallError

MAX_CALL_CHARACTERS = 65_536
"""Longest call that is parsed."""
FEW_RESULTS, MIN_RESULT_CHARACTERS = 16, 40
"""If there are more results than the first number, none is cut to fewer characters than the second: the last ones are left out instead."""
OUT_OF_BUDGET_NOTICE = "Out of budget. Answer now."
"""What a branch is told when only its answer reserve is left."""

_Text = Annotated[str, StringConstraints(strict=True, pattern=r"\S")]
_Keys = Annotated[list[Annotated[str, Field(strict=True)]], Field(default_factory=list)]


class Objective(BaseModel):
    """The work of one clone: what to do, the documents that it gets, and its share of generated tokens (None: a fair share)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: _Text
    context_keys: _Keys
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None


class SpawnClone(BaseModel):
    """The arguments of a call: one clone per objective is started, in parallel, and the branch waits for their answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objectives: Annotated[list[_Text | Objective], Field(min_length=1)]
    context_keys: _Keys

    def requests(self) -> list[Objective]:
        """The objectives as records, each with the call's shared keys added."""
        return [
            Objective(
                objective=item if isinstance(item, str) else item.objective,
                context_keys=self.context_keys + ([] if isinstance(item, str) else item.context_keys),
                max_tokens=None if isinstance(item, str) else item.max_tokens,
            )
            for item in self.objectives
        ]


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["spawn_clone"]
    arguments: SpawnClone


def tool_schema() -> dict[str, Any]:
    """The tool in the JSON-schema form that chat templates take."""
    objective = {
        "type": "object",
        "properties": {
            "objective": {"type": "string", "description": "What the clone is to do. It sees nothing else of your context."},
            "context_keys": {"type": "array", "items": {"type": "string"}, "description": "Documents that this clone gets."},
            "max_tokens": {"type": "integer", "minimum": 1, "description": "Share of your budget for this clone."},
        },
        "required": ["objective"],
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {
            "name": "spawn_clone",
            "description": "Hand parts of the work to clones of yourself that run in parallel, each in a context of its own. "
            "They spend your budget. You get one line per clone with its answer.",
            "parameters": {
                "type": "object",
                "properties": {
                    "objectives": {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, objective]}},
                    "context_keys": {
                        "type": "array",
                        "items": {"type": "string"},
                        "description": "Documents that every clone of this call gets.",
                    },
                },
                "required": ["objectives"],
                "additionalProperties": False,
            },
        },
    }


def render_call(objectives: Sequence[dict[str, Any] | str], context_keys: Sequence[str] = ()) -> str:
    """The compact JSON of a call, for demonstrations and scripted policies."""
    arguments: dict[str, Any] = {"objectives": list(objectives)}
    if context_keys:
        arguments["context_keys"] = list(context_keys)
    return json.dumps({"name": "spawn_clone", "arguments": arguments}, separators=(",", ":"), ensure_ascii=False)


def parse_call(text: str) -> SpawnClone:
    """Validate one call. Whatever `text` is, the only error raised is `CallError`, whose message is meant for the model."""
    if len(text) > MAX_CALL_CHARACTERS:
        raise CallError(f"call of {len(text)} characters; at most {MAX_CALL_CHARACTERS} are read")
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except RecursionError:
        raise CallError("call is nested too deeply") from None
    except ValueError as error:
        raise CallError(f"call is not valid JSON: {_short(str(error))}") from None
    try:
        return _Call.model_validate(data).arguments
    except ValidationError as error:
        raise CallError(_explain(error)) from None


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


def _explain(error: ValidationError) -> str:
    """The first three problems, each with its place in the call."""
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

    def line(self) -> str:
        """The result as the parent reads it: the answer, with the status and reason in parentheses unless it ended normally."""
        if self.status is Status.ANSWERED and self.answer is not None:
            return self.answer
        # The status already says that tokens ran out.
        reason = "" if self.status is Status.OUT_OF_BUDGET and self.reason in SAMPLED else self.reason
        note = f"({self.status.value}{': ' + reason if reason else ''})"
        return note if self.answer is None else f"{self.answer} {note}"


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


def left_line(generated: int | None, clones: int | None) -> str:
    """The line that tells a branch what it may still spend; empty if nothing is limited."""
    parts = []
    if generated is not None:
        parts.append(f"{generated} tokens")
    if clones is not None:
        parts.append(f"{clones} clones")
    return f"[left {', '.join(parts)}]" if parts else ""
