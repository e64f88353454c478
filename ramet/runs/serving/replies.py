"""What clients are told, in the two forms of OpenAI's protocol: whole, or as events of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

from ramet.agents.tree import Status, Tree

_CUT = (Status.OUT_OF_BUDGET, Status.TIMED_OUT)


class ServedReply(Protocol):
    """One reply, which is either given `whole` or as a stream: `opening`, `progress` and `text` in any number, `closing`."""

    def whole(self, tree: Tree) -> dict[str, Any]:
        """The reply that is not streamed."""

    def opening(self) -> Iterator[str]:
        """Events before all others. An event is the text of a server-sent event, with its empty line."""

    def progress(self, line: str) -> Iterator[str]:
        """Events that tell what the clones do, as reasoning."""

    def text(self, text: str) -> Iterator[str]:
        """Events of the next piece of the answer."""

    def closing(self, tree: Tree) -> Iterator[str]:
        """Events at the end."""

    def failing(self, error: dict[str, Any]) -> Iterator[str]:
        """Events at the end of a stream that failed."""


def _event(data: dict[str, Any], name: str = "") -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class ChatReply:
    """`chat.completion`, and `chat.completion.chunk`s. Progress comes as `reasoning_content`, as other servers send it."""

    def __init__(self, tree_id: str, model: str, usage: bool):
        self._id, self._model, self._usage, self._created = tree_id, model, usage, int(time.time())

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> str:
        return _event(self._common("chat.completion.chunk") | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def whole(self, tree: Tree) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": tree.answer or ""}
        choice = {"index": 0, "message": message, "finish_reason": _finish(tree), "logprobs": None}
        return self._common("chat.completion") | {"choices": [choice], "usage": chat_usage(tree)}

    def opening(self) -> Iterator[str]:
        """The chunk with the role."""
        yield self._chunk({"role": "assistant", "content": ""})

    def progress(self, line: str) -> Iterator[str]:
        """A line of reasoning."""
        yield self._chunk({"reasoning_content": f"{line}\n"})

    def text(self, text: str) -> Iterator[str]:
        """A piece of the content."""
        yield self._chunk({"content": text})

    def closing(self, tree: Tree) -> Iterator[str]:
        """The chunk with the reason, that with the usage if it was asked for, and `[DONE]`."""
        yield self._chunk({}, _finish(tree))
        if self._usage:
            yield _event(self._common("chat.completion.chunk") | {"choices": [], "usage": chat_usage(tree)})
        yield "data: [DONE]\n\n"

    def failing(self, error: dict[str, Any]) -> Iterator[str]:
        """The error, in a chunk of its own."""
        yield _event({"error": error})
        yield "data: [DONE]\n\n"


class ResponsesReply:
    """A `response`, and the events of its stream. Progress comes as the summary of a reasoning item before the message."""

    def __init__(self, tree_id: str, model: str):
        self._id, self._model, self._created = tree_id, model, int(time.time())
        self._number = -1
        self._lines: list[str] = []
        self._pieces: list[str] = []
        self._message = -1
        """The place of the message among the items of the output; -1 before it has begun."""

    def _response(self, status: str, output: list[dict[str, Any]], tree: Tree | None = None) -> dict[str, Any]:
        cut = tree is not None and tree.root.status in _CUT
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": "incomplete" if cut else status,
            "model": self._model, "output": output, "error": None, "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None, "metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "temperature": None,
            "top_p": None, "usage": None if tree is None else responses_usage(tree),
        }  # fmt: skip

    def _item(self, text: str, status: str = "completed") -> dict[str, Any]:
        content = [] if status == "in_progress" else [_output_text(text)]
        return {"type": "message", "id": f"msg_{self._id}", "status": status, "role": "assistant", "content": content}

    def _thoughts(self) -> dict[str, Any]:
        summary = [{"type": "summary_text", "text": "".join(self._lines)}] if self._lines else []
        return {"type": "reasoning", "id": f"rs_{self._id}", "summary": summary}

    def _told(self, name: str, **data: Any) -> str:
        self._number += 1
        return _event({"type": name, "sequence_number": self._number, **data}, name)

    def whole(self, tree: Tree) -> dict[str, Any]:
        """The `response`."""
        return self._response("completed", [self._item(tree.answer or "")], tree)

    def opening(self) -> Iterator[str]:
        """`response.created` and `response.in_progress`."""
        yield self._told("response.created", response=self._response("in_progress", []))
        yield self._told("response.in_progress", response=self._response("in_progress", []))

    def progress(self, line: str) -> Iterator[str]:
        """A line of the reasoning's summary; none once the message has begun."""
        if self._message >= 0:
            return
        where = {"item_id": f"rs_{self._id}", "output_index": 0, "summary_index": 0}
        if not self._lines:
            yield self._told("response.output_item.added", output_index=0, item=self._thoughts())
            yield self._told("response.reasoning_summary_part.added", **where, part={"type": "summary_text", "text": ""})
        self._lines.append(f"{line}\n")
        yield self._told("response.reasoning_summary_text.delta", **where, delta=f"{line}\n")

    def text(self, text: str) -> Iterator[str]:
        """A piece of the message's text."""
        yield from self._begun()
        self._pieces.append(text)
        yield self._told("response.output_text.delta", **self._where(), delta=text, logprobs=[])

    def closing(self, tree: Tree) -> Iterator[str]:
        """The ends of what has begun, and `response.completed` or `response.incomplete`."""
        yield from self._begun()
        text = "".join(self._pieces)
        yield self._told("response.output_text.done", **self._where(), text=text, logprobs=[])
        yield self._told("response.content_part.done", **self._where(), part=_output_text(text))
        yield self._told("response.output_item.done", output_index=self._message, item=self._item(text))
        output = [*([self._thoughts()] if self._lines else []), self._item(text)]
        response = self._response("completed", output, tree)
        yield self._told(f"response.{response['status']}", response=response)

    def failing(self, error: dict[str, Any]) -> Iterator[str]:
        """`response.failed`."""
        failed = self._response("failed", []) | {"error": {"code": "server_error", "message": error["message"]}}
        yield self._told("response.failed", response=failed)

    def _where(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._id}", "output_index": self._message, "content_index": 0}

    def _begun(self) -> Iterator[str]:
        """The events with which the message begins, after those with which the reasoning ends."""
        if self._message >= 0:
            return
        self._message = 0
        if self._lines:
            where = {"item_id": f"rs_{self._id}", "output_index": 0, "summary_index": 0}
            text = "".join(self._lines)
            yield self._told("response.reasoning_summary_text.done", **where, text=text)
            yield self._told("response.reasoning_summary_part.done", **where, part={"type": "summary_text", "text": text})
            yield self._told("response.output_item.done", output_index=0, item=self._thoughts())
            self._message = 1
        yield self._told("response.output_item.added", output_index=self._message, item=self._item("", "in_progress"))
        yield self._told("response.content_part.added", **self._where(), part=_output_text(""))


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _finish(tree: Tree) -> str:
    return "length" if tree.root.status in _CUT else "stop"


def chat_usage(tree: Tree) -> dict[str, Any]:
    """What the whole tree cost, in the words of chat completions; `ramet` has the rest."""
    usage, prompt = tree.usage, tree.usage.prefilled + tree.usage.cached
    return {
        "prompt_tokens": prompt, "completion_tokens": usage.generated, "total_tokens": prompt + usage.generated,
        "prompt_tokens_details": {"cached_tokens": usage.cached}, "ramet": asdict(usage),
    }  # fmt: skip


def responses_usage(tree: Tree) -> dict[str, Any]:
    """The same in the words of responses."""
    usage, prompt = tree.usage, tree.usage.prefilled + tree.usage.cached
    return {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": usage.cached}, "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + usage.generated, "ramet": asdict(usage),
    }  # fmt: skip
