"""The policy of a server that has the Responses endpoint: items to `/responses`.

Items are what chat servers call messages, but calls and their results are items of their own. Nothing is kept at the server (`store`
is false): the whole conversation is sent each time. OpenAI's own endpoint takes no `max_output_tokens` below 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ramet.agents.sampling import SampleRequest
from ramet.errors import PolicyError
from ramet.policy.engines.openai.chat import ChatPolicy
from ramet.policy.engines.openai.chunk import Chunk, listed_tokens, usage_of
from ramet.policy.engines.openai.fields import OUTPUT_LIMIT
from ramet.policy.engines.openai.server import Exchange

_ENDS = {"response.completed": "stop", "response.done": "stop", "response.incomplete": "length", "response.cancelled": "cancelled"}
"""Finish reasons by the event that ends a response."""
_ENDED = {"completed": "stop", "incomplete": "length", "cancelled": "cancelled", "failed": "error"}
"""Finish reasons by the status of a response."""


class ResponsesPolicy(ChatPolicy):
    """As `ChatPolicy`, at the Responses endpoint."""

    path = "responses"
    optional = ("max_tokens", "temperature", "top_p", "top_k", "seed", "store", "stream", "tools")
    guessed: Mapping[str, Any] = {}
    neutral: Mapping[str, Mapping[str, Any]] = {"vllm": {"top_k": -1, "repetition_penalty": 1.0}}

    def __init__(self, *arguments: Any, names: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, names={"max_tokens": OUTPUT_LIMIT, **(names or {})}, **options)

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        sampling = request.sampling
        messages, tools = self._conversation(request)
        return {
            "input": [item for message in messages for item in _items(message)], "max_tokens": request.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": request.seed % 2**31, "store": False,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"tools": [{"type": "function", **tool["function"], "strict": False} for tool in tools]} if tools else {}),
        }  # fmt: skip

    async def _explained(self, error: PolicyError, exchange: Exchange) -> PolicyError:
        error = await super()._explained(error, exchange)
        if exchange.status in (404, 405, 501) and not self._served:
            return PolicyError(f"{error}; if it has no Responses endpoint, use the chat backend with it")
        return error

    def reader(self) -> ResponseReader:
        """A reader of the events of a response."""
        return ResponseReader()


def _items(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A chat message as items."""
    if message["role"] == "tool":
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}]
    items = [] if message["content"] is None else [{"role": message["role"], "content": message["content"]}]
    calls = message.get("tool_calls", ())
    return [*items, *({"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls)]


class ResponseReader:
    """Turns the events of one response, or the response as a whole, into chunks. What an event repeats of earlier ones is left out."""

    def __init__(self) -> None:
        self._told: dict[tuple[Any, str], str] = {}
        """What has come of each item, by its place in the output and the kind of its content."""
        self._names: dict[Any, tuple[str, str]] = {}
        """Id and name of each call, by its place."""

    def __call__(self, event: Mapping[str, Any]) -> Chunk:
        """The chunk of an event."""
        kind = str(event.get("type") or "")
        if event.get("object") == "response":
            return self._whole(event, _ENDED.get(str(event.get("status"))))
        if kind in _ENDS or isinstance(event.get("response"), dict):
            response = event.get("response") or {}
            return self._whole(response, _ENDS.get(kind)) if kind in _ENDS else Chunk()
        if not kind.startswith("response."):
            return Chunk(unread=[name for name, value in event.items() if value])
        chunk, place = Chunk(), event.get("output_index", 0)
        if isinstance(item := event.get("item"), dict):
            self._item(place, item, chunk, whole=kind.endswith(".done"))
        elif kind == "response.function_call_arguments.delta":
            self._add(place, "arguments", _text(event.get("delta")), chunk, part=True)
        elif kind == "response.function_call_arguments.done":
            self._add(place, "arguments", _text(event.get("arguments")), chunk)
        elif kind in ("response.output_text.delta", "response.refusal.delta"):
            self._add(place, "text", _text(event.get("delta")), chunk, part=True)
            chunk.tokens = listed_tokens(event.get("logprobs"))
        elif kind.startswith("response.reasoning") and kind.endswith(".delta"):
            self._add(place, "reasoning", _text(event.get("delta")), chunk, part=True)
        return chunk

    def _whole(self, response: Mapping[str, Any], finish: str | None) -> Chunk:
        """What a response holds that had not come before, and its end."""
        chunk = Chunk(usage=usage_of(response))
        for place, item in enumerate(response.get("output") or ()):
            self._item(place, item, chunk, whole=True)
        reason = (response.get("incomplete_details") or {}).get("reason")
        chunk.finish = str(reason) if reason and finish == "length" else finish
        return chunk

    def _item(self, place: Any, item: Mapping[str, Any], chunk: Chunk, whole: bool) -> None:
        """What an item holds that had not come before. One that is not whole has only been announced."""
        kind = item.get("type")
        if kind == "function_call":
            self._names[place] = (str(item.get("call_id") or item.get("id") or place), str(item.get("name") or ""))
            self._add(place, "arguments", _text(item.get("arguments")), chunk)
        elif kind == "reasoning" and whole:
            self._add(place, "reasoning", _parts(item.get("content")) or _parts(item.get("summary")), chunk)
        elif kind in ("message", None) and whole:
            self._add(place, "text", _parts(item.get("content")), chunk)

    def _add(self, place: Any, kind: str, text: str, chunk: Chunk, part: bool = False) -> None:
        """Add a `part` of an item, or what is new of the text of all of it; nothing if that is another text than what has come."""
        known = self._told.get((place, kind))
        if not part and known:
            text = text.removeprefix(known) if text.startswith(known) else ""
        self._told[place, kind] = (known or "") + text
        if kind == "text":
            chunk.text += text
        elif kind == "reasoning":
            chunk.reasoning += text
        elif text or known is None:
            chunk.calls.append((place if isinstance(place, int) else 0, *self._names.get(place, (str(place), "")), text))


def _text(value: Any) -> str:
    """A text; none is an empty one. Raises `TypeError` for anything else."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"text that is {type(value).__name__}")
    return value or ""


def _parts(content: Any) -> str:
    """The text of content, which is text or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_text(part.get("text") or part.get("refusal")) for part in content)
