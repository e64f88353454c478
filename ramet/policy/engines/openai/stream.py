"""Parsing server-sent events (WHATWG HTML standard, section 9.2), and what servers send instead.

Beyond the standard: data that is a complete JSON object, or `[DONE]`, is an event at once, since some servers omit the blank line
after it; a JSON object on a line of its own is an event; `error: ...` is an event of kind error; a body that is not a
stream is one event of kind body; a last line without a newline counts.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

from ramet.errors import EventTooLong

MAX_CHARACTERS = 2**22
"""The longest event, or body that is not a stream, that is read."""
_BREAK = re.compile("\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event of a stream.

    text   its data
    kind   "message" or the value of its `event:` field; "error"; "body"
    value  the data as a JSON object, None if it is not one
    """

    text: str
    kind: str = "message"
    value: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        """Whether this is the event `[DONE]`, which ends a stream."""
        return self.text.strip().strip('"').upper() == "[DONE]"


class EventReader:
    """Turns the bytes of a body into events: feed it each block, and close it at the end. Comments give no event."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._line: list[str] = []
        self._data: list[str] = []
        self._body: list[str] = []
        self._length = 0
        """Characters held of an incomplete line, event or body."""
        self._kind = "message"
        self._after_return = False
        self._begun = False

    def feed(self, block: bytes) -> list[ServerSentEvent]:
        """The events that this block completes. Raises `EventTooLong`."""
        return self._read(self._decoder.decode(block))

    def close(self) -> list[ServerSentEvent]:
        """The events that are complete with the end of the body."""
        events = self._read(self._decoder.decode(b"", True) + "\n")
        if self._body:
            return [*events, _event("\n".join(self._body), "body")]
        return events + self._dispatch()

    def _read(self, text: str) -> list[ServerSentEvent]:
        if self._after_return and text:
            text = text.removeprefix("\n")
            self._after_return = False
        self._after_return = self._after_return or text.endswith("\r")
        first, *rest = _BREAK.split(text)
        self._hold(self._line, first)
        events: list[ServerSentEvent] = []
        for following in rest:
            line = "".join(self._line)
            self._length -= len(line) + len(self._line)
            self._line = []
            events += self._take(line)
            self._hold(self._line, following)
        return events

    def _hold(self, where: list[str], text: str) -> None:
        where.append(text)
        self._length += len(text) + 1
        if self._length > MAX_CHARACTERS:
            raise EventTooLong(f"an event of more than {MAX_CHARACTERS} characters")

    def _take(self, line: str) -> list[ServerSentEvent]:
        if self._body:
            self._hold(self._body, line)
            return []
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            if not self._data and (event := _event(value, self._kind)) and (event.value is not None or event.done):
                self._begun = True
                return [event]
            self._hold(self._data, value)
        elif field == "event":
            self._kind = value
        elif field == "error":
            self._begun = True
            return [_event(value, "error")]
        elif field not in ("", "id", "retry"):
            event = _event(line, "message")
            if event.value is not None:
                self._begun = True
                return [event]
            if not self._begun and not self._data and line.strip():
                self._hold(self._body, line)
        return []

    def _dispatch(self) -> list[ServerSentEvent]:
        lines, kind = self._data, self._kind
        self._data, self._kind = [], "message"
        self._length -= sum(map(len, lines)) + len(lines)
        text = "\n".join(lines)
        if not text.strip():
            return []
        self._begun = True
        return [_event(text, kind)]


def _event(text: str, kind: str) -> ServerSentEvent:
    value = None
    if text.lstrip()[:1] == "{":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
    return ServerSentEvent(text, kind, value if isinstance(value, dict) else None)
