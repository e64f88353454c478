"""A policy whose turns are written by a program, and a format that spells tokens as characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from ramet.agents.chat import ParsedTurn, _parse_spelled
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tree import Message, StopReason

STOP = 0


class PlainFormat:
    """One token per character; 0 ends a turn. For tests of the runtime, where spelling does not matter."""

    stop_ids = frozenset({STOP})

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        return [ord(c) for c in ("T" if tools else "-") + "".join(m.content + "|" for m in messages if m.role != "system")]

    def after_turn(self, text: str, closed: bool) -> list[int]:
        return [*([] if closed else [STOP]), *(ord(c) for c in f"<{text}>")]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        return _parse_spelled("".join(chr(i) for i in sampled if i != STOP))

    def text(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) if i != STOP else "$" for i in ids)


class ScriptedPolicy:
    """`program(text of the context)` gives the turn's text; a "\\0" in it ends the turn. One await per token.

    What a program raises is raised; `failing` maps the number of a request to an error raised after
    `after` tokens of it.
    """

    version = 3
    context: int | None = None

    def __init__(self, program: Callable[[str], str], failing: dict[int, Exception] | None = None, after: int = 2, delay: float = 0.0):
        self.program, self.failing, self.after, self.delay = program, failing or {}, after, delay
        self.requests: list[SampleRequest] = []
        self.running = self.most_running = 0

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        number = len(self.requests)
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            text = self.program(PlainFormat().text(request.prompt))
            partial.prefilled = len(request.prompt)
            for character in text[: request.max_tokens]:
                await anyio.sleep(self.delay)
                if number in self.failing and len(partial.ids) >= self.after:
                    raise self.failing[number]
                partial.ids.append(ord(character))
                partial.logprobs.append(-0.5)
            ended = bool(partial.ids) and partial.ids[-1] == STOP
            return Sample(
                tuple(partial.ids), tuple(partial.logprobs), StopReason.END if ended else StopReason.LENGTH, len(request.prompt), 0, 3
            )
        finally:
            self.running -= 1
