"""Where the answer stands in a query: trainers such as OpenRLHF send a prompt and its answer as one text, decoded from tokens.

Decoding rarely gives a prompt back as it was: it may be padded, normalised (Unicode, blanks, case) or cut at the left to a length, and
special tokens appear as text. So what is compared are letters alone: without blanks, special tokens and what a cut character left.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

LEAST = 8
"""Letters of a prompt that was cut: fewer may begin a query by chance."""
_SPECIAL = r"<\|[\w-]{1,40}\|>|</?s>|<(?:pad|eos|bos|unk|end_of_turn|start_of_turn)>"


def answer_of(query: str, prompt: str, special: Sequence[str] = ()) -> str | None:
    """The answer, without what ended or padded it; None where the query begins neither with the prompt nor with the end of one.

    special  the texts of special tokens, beside those that are common
    """
    token = "|".join([*map(re.escape, sorted(filter(None, special), key=len, reverse=True)), _SPECIAL])
    begun = len(prompt) if query.startswith(prompt) else _end_of(prompt, query, rf"{token}|[\s\ufffd]")
    if begun is None:  # a token that was cut is text
        begun = _end_of(prompt, query, r"[\s\ufffd]")
    if begun is None:
        return None
    answer = query[begun:]
    return re.sub(rf"\A(?:{token}|\s)+", "", _before(answer, re.compile(rf"(?:{token})\Z")))


def _end_of(prompt: str, query: str, unlike: str) -> int | None:
    """Where in a query the prompt, or what was left of it, ends; None where there is none. What matches `unlike` is not compared."""
    apart = re.compile(f"(?:{unlike})+")
    (sought, _), (found, ends) = _letters(prompt, apart), _letters(query, apart)
    length = _overlap(sought, found)
    if length < min(LEAST, len(sought)):
        return None
    return ends[length - 1] if length else 0


def _before(text: str, end: re.Pattern[str]) -> str:
    """A text without the blanks and the tokens at its end."""
    text = text.rstrip()
    while match := end.search(text, max(len(text) - 256, 0)):
        text = text[: match.start()].rstrip()
    return text


def _letters(text: str, unlike: re.Pattern[str]) -> tuple[str, list[int]]:
    """What of a text is compared, and where in it each letter of that ends."""
    letters: list[str] = []
    ends: list[int] = []
    start = 0
    for stop, resumed in [*(match.span() for match in unlike.finditer(text)), (len(text), len(text))]:
        for place in range(start, stop):
            plain = unicodedata.normalize("NFKD", text[place]).casefold()
            letters += plain
            ends += [place + 1] * len(plain)
        start = resumed
    return "".join(letters), ends


def _overlap(before: str, after: str) -> int:
    """How many letters `after` has of the end of `before` at its beginning, at most; in linear time (Knuth, Morris, Pratt)."""
    after = after[: len(before)]
    back, length = [0] * len(after), 0
    for place in range(1, len(after)):
        while length and after[place] != after[length]:
            length = back[length - 1]
        length += after[place] == after[length]
        back[place] = length
    length = 0
    for letter in before:
        while length and (length == len(after) or after[length] != letter):
            length = back[length - 1]
        if length < len(after) and after[length] == letter:
            length += 1
    return length
