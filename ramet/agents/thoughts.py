"""The text and calls of a turn, without what its model only thought and what it only quotes.

Models mark their thoughts in many ways (`MARKS`). There is no setting for it: all of them are recognised. A thought may have been
opened by the prompt, so that the turn contains only its end, and one that is never closed lasts to the end of the turn. A call inside
a thought, a code block or backticks is not a call.
"""

from __future__ import annotations

import re
from bisect import bisect_right

_TAGS = "think|thinking|thought|thoughts|reasoning|seed:think|scratchpad|inner_monologue"
MARKS = (
    (rf"<(?P<tag>{_TAGS})(?:\s[^<>\n]{{0,80}})?>", rf"</(?:{_TAGS})\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|think\|>", r"<\|/think\|>"),
    (r"<unused94>thought", r"<unused95>"),
    (r"<\|channel>thought", r"<channel\|>"),
    (r"Here(?:'s| is) my thought process:", r"Here(?:'s| is) my response:"),
)
"""Patterns for the beginning and end of thoughts: Qwen, DeepSeek, Seed and others; Mistral; Kimi; Command; Sky; ...; Gemma; Granite."""
_OPENINGS = re.compile(
    "(?P<line>^[ \\t]{0,20})?(?:" + "|".join(f"(?P<o{i}>{opening})" for i, (opening, _) in enumerate(MARKS)) + ")",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSINGS = re.compile("|".join(f"(?P<c{i}>{closing})" for i, (_, closing) in enumerate(MARKS)), re.IGNORECASE)
_HINTS = ("<", "[", "◁")
"""One of them is in every mark, but for Granite's, which begin with "here"."""
_MESSAGE = re.compile(r"<\|channel\|>(?P<channel>[^<]{0,200})(?:<\|constrain\|>[^<]{0,80})?<\|message\|>")
_MESSAGE_ENDS = re.compile(r"<\|(?:end|return|call|start)\|>|<\|channel\|>")
_FENCE = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})", re.MULTILINE)
_QUOTED = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})|(?<!`)(?P<ticks>`{1,2})(?!`)", re.MULTILINE)


def without_thoughts(text: str) -> str:
    """The text of a turn without its thoughts, whether they are closed or not."""
    if not text.startswith("analysis") and not any(hint in text for hint in _HINTS) and "here" not in text.lower():
        return text  # most answers: searching them for all marks would cost more than the rest of the turn
    text = _without_analysis(text)
    closings = [(closing.lastgroup, closing.start(), closing.end()) for closing in _CLOSINGS.finditer(text)]
    last = {group: start for group, start, _ in closings}
    fences = _fences(text)
    waiting = iter(closings)
    parts: list[str] = []
    at = 0
    for opening in _OPENINGS.finditer(text):
        if opening.start() < at:
            continue
        group = f"c{next(i for i in range(len(MARKS)) if opening[f'o{i}'] is not None)}"
        if last.get(group, -1) >= opening.end():
            parts.append(text[at : opening.start()])
            at = next(end for name, start, end in waiting if name == group and start >= opening.end())
        elif opening["line"] is not None and not _inside(fences, opening.start()):
            return _after_end("".join([*parts, text[at : opening.start()]]))
    return _after_end("".join([*parts, text[at:]]))


def _after_end(text: str) -> str:
    """The text after the end of a thought that the prompt had opened. An end that no text follows does not count."""
    length = len(text.rstrip())
    ends = [closing.end() for closing in _CLOSINGS.finditer(text) if closing.end() < length]
    return _CLOSINGS.sub("", text[ends[-1] :] if ends else text)


def _without_analysis(text: str) -> str:
    """A turn without what it writes to the analysis channel (Harmony format); a turn without channels is unchanged."""
    if text.startswith("analysis") and "assistantfinal" in text:  # the markers themselves were stripped
        return text.rpartition("assistantfinal")[2]
    messages = list(_MESSAGE.finditer(text))
    if not messages:
        return text
    parts = [text[: messages[0].start()]]
    for message in messages:
        if not message["channel"].strip().lower().startswith("analysis"):
            end = _MESSAGE_ENDS.search(text, message.end())
            parts.append(text[message.end() : end.start() if end else None])
    return "".join(parts)


def _fences(text: str) -> list[tuple[int, int]]:
    """The closed code blocks of a text, as (start, end)."""
    blocks = []
    at = 0
    while (fence := _FENCE.search(text, at)) is not None:
        end = _fence_end(text, fence)
        if end is None:
            break
        blocks.append((fence.start(), end))
        at = end
    return blocks


def _inside(spans: list[tuple[int, int]], place: int) -> bool:
    """Whether a position is inside one of these spans, which are in order."""
    at = bisect_right(spans, (place, place)) - 1
    return at >= 0 and place < spans[at][1]


def _fence_end(text: str, fence: re.Match[str]) -> int | None:
    """Where the code block that `fence` opens ends; None if it is not closed."""
    mark = fence["fence"]
    closed = re.compile(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE).search(text, fence.end())
    return None if closed is None else closed.end()


def split_calls(text: str, opening: str, closing: str) -> tuple[str, list[str], bool]:
    """Split a turn's text at its calls: (the text without them, the calls, whether the last call is unclosed).

    If `closing` is empty, the first call takes the rest of the text.
    """
    pattern = re.compile(f"{_QUOTED.pattern}|(?P<call>{re.escape(opening)})", _QUOTED.flags)
    last = text.rfind(closing)
    visible: list[str] = []
    calls: list[str] = []
    start = at = 0
    while (match := pattern.search(text, at)) is not None:
        if match["call"] is not None:
            visible.append(text[start : match.start()])
            if not closing:
                return "".join(visible), [text[match.end() :].strip()], False
            end = text.find(closing, match.end()) if last >= match.end() else -1
            if end < 0:
                return "".join(visible), calls, True
            calls.append(text[match.end() : end].strip())
            start = at = end + len(closing)
        else:
            at = _quote_end(text, match)
    return "".join([*visible, text[start:]]), calls, False


def _quote_end(text: str, match: re.Match[str]) -> int:
    """Where the quotation that `match` opens ends; the end of `match` if it opens none."""
    if match["fence"] is not None:
        end = _fence_end(text, match)
        return len(text) if end is None else end
    line = text.find("\n", match.end())
    closed = re.compile(rf"(?<!`){match['ticks']}(?!`)").search(text, match.end(), len(text) if line < 0 else line)
    return match.end() if closed is None else closed.end()
