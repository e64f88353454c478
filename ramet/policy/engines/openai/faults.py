"""Errors of servers: found in any shape, masked, put on one line, and classified as transient or final."""

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
from ramet.policy.engines.openai.stream import ServerSentEvent

LONGEST_WAIT = 600.0
"""The longest Retry-After, in seconds, that is respected; a longer one is ignored."""
_RUN = 8
"""The number of consecutive characters of a secret that must not be shown, wherever in the secret they are."""
_TRANSIENT_STATUSES = (408, 409, 425, 429, 499)
_NOT_THE_PROMPT = (401, 403, 404, 429, 502, 503, 504)
"""Statuses that never mean that the prompt is too long, whatever the message says."""
_FINAL = re.compile(
    r"invalid[ _](request|argument|api|key|param|value|model|token|prompt|input)|bad[ _]?request|unauthori[sz]ed|authenticat"
    r"|unauthenticated|permission|forbidden|not[ _]?found|does not exist|unsupported|not supported|unprocessable|incorrect api key"
    r"|insufficient_quota|billing|unknown (model|field|parameter)|validation",
    re.IGNORECASE,
)
_TRANSIENT = re.compile(
    r"overload|server_error|internal|unavailable|rate.?limit|timed? ?out|too many requests|busy|try again", re.IGNORECASE
)
_TOO_LONG = re.compile(
    r"context.{0,3}(length|window|size)|maximum context|max_model_len|too long|exceeds? the (maximum|available|model)"
    r"|too many (input )?tokens|longer than the|prompt is too|reduce the length|exceed_context",
    re.IGNORECASE,
)
_QUOTA = re.compile(r"insufficient_quota|billing", re.IGNORECASE)


class Masker:
    """Replaces secrets in a text by "...", also parts of long secrets."""

    def __init__(self, secrets: Iterable[str]):
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text with its secrets replaced."""
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


def one_line(text: str, limit: int = 300) -> str:
    """The printable characters of a text, on one line of at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 2**16]).split())
    return line if len(line) <= limit else line[:limit] + "..."


class _Title(HTMLParser):
    """Collects the title and the top headings of a page."""

    def __init__(self) -> None:
        super().__init__()
        self._open = ""
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Note which element is open."""
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        """Note that no element of interest is open."""
        self._open = ""

    def handle_data(self, data: str) -> None:
        """Keep the text of a title or heading."""
        if self._open in ("title", "h1") and data.strip() and data.strip() not in self.titles:
            self.titles.append(data.strip())


def is_page(text: str) -> bool:
    """Whether the text is an HTML page."""
    return text.lstrip()[:1] == "<"


def error_text(text: str) -> str:
    """The message in the body of an error: that of a JSON object of any shape, the title of an HTML page, or else the text."""
    if is_page(text):
        title = _Title()
        title.feed(text[: 2**16])
        return "a web page" + (f" ({'; '.join(title.titles[:2])})" if title.titles else "")
    try:
        return error_message(json.loads(text))
    except (ValueError, RecursionError):
        return text


def error_message(value: Any) -> str:
    """The message in a JSON error of any shape."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list):
        return "; ".join(filter(None, map(error_message, value[:3])))
    if not isinstance(value, dict):
        return str(value)
    for name in ("error", "message", "detail", "msg", "error_message", "errors"):
        if value.get(name):
            words = error_message(value[name])
            where = value.get("loc")
            return f"{'.'.join(map(str, where))}: {words}" if isinstance(where, list) else words
    return json.dumps(value, default=str)


def error_in(event: ServerSentEvent) -> Any:
    """The error that an event reports; None if it reports none. `"error": null` and empty objects are no error."""
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
    response = value.get("response")
    if isinstance(response, dict) and response.get("error"):
        return response
    for choice in value["choices"] if isinstance(value.get("choices"), list) else ():
        if isinstance(choice, dict) and choice.get("error"):
            return choice
    names = ("detail", "message", "msg", "errors", "error_message", "error_code")
    if "choices" not in value and "usage" not in value and any(value.get(name) for name in names):
        return value
    return None


def status_of(value: Any) -> int | None:
    """The HTTP status that an error object has as its code; None if it has none."""
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
    """The exception to raise for an error of the server at `where`.

    text    the raw text
    value   the text as JSON, None if it is not JSON
    status  the HTTP status of the reply, None for an error inside a stream
    wait    seconds that the server asks to wait before a retry
    note    appended to the message
    """
    code = status if status is not None else status_of(value)
    words = error_message(value) if value is not None else error_text(text)
    message = one_line(mask(words) if mask else words)
    answers = f"answers {status}" if status is not None else "reports an error in a stream"
    line = f"{where} {answers}{f': {message}' if message else ''}{note}"
    if code not in _NOT_THE_PROMPT and _TOO_LONG.search(words):
        return RefusedRequest(line)
    return TransientPolicyError(line, wait) if is_transient(code, text, words) else PolicyError(line)


def is_transient(status: int | None, text: str, words: str) -> bool:
    """Whether a retry of the same request may succeed: judged by the status, else by the type, code and message of the error."""
    if _QUOTA.search(text[: 2**16]):
        return False
    if status is not None:
        return status in _TRANSIENT_STATUSES or (status >= 500 and status not in (501, 505))
    if match := re.search(r"\b(?:code|status)\W{0,4}([45]\d\d)\b", text[: 2**16], re.IGNORECASE) or re.match(r"\W*([45]\d\d)\b", words):
        return is_transient(int(match[1]), "", "")
    return bool(_TRANSIENT.search(text[: 2**16])) or not _FINAL.search(text[: 2**16])


def retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header, given as a number or a date. None if it is missing, invalid or above `LONGEST_WAIT`."""
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
    """The seconds that the headers of a reply ask to wait; None if they do not."""
    try:
        return retry_after(str(float(headers["retry-after-ms"]) / 1000))
    except (KeyError, ValueError):
        return retry_after(headers.get("retry-after"))
