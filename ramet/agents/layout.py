"""Untrusted text on a page of its own lines: it acts on no terminal and passes for nothing but itself."""

from __future__ import annotations

import re

_ACTING = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f"  # control characters: escape sequences, backspaces, line ends
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # what is unseen, or turns the direction of what stands beside it
    "\ud800-\udfff\U000e0000-\U000e007f]"  # halves of characters, which no stream takes; unseen tags
)
_MARGIN = 9
_SHORT = 80


def inert(text: str) -> str:
    """One line in which characters that act, or cannot be seen, are spelled as escapes, such as \\x1b."""
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def short(text: str) -> str:
    """A text in quotes, cut after `_SHORT` characters, as a one-line description states it."""
    return repr(text if len(text) <= _SHORT else text[:_SHORT] + "...")


def lines_of(label: str, text: str) -> list[str]:
    """`text` line by line behind a margin, the first line with its label. No line of it can look like a heading."""
    lines = [inert(line) for line in re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)] or [""]
    return [f"{label if number == 0 else '':>{_MARGIN}} | {line}" for number, line in enumerate(lines)]
