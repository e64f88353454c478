"""The policy of a chat server: messages to `/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ramet.agents.sampling import Partial, SampleRequest
from ramet.policy.engines.openai.server import Server
from ramet.policy.engines.openai.text import TextAccumulator
from ramet.policy.engines.openai.wire import WireFormat

GUESSED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""Neutral values of the sampling fields of all servers; left out if the first request is refused without naming a field."""


class ChatPolicy(Server):
    """Samples from any chat server. A sample has one id per charged token (`TextAccumulator`); together they encode its text.

    Reasoning that the server sends apart is charged but not kept. Tools are sent as `tools`, and calls and results go back and forth as
    such; a server that refuses this, or is said to have no such field (`names`), gets all of it as text.
    """

    path = "chat/completions"
    optional: tuple[str, ...] = ("max_tokens", "temperature", "top_p", "top_k", "seed", "logprobs", "stream_options", "stream", "tools")
    guessed: Mapping[str, Any] = GUESSED

    def __init__(self, url: str, chat: WireFormat, model: str | None = None, **options: Any) -> None:
        super().__init__(url, model, **options)
        self._chat = chat

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        sampling = request.sampling
        messages, tools = self._conversation(request)
        extra: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        if tools:
            extra["tools"] = tools
        return {
            "messages": messages, "max_tokens": request.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": request.seed % 2**31, "logprobs": True,
            "stream_options": {"include_usage": True}, **extra,
        }  # fmt: skip

    def _conversation(self, request: SampleRequest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages of a request, and the tools to be sent beside them; none where the messages describe them."""
        tools = self._chat.tools(request.prompt) if self._fields.has("tools") else []
        return self._chat.messages(request.prompt, self._fields.fold_system, bool(tools)), tools

    def accumulator(self, request: SampleRequest, partial: Partial) -> TextAccumulator:
        """An accumulator of text."""
        return TextAccumulator(self._chat, partial, request)
