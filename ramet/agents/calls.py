"""Tool calls in sampled turns: how they are spelled, and how they are read.

A call stands between two control tokens or between the same tags as text (Hermes, Qwen), after `[TOOL_CALLS]` (Mistral), or is a
whole turn of JSON (Llama). What a turn only thinks about or quotes is not a call. The JSON itself is validated by
`ramet.agents.protocol.parse_call`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ramet.agents.encoding import TextEncoder, decode
from ramet.agents.protocol import SPAWN
from ramet.agents.thoughts import split_calls, without_thoughts


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One sampled turn as it was read.

    text   what the turn says, without its thoughts and its calls
    calls  the raw JSON of each call
    error  what is malformed; empty if nothing is
    """

    text: str
    calls: tuple[str, ...] = ()
    error: str = ""


_OPENED, _CLOSED = "\ue000", "\ue001"
"""Stand in for the two control ids around a call. Where the text itself contains these characters, they are removed first."""


def parse_marked(tokenizer: Any, sampled: Sequence[int], stop: frozenset[int], opening: int, closing: int | None) -> ParsedTurn:
    """Read calls between two control ids, or from `opening` to the end without `closing`. Text that merely spells a marker is text."""
    body = list(sampled)
    while body and body[-1] in stop:
        body.pop()
    marks = {opening: _OPENED} if closing is None else {opening: _OPENED, closing: _CLOSED}
    pieces: list[str] = []
    for is_mark, run in groupby(body, marks.__contains__):
        if is_mark:
            pieces += map(marks.__getitem__, run)
        else:
            pieces.append(decode(tokenizer, list(run)).replace(_OPENED, "").replace(_CLOSED, ""))
    parsed = _parsed("".join(pieces), _OPENED, _CLOSED if closing is not None else "")
    text = parsed.text  # markers that are only quoted are shown as they are spelled
    for index, mark in marks.items():
        text = text.replace(mark, decode(tokenizer, [index])) if mark in text else text
    return replace(parsed, text=text)


def _parsed(text: str, opening: str, closing: str) -> ParsedTurn:
    """A turn's text, and its calls that are neither part of a thought nor quoted. Without `closing`, a call takes the rest."""
    visible, calls, cut = split_calls(without_thoughts(text), opening, closing)
    return ParsedTurn(visible, tuple(calls), "the tool call is not closed" if cut else "")


Schemas = Sequence[Mapping[str, Any]]
"""Tools in the JSON-schema form that chat templates take: {"type": "function", "function": {"name", "description", "parameters"}}."""


def names_of(tools: Schemas) -> list[str]:
    """The names of tools, in order."""
    return [tool["function"]["name"] for tool in tools]


def tool_preamble(tools: Schemas) -> tuple[str, str, str]:
    """The description of tools for models whose chat format has no place of its own for them: ours, the schemas, ours again."""
    one = len(tools) == 1
    example = '{"objectives": ["..."]}' if SPAWN in names_of(tools) else "{...}"
    name = SPAWN if SPAWN in names_of(tools) else names_of(tools)[0]
    return (
        "You have one tool. Its JSON schema:\n<tools>\n" if one else "You have these tools. Their JSON schemas:\n<tools>\n",
        "\n".join(map(json.dumps, tools)),
        f"\n</tools>\nTo call {'it' if one else 'one'}, write\n<tool_call>\n"
        f'{{"name": "{name}", "arguments": {example}}}\n</tool_call>\n'
        "and end your turn. When you know the result, end with a line `Answer: ...`.",
    )


def spelled_call(encode: TextEncoder, call: str) -> list[int | str]:
    """A call between `<tool_call>` tags, for `TextEncoder.assembled`: control tokens where the tokenizer has them."""
    return [*encode.trusted("<tool_call>\n"), call, *encode.trusted("\n</tool_call>")]


def parse_spelled(text: str) -> ParsedTurn:
    """Read calls between `<tool_call>` tags that are spelled as text, for tokenizers that have no token for them."""
    return _parsed(text, "<tool_call>", "</tool_call>")


def with_arguments(call: str) -> str:
    """A call with Llama's `parameters` renamed to `arguments`; any other text is only stripped."""
    try:
        data = json.loads(call)
    except (ValueError, RecursionError):
        return call.strip()
    if isinstance(data, dict) and "parameters" in data and "arguments" not in data:
        data["arguments"] = data.pop("parameters")
        data.pop("type", None)
        return json.dumps(data)
    return call.strip()


def is_call(text: str) -> bool:
    """Whether the whole turn is a JSON object that names a function, as Llama spells a call."""
    try:
        data = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "name" in data and ("parameters" in data or "arguments" in data)


def mistral_calls(text: str) -> tuple[str, ...]:
    """The calls in the JSON list after `[TOOL_CALLS]`. Anything else is returned as one call, for `parse_call` to reject."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return (text.strip(),)
    return tuple(json.dumps(call) for call in data) if isinstance(data, list) and data else (text.strip(),)
