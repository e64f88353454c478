"""Chunks: one event of a streamed answer, parsed from all the shapes in which servers send it.

Text is in a choice's `delta`, `message` or `text`, as a string or as parts; reasoning in `reasoning_content`, `reasoning` or
`thinking`, or in parts of such a type; a refusal counts as text; tool calls are native (`tool_calls`, `function_call`). Events of
any other shape raise `TypeError`, `ValueError` or `AttributeError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ramet.agents.tree import StopReason

_LENGTH = ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length", "token_limit")
_ABORTED = ("error", "abort", "aborted", "cancelled", "canceled", "insufficient_system_resource", "engine_overloaded")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_KNOWN = ("role", "content", "refusal", "function_call", "tool_calls", "reasoning_details", *_REASONING)


@dataclass(frozen=True, slots=True)
class ServerUsage:
    """The server's own token counts, None where it gives none: tokens generated, and prompt tokens that were cached."""

    generated: int | None = None
    cached: int | None = None


@dataclass(slots=True)
class Chunk:
    """What one event adds to a sample.

    text       the next part of the answer
    reasoning  the next part of reasoning that the server separates from the answer
    whole      the text is the whole answer, not its next part
    tokens     (text, log-probability as sent) of each token, if the server sends them
    ids        token ids, if the server sends them
    calls      (index, id, function name, arguments) of parts of native tool calls
    finish     the server's finish reason, once the sample has ended
    unread     names of non-empty fields that are unknown here
    """

    text: str = ""
    reasoning: str = ""
    whole: bool = False
    tokens: list[tuple[str, Any]] = field(default_factory=list)
    ids: list[int] | None = None
    calls: list[tuple[int, str, str, str]] = field(default_factory=list)
    usage: ServerUsage | None = None
    finish: str | None = None
    unread: list[str] = field(default_factory=list)

    @property
    def sampled(self) -> bool:
        """Whether the event contains anything that was sampled."""
        return bool(self.text or self.reasoning or self.tokens or self.ids or any(any(call[1:]) for call in self.calls))


def stop_of(finish: str) -> StopReason | None:
    """The stop reason of a finish reason; None if the server aborted the sample. Unknown finish reasons count as the end.

    So does an answer that a content filter cut short: a retry would be cut again.
    """
    reason = finish.strip().lower()
    return None if reason in _ABORTED else StopReason.LENGTH if reason in _LENGTH else StopReason.END


def parse_chunk(event: Mapping[str, Any]) -> Chunk:
    """The chunk of an event: what it contains of the first choice."""
    chunk = Chunk()
    for choice in event.get("choices") or ():
        if str(choice.get("index") or 0) == "0":
            _choice(choice, chunk)
    if chunk.usage is None:
        chunk.usage = usage_of(event)
    if "choices" not in event and chunk.usage is None:
        chunk.unread = [name for name, value in event.items() if value]
    return chunk


def _choice(choice: Mapping[str, Any], chunk: Chunk) -> None:
    delta, message = choice.get("delta"), choice.get("message")
    holder = delta or message or {}
    chunk.whole = not delta and bool(message)
    chunk.text, chunk.reasoning = _parts(holder.get("content"))
    if not holder and choice.get("text"):
        chunk.text = _text(choice["text"])
    if not chunk.text and holder.get("refusal"):
        chunk.text = _within(holder["refusal"])
    if not chunk.reasoning:
        chunk.reasoning = next((reasoning for name in _REASONING if (reasoning := _reasoning(holder.get(name)))), "")
    function_call = holder.get("function_call")
    native_calls = [*(holder.get("tool_calls") or ()), *([{"function": function_call}] if function_call else [])]
    chunk.calls = [_call(call, place) for place, call in enumerate(native_calls)]
    chunk.tokens = listed_tokens(choice.get("logprobs"))
    ids = choice.get("token_ids")
    chunk.ids = None if ids is None else [_id(i) for i in ids]
    chunk.usage = usage_of(choice)
    finish = choice.get("finish_reason")
    chunk.finish = None if finish in (None, False, "", "null", "None") else str(finish)
    chunk.unread = [name for name, value in holder.items() if value and name not in _KNOWN]


