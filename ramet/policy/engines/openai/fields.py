"""The fields of a request, under the names that the server knows; fields that it refuses are left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ramet.errors import PolicyError

LIMIT, NEW_LIMIT, OUTPUT_LIMIT = "max_tokens", "max_completion_tokens", "max_output_tokens"
_OURS = ("model", "messages", "prompt", "input", "tools", "n", LIMIT, NEW_LIMIT, OUTPUT_LIMIT)
NO_TOOLS = "does not accept tools: they are described in the prompt, and calls are read from the text"
_REFUSED = re.compile(
    r"unsupported|not supported|n.t support|unknown|unrecogni[sz]ed|unexpected|not permitted|extra_forbidden|extra inputs"
    r"|additional propert|not allowed|invalid parameter|unavailable|not available|deprecated|no such (field|parameter)",
    re.IGNORECASE,
)
_TOOLS = re.compile(r"\b(tool|function)(s\b|\b|[ _-]?(choice|call|use))", re.IGNORECASE)
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
_ROLES = re.compile(r"\broles? must alternate|only user and assistant|(invalid|unknown|unexpected|unsupported) role\b", re.IGNORECASE)
_SYSTEM = re.compile(r"system['\"`]? (role|message|prompt|instruction)|role['\"`:]* ['\"`]?system", re.IGNORECASE)


class Fields:
    """The fields of all requests to one server.

    names        the server's name of a field; an empty name leaves the field out
    extra        additional fields
    known        the fields that may be renamed
    fold_system  put the system message into the first user message

    A field that the server refuses by name is left out of later requests. The limit on tokens is renamed instead: without it
    no budget could be enforced.
    """

    def __init__(self, names: Mapping[str, str], extra: Mapping[str, Any], known: Collection[str]):
        if unknown := sorted(set(names) - set(known)):
            raise PolicyError(f"there is no field {unknown[0]!r} to rename; there are {', '.join(known)}")
        if not names.get(LIMIT, LIMIT):
            raise PolicyError(f"{LIMIT} can be renamed, to {NEW_LIMIT} for example, but not left out: nothing else enforces the budget")
        if ours := [name for name in extra if name in (*_OURS, names.get(LIMIT))]:
            raise PolicyError(f"{ours[0]} cannot be an additional field: it is set for each request")
        self.names, self.extra = dict(names), dict(extra)
        self.fold_system = False

    def has(self, field: str) -> bool:
        """Whether the field is sent at all."""
        return self.names.get(field, field) != ""

    def body(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON body of a request with these fields."""
        named = {self.names.get(field, field): value for field, value in fields.items()}
        body = {**{name: value for name, value in named.items() if name}, **self.extra}
        if not body.get("stream"):
            body.pop("stream_options", None)
        return body

    def adapt(self, text: str, param: Any, sent: Mapping[str, Any], optional: Collection[str]) -> str:
        """Leave out or rename the field that an error refuses; `text` is its message, `param` the field that it names, if it does.

        If the server refuses the value, not the field, the field is left out only if its value is neutral.
        Returns what was changed, as text for the user; empty if nothing could be.
        """
        names = {field: name for field in optional if (name := self.names.get(field, field)) in sent}
        if not _REFUSED.search(text):
            names = {field: name for field, name in names.items() if field in _NEUTRAL and sent[name] == _NEUTRAL[field]}
        places = {field: _place(name, text, param) for field, name in names.items()}
        refused = {field: place for field, place in places.items() if place is not None}
        if refused:
            field = min(refused, key=lambda name: refused[name])
            if field != LIMIT:
                self.names[field] = ""
                if field == "tools":
                    return NO_TOOLS
                return f"does not accept {field}: it is left out, and the server's own default applies"
            if self.names.get(LIMIT, LIMIT) == LIMIT:
                self.names[LIMIT] = NEW_LIMIT
                return f"does not accept {LIMIT}: {NEW_LIMIT} is sent instead"
        elif self.names.get("tools", "tools") in sent and (
            _TOOLS.search(text) or str(param).startswith("tool") or (_ROLES.search(text) and "tool" in _roles(sent))
        ):
            self.names["tools"] = ""
            return NO_TOOLS
        elif not self.fold_system and (
            (_REFUSED.search(text) and _SYSTEM.search(text)) or (_ROLES.search(text) and "system" in _roles(sent))
        ):
            self.fold_system = True
            return "does not accept system messages: they are put into the first user message"
        return ""


def _roles(sent: Mapping[str, Any]) -> set[str]:
    """The roles of the messages of a request."""
    return {str(message.get("role")) for message in sent.get("messages", ())}


def names_field(text: str, param: Any, sent: Mapping[str, Any]) -> bool:
    """Whether a refusal is about a field that was sent."""
    return any(_place(name, text, param) is not None for name in sent)


def _place(name: str, text: str, param: Any) -> int | None:
    """The position at which the text names a field; -1 if the error is about it, None if it is not named."""
    if name == param:
        return -1
    match = re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)
    return match.start() if match else None
