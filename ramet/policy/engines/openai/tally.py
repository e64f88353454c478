"""What a sample that is told as text has cost so far.

The server's usage counts where there is one that can be true; else its log-probabilities, one a token; else the tokens are
estimated from the text, reasoning and tool calls included, rather too many than too few. An estimate is never more than what
was asked for; what the server itself counts may be, and is charged.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ramet.agents.sampling import Partial, SampleRequest
from ramet.errors import PolicyError
from ramet.policy.engines.openai.said import Said, logprob
from ramet.policy.engines.openai.server import note_prompt
from ramet.policy.engines.openai.wire import WireFormat

MOST_CHARACTERS = 32
"""Characters that tokens have at most, on average over a sample."""
MOST_CHARGED = 2**20
"""Tokens of one sample that are charged; a server that claims more is not believed."""
_TOKEN = re.compile(r" ?[A-Za-z]{1,4}(?: (?![A-Za-z]))?|\s{1,8}|.", re.DOTALL)
_RARE = re.compile(r"[\U00010000-\U0010ffff]")
_LEAST = -9999.0
"""A log-probability for tokens that were all but impossible."""


def estimate(text: str) -> int:
    """Tokens of a text by no tokenizer in particular: four letters, a digit, a sign, some white space are one each, an emoji three."""
    return sum(1 for _ in _TOKEN.finditer(text)) + 2 * sum(1 for _ in _RARE.finditer(text))


class Tally:
    """Keeps `partial` up to date with what has been said. `settle` it when the sample has ended, whichever way."""

    def __init__(self, chat: WireFormat, partial: Partial, request: SampleRequest):
        self._chat, self._partial, self._most, self._prompt = chat, partial, request.max_tokens, len(request.prompt)
        self._text: list[str] = []
        self._half = ""
        """A surrogate whose other half is to come with the next event."""
        self._characters = self._hidden = 0
        self._thought = False
        self._calls: dict[tuple[int, str], list[str]] = {}
        self._finish = ""
        self._tokens = self._bare = self._bare_characters = self._late = self._guessed = 0
        self._usage: int | None = None
        self._untold = False
        """Is there text that stands in no id yet?"""

    def take(self, said: Said) -> None:
        """Note what an event says. Raises `PolicyError` once the server has generated more than it was asked for, beyond doubt."""
        note_prompt(said.usage, self._prompt, self._partial)
        self._finish = said.finish or self._finish
        text, thought = self._new(said)
        arguments = "".join(name + given for _, _, name, given in said.calls)
        for place, own, name, given in said.calls:
            last = next((key for key in reversed(self._calls) if key[0] == place), (place, own))
            held = self._calls.setdefault((place, own) if own else last, ["", ""])
            held[0], held[1] = held[0] or name, held[1] + given
        self._characters += len(text)
        self._hidden += len(thought) + len(arguments)
        if text:
            self._text.append(text)
        if said.tokens:
            self._told(text, said)
        elif text or thought or arguments:
            self._guess(text, thought + arguments)
        if said.usage is not None and said.usage.generated is not None:
            self._usage = max(self._usage or 0, said.usage.generated)
            self._pad(min(self._usage, self._most))
        if max(self._tokens, self._credible_usage or 0) > self._most or self._characters + self._hidden > self._limit:
            self.settle()

    @property
    def _limit(self) -> int:
        """Characters past which no server has kept to what was asked for."""
        return MOST_CHARACTERS * self._most + 256

    def _new(self, said: Said) -> tuple[str, str]:
        """The text and the thoughts that had not been said before, surrogate halves joined."""
        text, thought = said.text, said.thought
        if said.whole:
            before = "".join(self._text)
            text = text.removeprefix(before)
            thought = "" if self._thought else thought
        self._thought = self._thought or bool(thought)
        if text:
            text, self._half = self._half + text, ""
            if "\ud800" <= text[-1] <= "\udbff":
                text, self._half = text[:-1], text[-1]
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, thought

    def _told(self, text: str, said: Said) -> None:
        """Tokens that the server lists, which may be those of text that came before, or all tokens once more."""
        pieces = [token for token, _ in said.tokens]
        if not text and not said.thought and self._tokens and "".join(pieces) == "".join(self._text):
            return
        self._tokens += len(pieces)
        self._late += max(sum(map(len, pieces)) - len(text), 0)
        if "".join(pieces) != text:
            pieces = [text, *[""] * (len(pieces) - 1)]  # parts of a character, or a stop token that is not shown
        if max(map(len, pieces)) > WireFormat.LONGEST:
            pieces, self._untold = [""] * len(pieces), True
        self._partial.ids += map(self._chat.piece, pieces)
        self._partial.logprobs += [_number(value) for _, value in said.tokens]
        if len(self._partial.ids) > self._counted():
            self._fit()

    def _guess(self, text: str, hidden: str) -> None:
        shown = estimate(text)
        count = shown + estimate(hidden)
        self._bare += shown
        self._bare_characters += len(text)
        self._guessed += count - shown
        free = max(self._most - len(self._partial.ids), 0)
        ids = self._chat.pieces(text, min(shown, free)) if free else []
        self._untold = self._untold or bool(text and not free)
        self._partial.ids += ids
        self._partial.logprobs += [0.0] * len(ids)
        self._pad(min(len(self._partial.ids) + count - shown, self._most))

    def _pad(self, count: int) -> None:
        missing = count - len(self._partial.ids)
        if missing > 0:
            self._partial.ids += [self._chat.piece("")] * missing
            self._partial.logprobs += [0.0] * missing

    @property
    def _credible_usage(self) -> int | None:
        """The server's count, unless there is more text than so few tokens can be."""
        usage = self._usage
        return None if usage is None or usage * MOST_CHARACTERS < self._characters + self._hidden else usage

    def _counted(self) -> int:
        """Tokens so far."""
        usage = self._credible_usage
        if usage is not None:
            return max(usage, self._tokens)
        # Tokens that were listed late stand for the text that had come without.
        bare = 0 if self._tokens and self._late >= self._bare_characters else self._bare
        characters = self._characters + self._hidden
        guessed = max(bare + self._guessed, -(-characters // MOST_CHARACTERS) - self._tokens)
        return self._tokens + (guessed if characters > self._limit else min(guessed, max(self._most - self._tokens, 0)))

    def _fit(self) -> int:
        """Make the ids as many as the tokens, with all the text in them; the number of tokens."""
        partial, counted = self._partial, self._counted()
        count = min(counted, MOST_CHARGED)
        self._pad(count)
        if self._untold or len(partial.ids) != count:
            partial.ids[:] = self._chat.pieces("".join(self._text), count)
            partial.logprobs[:] = [*partial.logprobs, *[0.0] * len(partial.ids)][: len(partial.ids)]
            self._untold = False
        return counted

    def settle(self) -> None:
        """Note that the sample has ended. Raises `PolicyError` if it has more tokens than were asked for, or calls that end no turn."""
        called = bool(self._calls)
        if self._half:
            self._text.append("\N{REPLACEMENT CHARACTER}")
            self._half, self._untold = "", True
        for name, arguments in self._calls.values():
            self._text.append(_spelled(name, arguments))
            self._untold = True
        self._calls = {}
        counted = self._fit()
        if counted > self._most:
            raise PolicyError(f"generated {counted} tokens for a grant of {self._most}: the server does not keep to max_tokens")
        if called and self._finish.lower() == "stop":
            raise PolicyError("calls a tool natively in a turn that it ends with 'stop', not 'tool_calls': turn its tool parser off")


def _number(value: Any) -> float:
    """A log-probability that can be kept: nothing is trained on it."""
    known = logprob(value)
    return known if known is not None else _LEAST if value == float("-inf") else 0.0


def _spelled(name: str, arguments: str) -> str:
    """A native call in the words of the prompt. The tag that ends it can stand inside its JSON only escaped."""
    call = f'{{"name": {json.dumps(name)}, "arguments": {arguments.strip() or "{}"}}}'
    return "\n<tool_call>\n" + call.replace("</", "<\\/") + "\n</tool_call>"