def _parts(content: Any) -> tuple[str, str]:
    """(text, reasoning) of content, given as a string or as parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    text, reasoning = "", ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and str(part.get("type")) in ("thinking", "reasoning", "redacted_thinking", "reasoning_text"):
            reasoning += _within(part)
        else:
            text += _within(part)
    return text, reasoning


def _within(part: Any) -> str:
    """All text inside a part of content."""
    if isinstance(part, list):
        return "".join(map(_within, part))
    if isinstance(part, dict):
        inner = next((part[name] for name in ("text", "content", *_REASONING, "refusal") if part.get(name)), "")
        return inner if isinstance(inner, str) else _within(inner)
    return _text(part)


def _reasoning(value: Any) -> str:
    """Reasoning in any form; unknown forms are ignored, since nothing depends on them."""
    return value if isinstance(value, str) else _within([v for v in value if v]) if isinstance(value, list) else ""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text that is {type(value).__name__}")
    return value


def _call(call: Mapping[str, Any], place: int) -> tuple[int, str, str, str]:
    function = call.get("function") or call
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    index = call.get("index")
    return index if isinstance(index, int) else place, str(call.get("id") or ""), str(function.get("name") or ""), arguments or ""


def _id(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a token id of {value!r}")
    return value


def listed_tokens(logprobs: Any) -> list[tuple[str, Any]]:
    """(text, log-probability) of each token, in the form of chat, of completions, or as a plain list."""
    listed = logprobs
    if isinstance(logprobs, dict):
        listed = logprobs.get("content")
        if not listed and (values := logprobs.get("token_logprobs")):
            names = logprobs.get("tokens") or []
            return [(str(names[i]) if i < len(names) else "", value) for i, value in enumerate(values)]
    if not isinstance(listed, list):
        return []
    return [(str(token.get("token") or ""), token.get("logprob")) for token in listed if isinstance(token, dict)]


def logprob(value: Any) -> float | None:
    """The value as a log-probability; None if it is not a finite number."""
    return float(value) if _finite(value) else None


def _finite(value: Any) -> bool:
    """Whether the value is a number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def _count(*values: Any) -> int | None:
    """The first of the values that is a valid number of tokens; None if none is."""
    for value in values:
        if _finite(value) and value >= 0:
            return int(value)
    return None


def _inside(holder: Mapping[str, Any], names: Sequence[str], key: str) -> Any:
    """The value of `key` in the first mapping found under one of `names`; None if there is none."""
    return next((inner[key] for name in names if isinstance(inner := holder.get(name), dict) and key in inner), None)


def usage_of(holder: Mapping[str, Any]) -> ServerUsage | None:
    """Token counts in the forms of OpenAI, Anthropic, DeepSeek, Groq and llama.cpp; None if there is none.

    Some servers do not count reasoning among the completion's tokens: then the total, or the details, give the tokens generated.
    """
    usage = holder.get("usage") or _inside(holder, ("x_groq",), "usage")
    timings = holder.get("timings")
    if not isinstance(usage, dict):
        if not isinstance(timings, dict):
            return None
        counts = ServerUsage(_count(timings.get("predicted_n")), _count(timings.get("cache_n")))
        return counts if counts != ServerUsage() else None
    completion = _count(usage.get("completion_tokens"), usage.get("output_tokens"))
    prompt = _count(usage.get("prompt_tokens"), usage.get("input_tokens"))
    total = _count(usage.get("total_tokens"))
    details = ("prompt_tokens_details", "input_tokens_details")
    cached = _count(
        _inside(usage, details, "cached_tokens"), usage.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"),
        usage.get("cache_read_input_tokens"),
    )  # fmt: skip
    details = ("completion_tokens_details", "output_tokens_details")
    reasoning = _count(_inside(usage, details, "reasoning_tokens"), usage.get("reasoning_tokens")) or 0
    generated = completion
    if reasoning > (completion or 0):
        generated = (completion or 0) + reasoning
    if total is not None and prompt is not None and total - prompt - (completion or 0) not in (0, cached):
        generated = max(generated or 0, total - prompt)
    counts = ServerUsage(generated, cached)
    return counts if counts != ServerUsage() else None
