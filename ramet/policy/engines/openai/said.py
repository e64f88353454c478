"""What one event of a server says, in all the shapes in which servers say it.

Text stands in a choice's `delta`, `message` or `text`, as a string or as parts; reasoning in `reasoning_content`, `reasoning` or
`thinking`, or in parts of such a type; a refusal is text; tool calls are native (`tool_calls`, `function_call`). Where shapes
cannot be read, the readers raise `TypeError`, `ValueError` or `AttributeError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ramet.agents.tree import StopReason

_LENGTH = ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length", "token_limit")
_BROKEN = ("error", "abort", "aborted", "cancelled", "canceled", "insufficient_system_resource", "engine_overloaded")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_KNOWN = ("role", "content", "refusal", "function_call", "tool_calls", "reasoning_details", *_THOUGHTS)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens by the server's own count, as far as it gives them; of the prompt's, those that it had already."""

    generated: int | None = None
    cached: int | None = None


@dataclass(slots=True)
class Said:
    """text, thought  what is for the reader, and what is not
    whole    the text is the whole answer, not its next part
    tokens   (text, log-probability as it stands) of each token, if the server tells
    ids      token ids, if the server tells
    calls    (place, its own name, function, arguments) of parts of native tool calls
    finish   why the sample has ended, once it has
    unread   names of what the event has besides, and nobody knows
    """

    text: str = ""
    thought: str = ""
    whole: bool = False
    tokens: list[tuple[str, Any]] = field(default_factory=list)
    ids: list[int] | None = None
    calls: list[tuple[int, str, str, str]] = field(default_factory=list)
    usage: Usage | None = None
    finish: str | None = None
    unread: list[str] = field(default_factory=list)

    @property
    def something(self) -> bool:
        """Does the event bring the sample forward?"""
        return bool(self.sampled or self.usage or self.finish)

    @property
    def sampled(self) -> bool:
        """Does it have something that was sampled?"""
        return bool(self.text or self.thought or self.tokens or self.ids or self.calls)


def stop_of(finish: str) -> StopReason | None:
    """How a sample has ended; None for one that the server has broken off. Reasons that nobody knows are final.

    What a filter cut short is an answer: asking again would be cut again.
    """
    reason = finish.strip().lower()
    return None if reason in _BROKEN else StopReason.LENGTH if reason in _LENGTH else StopReason.END


def read(event: Mapping[str, Any]) -> Said:
    """What the event says of the first choice."""
    said = Said()
    for choice in event.get("choices") or ():
        if str(choice.get("index") or 0) == "0":
            _choice(choice, said)
    if said.usage is None:
        said.usage = _usage(event)
    if "choices" not in event and said.usage is None:
        said.unread = [name for name, value in event.items() if value]
    return said


def _choice(choice: Mapping[str, Any], said: Said) -> None:
    delta, message = choice.get("delta"), choice.get("message")
    holder = delta or message or {}
    said.whole = not delta and bool(message)
    said.text, said.thought = _parts(holder.get("content"))
    if not holder and choice.get("text"):
        said.text = _text(choice["text"])
    if not said.text and holder.get("refusal"):
        said.text = _within(holder["refusal"])
    if not said.thought:
        said.thought = next((thought for name in _THOUGHTS if (thought := _aside(holder.get(name)))), "")
    called = holder.get("function_call")
    calls = [*(holder.get("tool_calls") or ()), *([{"function": called}] if called else [])]
    said.calls = [_call(call, place) for place, call in enumerate(calls)]
    said.tokens = _tokens(choice.get("logprobs"))
    ids = choice.get("token_ids")
    said.ids = None if ids is None else [_id(i) for i in ids]
    said.usage = _usage(choice)
    finish = choice.get("finish_reason")
    said.finish = None if finish in (None, False, "", "null", "None") else str(finish)
    said.unread = [name for name, value in holder.items() if value and name not in _KNOWN]


def _parts(content: Any) -> tuple[str, str]:
    """(text, thoughts) of content as a string or as parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    text, thought = "", ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and str(part.get("type")) in ("thinking", "reasoning", "redacted_thinking", "reasoning_text"):
            thought += _within(part)
        else:
            text += _within(part)
    return text, thought


def _within(part: Any) -> str:
    """All text in a part of content."""
    if isinstance(part, list):
        return "".join(map(_within, part))
    if isinstance(part, dict):
        inner = next((part[name] for name in ("text", "content", *_THOUGHTS, "refusal") if part.get(name)), "")
        return inner if isinstance(inner, str) else _within(inner)
    return _text(part)


def _aside(value: Any) -> str:
    """Reasoning in whatever form: what is none is left alone, since nothing depends on it."""
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


def _tokens(logprobs: Any) -> list[tuple[str, Any]]:
    """Tokens with log-probabilities, in the form of chat, of completions, or as a bare list."""
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
    """A log-probability; None for what is no finite number."""
    return float(value) if _finite(value) else None


def _finite(value: Any) -> bool:
    """Is it a number, and one that a float can hold?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def _count(*values: Any) -> int | None:
    """The first of the values that is a number of tokens."""
    for value in values:
        if _finite(value) and value >= 0:
            return int(value)
    return None


def _inside(holder: Mapping[str, Any], names: Sequence[str], key: str) -> Any:
    """`key` in the first mapping that stands under one of `names`."""
    return next((inner[key] for name in names if isinstance(inner := holder.get(name), dict) and key in inner), None)


def _usage(holder: Mapping[str, Any]) -> Usage | None:
    """Usage as OpenAI, Anthropic, DeepSeek, Groq and llama.cpp give it.

    Where reasoning stands beside the completion's tokens instead of among them, only the total, or the details, tell.
    """
    usage = holder.get("usage") or _inside(holder, ("x_groq",), "usage")
    timings = holder.get("timings")
    if not isinstance(usage, dict):
        if not isinstance(timings, dict):
            return None
        found = Usage(_count(timings.get("predicted_n")), _count(timings.get("cache_n")))
        return found if found != Usage() else None
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
    found = Usage(generated, cached)
    return found if found != Usage() else None
