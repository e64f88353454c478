"""What servers say when they fail: read in any shape, masked, on one line, and told apart into what may pass and what will not."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC
from html.parser import HTMLParser
from typing import Any

from ramet.errors import PolicyError, RefusedRequest, TransientPolicyError
from ramet.policy.engines.openai.stream import Event

LONGEST_WAIT = 600.0
"""Seconds of a Retry-After that are waited for; what asks for more is not believed."""
_RUN = 8
"""Characters of a secret that may not be read, wherever in it they stand."""
_PASSING = (408, 409, 425, 429, 499)
_NOT_THE_PROMPT = (401, 403, 404, 429, 502, 503, 504)
"""Statuses that are about something else than a prompt that is too long, whatever the words."""
_LASTING = re.compile(
    r"invalid[ _](request|argument|api|key|param|value|model|token|prompt|input)|bad[ _]?request|unauthori[sz]ed|authenticat"
    r"|unauthenticated|permission|forbidden|not[ _]?found|does not exist|unsupported|not supported|unprocessable|incorrect api key"
    r"|insufficient_quota|billing|unknown (model|field|parameter)|validation",
    re.IGNORECASE,
)
_PASSES = re.compile(r"overload|server_error|internal|unavailable|rate.?limit|timed? ?out|too many requests|busy|try again", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context.{0,3}(length|window|size)|maximum context|max_model_len|too long|exceeds? the (maximum|available|model)"
    r"|too many (input )?tokens|longer than the|prompt is too|reduce the length|exceed_context",
    re.IGNORECASE,
)
_QUOTA = re.compile(r"insufficient_quota|billing", re.IGNORECASE)


class Masker:
    """Takes secrets out of text; long ones also where only a part of one stands."""

    def __init__(self, secrets: Iterable[str]):
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = _masked(text, secret)
        return text


def _masked(text: str, secret: str) -> str:
    run = len(secret) if len(secret) < _RUN else min(_RUN, max(len(secret) // 2, 4))
    runs = {secret[i : i + run] for i in range(len(secret) - run + 1)}
    kept: list[str] = []
    at = start = 0
    while at <= len(text) - run:
        if text[at : at + run] not in runs:
            at += 1
            continue
        end = at + run
        while end < len(text) and text[end - run + 1 : end + 1] in runs:
            end += 1
        kept += [text[start:at], "..."]
        at = start = end
    return "".join([*kept, text[start:]])


def one_line(text: str, most: int = 300) -> str:
    """What can be printed of a text, on one line, cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 2**16]).split())
    return line if len(line) <= most else line[:most] + "..."


class _Title(HTMLParser):
    """The title and the first heading of a page."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ""
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("title", "h1") and data.strip() and data.strip() not in self.found:
            self.found.append(data.strip())


def is_page(text: str) -> bool:
    """Is this a page for people?"""
    return text.lstrip()[:1] == "<"


def said_by(text: str) -> str:
    """What the body of an error says: the message of a JSON object of any shape, the title of a page, else its text."""
    if is_page(text):
        title = _Title()
        title.feed(text[: 2**16])
        return "a web page" + (f" ({'; '.join(title.found[:2])})" if title.found else "")
    try:
        return message_of(json.loads(text))
    except (ValueError, RecursionError):
        return text


def message_of(value: Any) -> str:
    """The words in an error, however they are packed."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list):
        return "; ".join(filter(None, map(message_of, value[:3])))
    if not isinstance(value, dict):
        return str(value)
    for name in ("error", "message", "detail", "msg", "error_message", "errors"):
        if value.get(name):
            words = message_of(value[name])
            where = value.get("loc")
            return f"{'.'.join(map(str, where))}: {words}" if isinstance(where, list) else words
    return json.dumps(value, default=str)


def error_in(event: Event) -> Any:
    """The error that an event tells of; None if it tells of none. `"error": null` and its like are none."""
    value = event.value
    if value is None:
        return event.text if event.kind == "error" else None
    error = value.get("error")
    if isinstance(error, dict) and not any(error.values()):
        error = None
    if error:
        return value
    if event.kind == "error" or value.get("object") == "error" or value.get("type") == "error":
        return value
    for choice in value["choices"] if isinstance(value.get("choices"), list) else ():
        if isinstance(choice, dict) and choice.get("error"):
            return choice
    packed = ("detail", "message", "msg", "errors", "error_message", "error_code")
    if "choices" not in value and "usage" not in value and any(value.get(name) for name in packed):
        return value
    return None


def status_of(value: Any) -> int | None:
    """The HTTP status that an error object carries as its code."""
    while isinstance(value, dict):
        for name in ("status_code", "code", "status", "http_status", "error_code"):
            code = value.get(name)
            if isinstance(code, (int, str)) and re.fullmatch(r"[45]\d\d", str(code)):
                return int(code)
        value = value.get("error")
    return None


def failure(
    where: str, text: str, value: Any, status: int | None, wait: float | None = None, mask: Masker | None = None, note: str = ""
) -> PolicyError:
    """The error to raise for what a server says.

    text    the raw text, `value` what it is as JSON, if it is; `status` of the reply, None inside a stream
    note    what else to say to the user
    """
    inner = status if status is not None else status_of(value)
    words = message_of(value) if value is not None else said_by(text)
    said = one_line(mask(words) if mask else words)
    answers = f"answers {status}" if status is not None else "reports an error in a stream"
    line = f"{where} {answers}{f': {said}' if said else ''}{note}"
    if inner not in _NOT_THE_PROMPT and _TOO_LONG.search(words):
        return RefusedRequest(line)
    return TransientPolicyError(line, wait) if passes(inner, text, words) else PolicyError(line)


def passes(status: int | None, text: str, words: str) -> bool:
    """May the same request be served later? Told by the status, else by the error's type, code and words."""
    if _QUOTA.search(text[: 2**16]):
        return False
    if status is not None:
        return status in _PASSING or (status >= 500 and status not in (501, 505))
    if found := re.search(r"\b(?:code|status)\W{0,4}([45]\d\d)\b", text[: 2**16], re.IGNORECASE) or re.match(r"\W*([45]\d\d)\b", words):
        return passes(int(found[1]), "", "")
    return bool(_PASSES.search(text[: 2**16])) or not _LASTING.search(text[: 2**16])


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date. None for what says nothing, or asks for too much."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) and seconds <= LONGEST_WAIT else None


def wait_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply's headers ask to wait."""
    try:
        return retry_after(str(float(headers["retry-after-ms"]) / 1000))
    except (KeyError, ValueError):
        return retry_after(headers.get("retry-after"))
