"""Messages to `/chat/completions`."""

from __future__ import annotations

from typing import Any

from ramet.agents.sampling import Partial, SampleRequest
from ramet.policy.engines.openai.server import Server
from ramet.policy.engines.openai.tally import Tally
from ramet.policy.engines.openai.wire import WireFormat

GUESSED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""Values that change nothing, for the fields of all servers; taken back if the first request is refused without naming a field."""


class ChatPolicy(Server):
    """Any chat server. A sample has an id for every token that is charged (`Tally`); together they carry its text.

    Reasoning that the server gives apart is charged and not kept; native tool calls are spelled out as the prompt asks for them.
    """

    path = "chat/completions"
    optional = ("max_tokens", "temperature", "top_p", "top_k", "seed", "logprobs", "stream_options", "stream")
    guessed = GUESSED

    def __init__(self, url: str, chat: WireFormat, model: str | None = None, **options: Any) -> None:
        super().__init__(url, model, **options)
        self._chat = chat

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        asked = request.sampling
        extra = {"top_k": asked.top_k} if asked.top_k else {}
        return {
            "messages": self._chat.messages(request.prompt, self._fields.fold_system), "max_tokens": request.max_tokens,
            "temperature": asked.temperature, "top_p": asked.top_p, "seed": request.seed % 2**31, "logprobs": True,
            "stream_options": {"include_usage": True}, **extra,
        }  # fmt: skip

    def hear(self, request: SampleRequest, partial: Partial) -> Tally:
        return Tally(self._chat, partial, request)
