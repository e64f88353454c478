r"""The answer that a turn states, found by where a model marks its answer and how it formats it.

Thoughts are ignored, closed or not. Of the rest, the first of these that yields a value counts:

1. the last `Answer: ...` at the beginning of a line, or `<answer>...</answer>`, also spelled `<final_answer>`, `[ANSWER]` and `答案:`.
   Emphasis, heading signs and quotes around it, `The` and `Final` in front of it and a full-width colon make no difference. The value may
   follow on the next lines: bare, in display maths, in a code block, in tags. A value that only points elsewhere (`Answer: see above`)
   is passed over if the turn has a box;
2. the last box, such as `\boxed{72}`;
3. in a finished turn, the display maths or code block at its end, or else its last non-empty line, without heading signs (`#### 72`)
   and without an `A:` that replies to a `Q:`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ramet.agents.thoughts import without_thoughts

MAX_CHARACTERS = 65_536
"""Characters after a marker that are searched for the answer."""
MAX_MARKERS = 8
"""Markers, counted from the end, after which JSON is looked for."""
_JSON_OPENING = re.compile(r"[\s*`]*(?:json\s*)?[{\[]")
_DECODER = json.JSONDecoder()
_LOOSE = r"(?:[ \t*_]|`(?!``))*"
_MARKER = re.compile(
    rf"^[ \t>#*_`]*(?:the[ \t]+)?(?:final[ \t]+)?answer(?:[ \t]+is)?{_LOOSE}(?:(?P<colon>[:\uff1a]){_LOOSE}|$)"
    rf"|^[ \t>#*_`]*(?:最终|最後)?答案(?:是|为|為)?{_LOOSE}(?P<han>[:\uff1a]){_LOOSE}|(?P<tag><(?:final_)?answer>|\[answer\])",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSING_TAG = re.compile(r"</(?:final_)?answer>|\[/answer\]", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b,?[ \t]*)?the[ \t]+(?:(?:final|correct|right)[ \t]+)?answer[ \t]+is[ \t]+(?=\S)", re.IGNORECASE
)
_ELSEWHERE = re.compile(r"[^\d\\$]{0,60}\b(?:above|boxed|earlier|previously|box)\b[^\d\\$]{0,60}", re.IGNORECASE)
_QUESTION = re.compile(r"^[ \t*]*Q[* \t]*[:\uff1a]", re.MULTILINE)
_REPLY = re.compile(r"^\**A\**[:\uff1a]\**[ \t]*(?=\S)")
_BLOCKS = (("```", "```"), ("\\[", "\\]"), ("$$", "$$"))
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)[ \t]*)?\{|\}")
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])[ \t]*"
    r"([-+]?\d[\d.,/]*|[a-zA-Z](?=[.,;]?(?:\s*\Z|\s*\$))|\\(?!boxed|fbox|framebox)[a-zA-Z]+[^\s$]*)"
)
_BETWEEN = re.compile(r"(?:[\s,;$]|\\[()\[\]]|\\[,;]|\\q?quad|\\text\{\s*(?:and|or),?\s*\}|and|or){1,60}")
_EMPHASIS = " \t\r\n*_`"
_WRAPPINGS = "\\`$*_<[{(\"'"
"""What an answer may begin with whose value is read from inside."""


def extract_answer(text: str, finished: bool = True) -> str | None:
    """The answer that one turn states, as a substring of `text`; None if it states none.

    `finished`: the model ended the turn itself, so that its last line may be the answer.
    """
    text = without_thoughts(text)
    boxed = (last_boxed(text) or "").strip() or None
    for mark in reversed([*_MARKER.finditer(text)]):
        after = text[mark.end() : mark.end() + MAX_CHARACTERS]
        value = _CLOSING_TAG.split(after, maxsplit=1)[0].strip() if mark["tag"] else _value(after)
        if value and not (boxed and _ELSEWHERE.fullmatch(value)):
            return value
        if boxed is None and (mark["colon"] or mark["han"]):
            return None
    return boxed or (_ending(text) if finished else None)


def answer_so_far(text: str) -> str:
    """What of its answer a turn has stated that is still being written, as far as more text cannot change its beginning; else "".

    It is that of the last marker at the beginning of a line, if plain words follow on the same line.
    """
    text = without_thoughts(text)
    marks = [*_MARKER.finditer(text)]
    if not marks:
        return ""
    line, newline, _ = text[marks[-1].end() :].partition("\n")
    line = line.lstrip()
    if not line or line[0] in _WRAPPINGS or "\\" in line:
        return ""
    return line.rstrip(_EMPHASIS) if newline else line.rstrip(_EMPHASIS + ".")


def json_values(text: str) -> Iterator[str]:
    """The JSON objects and arrays that may be the answer, on any number of lines: after each marker, the last first, or the whole text."""
    text = without_thoughts(text)
    starts = [*(mark.end() for mark in reversed([*_MARKER.finditer(text)][-MAX_MARKERS:])), 0]
    for start in starts:
        opening = _JSON_OPENING.match(text, start)
        if opening is not None:
            try:
                yield text[opening.end() - 1 : _DECODER.raw_decode(text, opening.end() - 1)[1]]
            except (ValueError, RecursionError):
                continue


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` or `\fbox{...}` of a text, braces balanced, or what follows a bare `\boxed `.

    If several stand in a row (`\boxed{1} and \boxed{2}`), the whole row. None if there is no box.
    """
    if "\\" not in text:
        return None
    boxes = _boxes(text)
    last = len(boxes) - 1
    while last > 0 and _BETWEEN.fullmatch(text, boxes[last - 1].end, boxes[last].start):
        last -= 1
    if not boxes:
        return None
    return boxes[-1].inside if last == len(boxes) - 1 else text[boxes[last].start : boxes[-1].end]


