"""A policy whose turns are written by a program, with latency and faults, for simulation and tests.

One token is one character, so that contexts are legible. Faults depend on the request's seed and on how often it was attempted,
never on the order in which requests arrive: the same seed meets the same faults in every interleaving.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio

from ramet.agents.calls import ParsedTurn, Schemas, parse_spelled
from ramet.agents.encoding import PlaceholderIds, no_vision
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tree import Message, StopReason
from ramet.errors import ConfigError, PolicyError, TransientPolicyError

STOP = 0
"""The token id that ends a turn."""


class PlainFormat:
    """A chat format of one token per character, its code point; 0 ends a turn. Only text, no system messages and no videos."""

    stop_ids = frozenset({STOP})
    placeholder_ids: PlaceholderIds = staticmethod(no_vision)

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """`T` if a tool is offered, else `-`, then each message followed by `|`."""
        return [ord(c) for c in ("T" if tools else "-") + "".join(m.content + "|" for m in messages if m.role != "system")]

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """The stop id unless the turn is closed, then the tool message in angle brackets, or the user's followed by `|`."""
        return [*([] if closed else [STOP]), *map(ord, f"<{text}>" if role == "tool" else f"{text}|")]

    def after_calls(self, replies: Sequence[str], closed: bool) -> list[int]:
        """The replies in one tool message."""
        return self.after_turn("\n".join(replies), closed)

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The ids of a well-formed assistant turn, with a call or without."""
        return [*map(ord, text if call is None else f"{text}<tool_call>{call}</tool_call>"), STOP]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Read a turn whose calls stand between `<tool_call>` tags."""
        return parse_spelled("".join(chr(i) for i in sampled if i != STOP))

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text; `$` is the stop id."""
        return "".join(chr(i) if i != STOP else "$" for i in ids)


SHIFT = 2_000_000
"""How far the ids of `ShiftedFormat` lie above those of `PlainFormat`, which are below it."""


class ShiftedFormat(PlainFormat):
    """Another tokenizer: `PlainFormat` with all ids raised by `SHIFT`."""

    stop_ids = frozenset({STOP + SHIFT})

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """As `PlainFormat` does, under other ids."""
        return [i + SHIFT for i in super().render(messages, tools)]

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """As `PlainFormat` does, under other ids."""
        return [i + SHIFT for i in super().after_turn(text, closed, role)]

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """As `PlainFormat` does, under other ids."""
        return [i + SHIFT for i in super().turn(text, call)]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """As `PlainFormat` does, of other ids."""
        return super().parse([i - SHIFT for i in sampled])

    def text(self, ids: Sequence[int]) -> str:
        """As `PlainFormat` does, of other ids."""
        return super().text([i - SHIFT for i in ids])


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with a sample: after `after` tokens it waits `delay` seconds, then raises `error` if there is one."""

    after: int
    delay: float = 0.0
    error: PolicyError | None = None


@dataclass(frozen=True, slots=True)
class Faults:
    """Random faults: on average, one attempt in `every` meets one. `lasting`: some are errors that no retry mends."""

    seed: int
    every: float
    lasting: bool = True

    def __call__(self, request: SampleRequest, attempt: int) -> Fault | None:
        """The fault of one attempt (counted from 0), or None."""
        rng = random.Random(f"{self.seed}/{request.seed}/{attempt}")
        if rng.random() * self.every >= 1:
            return None
        after = rng.choice((0, 0, 1, rng.randint(0, 40)))
        kinds: list[Callable[[], Fault]] = [
            lambda: Fault(after, rng.choice((1.0, 30.0, 600.0))),
            lambda: Fault(after, 60.0, TransientPolicyError("timed out after 60 seconds")),
            lambda: Fault(after, 0.0, TransientPolicyError("connection reset by peer")),
            lambda: Fault(0, 0.0, TransientPolicyError("429 too many requests", retry_after=rng.choice((0.0, 1.0, 20.0)))),
            lambda: Fault(after, 0.0, TransientPolicyError("503 service unavailable", retry_after=rng.choice((None, 5.0)))),
        ]
        if self.lasting:
            kinds.append(lambda: Fault(after, 0.0, PolicyError("out of memory")))
        return rng.choice(kinds)()


