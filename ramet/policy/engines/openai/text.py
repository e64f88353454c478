"""Counting the tokens of a sample that arrives as text.

The server's usage is the count if it is credible; else its log-probabilities, one per token; else the tokens are estimated from the
text, reasoning and tool calls included, too many rather than too few. An estimate never exceeds `max_tokens`; the server's own count
may, and is charged in full.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.tree import OVERRUN
from ramet.errors import PolicyError
from ramet.policy.engines.openai.chunk import Chunk, logprob
from ramet.policy.engines.openai.server import note_prompt
from ramet.policy.engines.openai.wire import NativeCall, WireFormat

MAX_TOKEN_CHARACTERS = 32
"""The largest credible number of characters per token, on average over a sample."""
MAX_CHARGED = 2**20
"""The most tokens that are charged for one sample; a larger count of a server is not credible."""
_TOKEN = re.compile(r" ?[A-Za-z]{1,4}(?: (?![A-Za-z]))?|\s{1,8}|.", re.DOTALL)
_RARE = re.compile(r"[\U00010000-\U0010ffff]")
_MINUS_INFINITY = -9999.0
"""The finite number that is recorded for a log-probability of minus infinity."""


def estimate_tokens(text: str) -> int:
    """The tokens of a text, estimated without its tokenizer: four letters, a digit, a sign or some white space are one, an emoji three."""
    return sum(1 for _ in _TOKEN.finditer(text)) + 2 * sum(1 for _ in _RARE.finditer(text))


@dataclass(slots=True)
class _Call:
    """A native call, as far as it has come."""

    name: str = ""
    arguments: list[str] = field(default_factory=list)


class TextAccumulator:
    """Adds chunks of text to `partial`, with an id for every token. Call `settle` when the sample has ended, in whichever way."""

    def __init__(self, chat: WireFormat, partial: Partial, request: SampleRequest):
        self._chat, self._partial, self._max_tokens, self._prompt = chat, partial, request.max_tokens, len(request.prompt)
        self._text: list[str] = []
        self._half = ""
        """The first half of a surrogate pair; the next event should have the second."""
        self._characters = self._hidden = 0
        self._reasoned = False
        self._calls: dict[tuple[int, str], _Call] = {}
        """Native calls, by their index and id."""
        self._newest: dict[int, tuple[int, str]] = {}
        self._tokens = self._bare = self._bare_characters = self._late = self._estimated_hidden = 0
        self._usage: int | None = None
        self._text_without_ids = False
        """Whether some of the text is in no id yet."""

    def take(self, chunk: Chunk) -> None:
        """Add a chunk. Raises `PolicyError` once the server has certainly generated more than `max_tokens`."""
        note_prompt(chunk.usage, self._prompt, self._partial)
        text, reasoning = self._new(chunk)
        call_text = "".join(self._call(chunk.whole, *call) for call in chunk.calls)
        self._characters += len(text)
        self._hidden += len(reasoning) + len(call_text)
        if text:
            self._text.append(text)
        if chunk.tokens:
            self._add_listed(text, chunk)
        elif text or reasoning or call_text:
            self._add_estimated(text, reasoning + call_text)
        if chunk.usage is not None and chunk.usage.generated is not None:
            self._usage = max(self._usage or 0, chunk.usage.generated)
            self._pad(min(self._usage, self._max_tokens))
        if max(self._tokens, self._credible_usage or 0) > self._max_tokens or self._characters + self._hidden > self._limit:
            self.settle()

    @property
    def _limit(self) -> int:
        """More characters than this cannot be `max_tokens` tokens."""
        return MAX_TOKEN_CHARACTERS * self._max_tokens + 256

    def _call(self, whole: bool, index: int, call_id: str, name: str, arguments: str) -> str:
        """Add a part of a call or, if it is `whole`, what of it is new. Returns what was added; for a new call, some text."""
        key = (index, call_id) if call_id else self._newest.get(index, (index, ""))
        new = key not in self._calls
        call = self._calls.setdefault(key, _Call())
        self._newest[index] = key
        if whole and not new:
            arguments = arguments.removeprefix("".join(call.arguments))
        added = arguments if call.name else name + arguments
        call.name = call.name or name
        call.arguments.append(arguments)
        self._text_without_ids = True
        return added or "()" * new

    def _new(self, chunk: Chunk) -> tuple[str, str]:
        """The text and the reasoning that had not been chunk before, surrogate halves joined."""
        text, reasoning = chunk.text, chunk.reasoning
        if chunk.whole:
            before = "".join(self._text)
            text = text.removeprefix(before)
            reasoning = "" if self._reasoned else reasoning
        self._reasoned = self._reasoned or bool(reasoning)
        if text:
            text, self._half = self._half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._half = text[:-1], text[-1]
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, reasoning

    def _add_listed(self, text: str, chunk: Chunk) -> None:
        """Add tokens that the server lists; they may belong to text that arrived before, or repeat all earlier tokens."""
        pieces = [token for token, _ in chunk.tokens]
        if not text and not chunk.reasoning and self._tokens and "".join(pieces) == "".join(self._text):
            return
        self._tokens += len(pieces)
        self._late += max(sum(map(len, pieces)) - len(text), 0)
        if "".join(pieces) != text:
            pieces = [text, *[""] * (len(pieces) - 1)]  # parts of a character, or a stop token that is not shown
        if max(map(len, pieces)) > WireFormat.LONGEST:
            pieces, self._text_without_ids = [""] * len(pieces), True
        self._partial.ids += map(self._chat.piece, pieces)
        self._partial.logprobs += [_number(value) for _, value in chunk.tokens]
        if len(self._partial.ids) > self._counted():
            self._fit()

    def _add_estimated(self, text: str, hidden: str) -> None:
        """Add text, and hidden text that is charged but not kept, whose tokens the server does not list."""
        shown = estimate_tokens(text)
        count = shown + estimate_tokens(hidden)
        self._bare += shown
        self._bare_characters += len(text)
        self._estimated_hidden += count - shown
        free = max(self._max_tokens - len(self._partial.ids), 0)
        ids = self._chat.pieces(text, min(shown, free)) if free else []
        self._text_without_ids = self._text_without_ids or bool(text and not free)
        self._partial.ids += ids
        self._partial.logprobs += [0.0] * len(ids)
        self._pad(min(len(self._partial.ids) + count - shown, self._max_tokens))

    def _pad(self, count: int) -> None:
        missing = count - len(self._partial.ids)
        if missing > 0:
            self._partial.ids += [self._chat.piece("")] * missing
            self._partial.logprobs += [0.0] * missing

    @property
    def _credible_usage(self) -> int | None:
        """The server's count of generated tokens, unless there is too much text for so few; None without one."""
        usage = self._usage
        return None if usage is None or usage * MAX_TOKEN_CHARACTERS < self._characters + self._hidden else usage

    def _counted(self) -> int:
        """The number of tokens so far."""
        usage = self._credible_usage
        if usage is not None:
            return max(usage, self._tokens)
        # Tokens that were listed late are those of text that arrived without tokens.
        bare = 0 if self._tokens and self._late >= self._bare_characters else self._bare
        characters = self._characters + self._hidden
        estimated = max(bare + self._estimated_hidden, -(-characters // MAX_TOKEN_CHARACTERS) - self._tokens)
        return self._tokens + (estimated if characters > self._limit else min(estimated, max(self._max_tokens - self._tokens, 0)))

    def _fit(self) -> int:
        """Make the number of ids that of the tokens, with all the text in them. Returns the number of tokens."""
        partial, counted = self._partial, self._counted()
        count = min(counted, MAX_CHARGED)
        self._pad(count)
        if self._text_without_ids or len(partial.ids) != count:
            calls = [NativeCall(name, call.name, "".join(call.arguments)) for (_, name), call in self._calls.items()]
            partial.ids[:] = self._chat.pieces("".join(self._text), count, calls)
            partial.logprobs[:] = [*partial.logprobs, *[0.0] * len(partial.ids)][: len(partial.ids)]
            self._text_without_ids = False
        return counted

    def settle(self) -> None:
        """Note that the sample has ended. Raises `PolicyError` if it has more than `max_tokens` tokens."""
        if self._half:
            self._text.append("\N{REPLACEMENT CHARACTER}")
            self._half, self._text_without_ids = "", True
        counted = self._fit()
        if counted > self._max_tokens:
            raise PolicyError(f"generated {counted} tokens for a grant of {self._max_tokens}: the server {OVERRUN}")


def _number(value: Any) -> float:
    """A finite log-probability for the record: no training uses it."""
    finite = logprob(value)
    return finite if finite is not None else _MINUS_INFINITY if value == float("-inf") else 0.0