def unboxed(text: str) -> str:
    r"""The contents of a text's last boxes: `1, 2` for `\boxed{1} and \boxed{2}`. A text without a box is returned unchanged."""
    boxed = last_boxed(text)
    if boxed is None:
        return text
    return ", ".join(box.inside for box in _boxes(boxed)) or boxed


@dataclass(frozen=True, slots=True)
class _Box:
    start: int
    end: int
    inside: str


def _boxes(text: str) -> list[_Box]:
    """All closed boxes in order, except those that contain another box."""
    opened: list[re.Match[str]] = []
    boxes: list[_Box] = []
    for match in _BRACE.finditer(text):
        if match.group() != "}":
            opened.append(match)
        elif opened:
            start = opened.pop()
            if start["box"]:
                boxes.append(_Box(start.start(), match.end(), text[start.end() : match.start()]))
    boxes += [
        _Box(match.start(), match.start(1) + len(value), value) for match in _BARE_BOX.finditer(text) if (value := match[1].rstrip(".,;"))
    ]
    inner: list[_Box] = []
    for box in sorted(boxes, key=lambda box: box.start):
        if inner and box.start < inner[-1].end:
            inner.pop()
        inner.append(box)
    return inner


def _value(after: str) -> str:
    """The value after a marker: the rest of its line or, if that is empty, what follows."""
    after = after.lstrip()
    for opening, closing in _BLOCKS:
        if after.startswith(opening):
            return _unwrapped(_without_language(_within(after, len(opening), closing)) if opening == "```" else _within(after, 2, closing))
    line = after.partition("\n")[0]
    box = next((match for match in _BRACE.finditer(line) if match["box"]), None)
    if box is not None and last_boxed(line) is None:  # closed on a later line, or never
        return _balanced(after, box.end()) or line[box.end() :].strip(_EMPHASIS)
    return _unwrapped(line)


def _within(text: str, start: int, closing: str) -> str:
    """The text from `start` to `closing`, or to the end if it is never closed."""
    end = text.find(closing, start)
    return text[start : end if end >= 0 else None].strip()


def _without_language(block: str) -> str:
    """The lines of a code block, without the language name in front of them."""
    first, newline, rest = block.partition("\n")
    return rest.strip() if newline and re.fullmatch(r"[a-zA-Z]+", first.strip()) else block


def _balanced(text: str, start: int) -> str:
    """The text from `start`, just inside a brace, to the brace that closes it; empty if none does."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[start : match.start()].strip()
    return ""


def _unwrapped(value: str) -> str:
    """A value without its box, or else without the emphasis around it."""
    boxed = last_boxed(value)
    return value.strip(_EMPHASIS) if boxed is None else boxed.strip()


def _ending(text: str) -> str | None:
    """The answer at the end of a finished text that has neither marker nor box."""
    text = text.strip()
    for opening, closing in _BLOCKS:
        start = text.rfind(opening, 0, len(text) - len(closing))
        if text.endswith(closing) and start >= 0 and "\n" in text[start:]:
            block = text[start + len(opening) : -len(closing)].strip()
            return (_without_language(block) if opening == "```" else block) or None
    line = re.sub(r"^#+[ \t]+", "", text.rpartition("\n")[2].strip())  # `#### 72`, as solutions in GSM8K end
    if _QUESTION.search(text):
        line = _REPLY.sub("", line)  # without a `Q:`, the letter may name a choice
    sentence = _SENTENCE.match(line)
    value = line[sentence.end() :] if sentence else line
    box = next((match for match in _BRACE.finditer(value) if match["box"]), None)
    return (value if box is None else value[box.end() :].strip()) or None