@dataclass(slots=True)
class ScriptedPolicy:
    """A policy whose turn is `program(context as text)`. A NUL in it ends the turn; what the program raises is raised.

    delay         seconds that one token takes
    stride        tokens between two awaits; the last await of a sample comes after its last token
    faults        maps a request and the number of earlier attempts at it to the fault that it meets, or None
    requests      all requests, in order of arrival
    running       samples in flight; `most_running` is the largest number so far
    injected      faults that have been met
    down_until    time before which every request is refused
    shift         what its ids lie above characters: 0, or `SHIFT` beside a `ShiftedFormat`
    """

    program: Callable[[str], str]
    delay: float = 0.0
    stride: int = 1
    faults: Callable[[SampleRequest, int], Fault | None] | None = None
    version: int = 3
    context: int | None = None
    shift: int = 0
    requests: list[SampleRequest] = field(default_factory=list)
    emitted: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """Numbers of tokens that each attempt generated, by the request's (group, seed)."""
    given: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """The ids that the latest attempt generated, by (group, seed)."""
    tried: dict[tuple[str, int], int] = field(default_factory=dict)
    """Numbers of attempts made before this policy was created, by (group, seed)."""
    running: int = 0
    most_running: int = 0
    injected: int = 0
    down_until: float = 0.0
    _crashes: int = 0

    def __post_init__(self) -> None:
        if self.stride < 1 or not 0 <= self.delay < math.inf:
            raise ConfigError(f"a stride of {self.stride} and a delay of {self.delay}; give at least 1 token and 0 seconds")

    def crash(self, seconds: float) -> None:
        """Make everything in flight fail at its next token, and refuse requests for `seconds`."""
        self._crashes += 1
        self.down_until = anyio.current_time() + seconds

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample the program's turn token by token. Raises the attempt's fault, or `TransientPolicyError` after a `crash`."""
        key = (request.group, request.seed)
        attempts = self.emitted.setdefault(key, [])
        number = len(attempts)
        attempts.append(0)
        self.given[key] = []
        self.requests.append(request)
        fault = self.faults(request, self.tried.get(key, 0) + number) if self.faults is not None else None
        crashes = self._crashes
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if anyio.current_time() < self.down_until:
                self.injected += 1
                raise TransientPolicyError("connection refused")
            shift = self.shift
            text = self.program("".join(chr(i - shift) if i - shift else "$" for i in request.prompt))[: request.max_tokens]
            cut = next((i + 1 for i, c in enumerate(text) if ord(c) + shift in request.stop_ids), len(text))
            partial.prefilled = len(request.prompt)
            done = 0
            while True:
                if fault is not None and done >= min(fault.after, cut - 1):
                    self.injected += 1
                    if fault.delay:
                        await anyio.sleep(fault.delay)
                    if fault.error is not None:
                        raise fault.error
                    fault = None
                stride = min(self.stride, cut - done)
                await anyio.sleep(self.delay * stride)
                if self._crashes != crashes:
                    self.injected += 1
                    raise TransientPolicyError("connection reset: the engine crashed")
                ids = [ord(c) + shift for c in text[done : done + stride]]
                partial.ids += ids
                self.given[key] += ids
                partial.logprobs += [-0.5] * stride
                done += stride
                attempts[number] = done
                if done >= cut:
                    break
            ended = bool(partial.ids) and partial.ids[-1] in request.stop_ids
            stop = StopReason.END if ended else StopReason.LENGTH
            return Sample(tuple(partial.ids), tuple(partial.logprobs), stop, len(request.prompt), 0, self.version)
        finally:
            self.running -= 1
