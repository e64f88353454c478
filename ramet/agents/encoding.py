"""Message content to token ids: untrusted text never becomes a control token.

All message content is untrusted. `TextEncoder` encodes it so that no control token of the tokenizer can appear, whatever the text
spells. The text between two control tokens is encoded as one piece, as the tokenizer itself would encode it.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from ramet.agents.tree import Message, Segment
from ramet.errors import ChatFormatError


class TextEncoder:
    """Encodes untrusted text with one tokenizer, never to a control token.

    A text continues what comes before it: the space mark that some tokenizers put in front of a text is not added.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._continued = _without_prefix(tokenizer)
        # Runs of white space that have a token of their own (Gemma, GPT-NeoX) are text.
        added: dict[str, int] = {literal: i for literal, i in tokenizer.get_added_vocab().items() if literal.strip(" \t\r\n▁")}
        for token in tokenizer.all_special_tokens:
            added[token] = tokenizer.convert_tokens_to_ids(token)
        self.control_ids = frozenset(added.values())
        self._added = added
        self._control = _any_of(added)
        self._literal = _any_of(literal for literal in added if len(literal) > 1)
        self._after_control = self._continued if self._continued is not tokenizer and self._prefix_at_start_only() else tokenizer

    def __call__(self, text: str) -> list[int]:
        """The ids of untrusted text that follows other text."""
        return self._text(text, self._continued)

    def assembled(self, parts: Iterable[int | str], start: bool = False) -> list[int]:
        """Ids unchanged, and each text between them encoded as the tokenizer encodes text between control tokens.

        `start`: the parts begin a prompt, where some tokenizers add a space mark.
        """
        ids: list[int] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                ids += self._text("".join(map(str, run)), self._tokenizer if start and not ids else self._after_control)
            else:
                ids += map(int, run)
        return ids

    def trusted(self, text: str) -> list[int | str]:
        """Our own text, or a template's, as parts for `assembled`: where it spells a control token, it means that token."""
        if self._control is None:
            return [text]
        parts: list[int | str] = []
        start, strips = 0, False
        for match in self._control.finditer(text):
            index = self._added[match[0]]
            token = self._tokenizer.added_tokens_decoder.get(index)
            before = text[start : match.start()]
            before = before.lstrip() if strips else before
            parts += [before.rstrip() if token is not None and token.lstrip else before, index]
            start, strips = match.end(), token is not None and token.rstrip
        return [part for part in [*parts, text[start:].lstrip() if strips else text[start:]] if part != ""]

    def defused(self, text: str) -> str:
        """The text with a space in every spelling of a control token, so that even as trusted text it means none."""
        while self._literal is not None and self._literal.search(text):
            text = self._literal.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def _text(self, text: str, tokenizer: Any) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        ids = self._encode(text, tokenizer)
        if self.control_ids.isdisjoint(ids):
            return ids
        # An added token was spelled. Cutting each spelling after its first character keeps it text.
        pieces, start = [], 0
        if self._literal is not None:
            for match in self._literal.finditer(text):
                pieces.append(text[start : match.start() + 1])
                start = match.start() + 1
        pieces.append(text[start:])
        ids = []
        for piece in pieces:
            encoded = self._encode(piece, self._continued if ids else tokenizer)
            if not self.control_ids.isdisjoint(encoded):
                encoded = [i for character in piece for i in self._encode(character, self._continued)]
            ids += encoded
        if not self.control_ids.isdisjoint(ids):
            raise ChatFormatError("this tokenizer turns plain text into control tokens; it cannot be used safely")
        return ids

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        if not text:
            return []
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _prefix_at_start_only(self) -> bool:
        """Whether text after a control token gets no space mark (`prepend_scheme="first"`; "always" adds one there too)."""
        for literal, index in self._added.items():
            if self._tokenizer.encode(literal, add_special_tokens=False) == [index]:
                joint: list[int] = self._tokenizer.encode(literal + "a", add_special_tokens=False)
                return joint[1:] == self._encode("a", self._continued)
        return False


def _any_of(literals: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the literals, the longest first; None if there are none."""
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _without_prefix(tokenizer: Any) -> Any:
    """A copy of the tokenizer that puts no space, or space mark, in front of a text; the tokenizer itself if it puts none."""
    if not any(_prefixes(tokenizer)):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    for component, setting, off in _prefixes(changed):
        setattr(component, setting, off)
    return changed


def _prefixes(tokenizer: Any) -> Iterator[tuple[Any, str, Any]]:
    """The components of a fast tokenizer that put something in front of a text: (component, setting, the value that turns it off)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pending = [] if backend is None else [backend.normalizer, backend.pre_tokenizer]
    while pending:
        component = pending.pop()
        if type(component).__name__ == "Sequence":
            pending += list(component)
        for setting, off in (("prepend", ""), ("prepend_scheme", "never"), ("add_prefix_space", False)):
            if getattr(component, setting, off) != off:
                yield component, setting, off


def token_id(tokenizer: Any, token: str) -> int:
    """The id of one token. Raises `ChatFormatError` if the tokenizer does not have it."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(index) != token:
        raise ChatFormatError(f"the tokenizer has no token {token!r}; choose another chat format")
    return int(index)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, control tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


PlaceholderIds = Callable[[Segment], Sequence[int]]
"""From a video segment to the token ids that stand for it in a prompt."""


def no_vision(segment: Segment) -> Sequence[int]:
    """The `PlaceholderIds` of a text-only model: raises `ChatFormatError`."""
    raise ChatFormatError(f"the task has a video ({segment.file}), and this model has no vision here; choose one that has")


class TokenizerFormat(ABC):
    """What all chat formats on a Hugging Face tokenizer share."""

    placeholder_ids: PlaceholderIds = staticmethod(no_vision)

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)

    @abstractmethod
    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """As `ChatFormat.after_turn`."""

    def after_calls(self, replies: Sequence[str], closed: bool) -> list[int]:
        """The replies in one tool message."""
        return self.after_turn("\n".join(replies), closed)

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text for people to read, control tokens included."""
        return decode(self._tokenizer, ids)

    def _content(self, message: Message) -> list[int | str]:
        """The placeholder ids of a message's videos, then its text."""
        return [*(i for segment in message.media for i in self.placeholder_ids(segment)), message.content]
