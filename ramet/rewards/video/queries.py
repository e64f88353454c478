"""Extracting the answer from a query: trainers such as OpenRLHF send a prompt and its answer as one text, decoded from tokens.

Decoded text rarely begins with the prompt exactly as it was encoded: it may be padded, normalised (Unicode, whitespace, case) or
truncated on the left, and it contains special tokens as text. Prompt and query are therefore compared without whitespace, special tokens
and replacement characters, and without regard to case and Unicode form.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MIN_OVERLAP = 8
"""Characters of a truncated prompt that a query must begin with; fewer may agree by chance."""
_SPECIAL = r"<\|[\w-]{1,40}\|>|</?s>|<(?:pad|eos|bos|unk|end_of_turn|start_of_turn)>"


def answer_of(query: str, prompt: str, special: Sequence[str] = ()) -> str | None:
    """The answer in a query, without surrounding whitespace and special tokens; None if the query does not begin with the prompt's end.

    prompt   the text that was encoded, of which the query may contain only the last part
    special  special tokens as text, in addition to the common ones
    """
    token = "|".join([*map(re.escape, sorted(filter(None, special), key=len, reverse=True)), _SPECIAL])
    start = len(prompt) if query.startswith(prompt) else _end_of(prompt, query, rf"{token}|[\s\ufffd]")
    if start is None:  # truncation may have left part of a special token, which is then ordinary text
        start = _end_of(prompt, query, r"[\s\ufffd]")
    if start is None:
        return None
    answer = query[start:]
    return re.sub(rf"\A(?:{token}|\s)+", "", _before(answer, re.compile(rf"(?:{token})\Z")))


def _end_of(prompt: str, query: str, ignored: str) -> int | None:
    """The index in a query at which the prompt, or its last part, ends; None if neither is there. Matches of `ignored` are not compared."""
    pattern = re.compile(f"(?:{ignored})+")
    (prompt_letters, _), (query_letters, ends) = _letters(prompt, pattern), _letters(query, pattern)
    length = _overlap(prompt_letters, query_letters)
    if length < min(MIN_OVERLAP, len(prompt_letters)):
        return None
    return ends[length - 1] if length else 0


def _before(text: str, end: re.Pattern[str]) -> str:
    """A text without the whitespace and the matches of `end` at its end."""
    text = text.rstrip()
    while match := end.search(text, max(len(text) - 256, 0)):
        text = text[: match.start()].rstrip()
    return text


def _letters(text: str, ignored: re.Pattern[str]) -> tuple[str, list[int]]:
    """The characters of a text that are compared, normalised, and the index in the text at which each of them ends."""
    letters: list[str] = []
    ends: list[int] = []
    start = 0
    for stop, resumed in [*(match.span() for match in ignored.finditer(text)), (len(text), len(text))]:
        for place in range(start, stop):
            plain = unicodedata.normalize("NFKD", text[place]).casefold()
            letters += plain
            ends += [place + 1] * len(plain)
        start = resumed
    return "".join(letters), ends


def _overlap(before: str, after: str) -> int:
    """The length of the longest prefix of `after` that is a suffix of `before`, in linear time (Knuth, Morris and Pratt 1977)."""
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
