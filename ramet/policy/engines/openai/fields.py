"""Which fields of a request a server is sent, and under which names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ramet.errors import PolicyError

LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"
_REFUSED = re.compile(
    r"unsupported|not supported|n.t support|unknown|unrecogni[sz]ed|unexpected|not permitted|extra_forbidden|extra inputs"
    r"|additional propert|not allowed|invalid parameter|unavailable|not available|deprecated|no such (field|parameter)",
    re.IGNORECASE,
)
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
_SYSTEM = re.compile(r"system['\"`]? (role|message|prompt|instruction)|role['\"`:]* ['\"`]?system", re.IGNORECASE)


class Fields:
    """names  the server's name of a field; an empty one leaves it out
    extra   what is sent besides
    known   the fields that can be called otherwise

    A field that the server refuses by name is left out from then on, but for the limit on tokens, which is renamed: without it
    no budget would hold.
    """

    def __init__(self, names: Mapping[str, str], extra: Mapping[str, Any], known: Collection[str]):
        if unknown := sorted(set(names) - set(known)):
            raise PolicyError(f"no field {unknown[0]!r} is sent that could be called otherwise; there are {', '.join(known)}")
        if not names.get(LIMIT, LIMIT):
            raise PolicyError(f"{LIMIT} can be renamed, to {NEW_LIMIT} for example, but not left out: nothing else holds the budget")
        self.names, self.extra = dict(names), dict(extra)
        self.fold_system = False

    def body(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request that asks for `asked`."""
        named = {self.names.get(field, field): value for field, value in asked.items()}
        return {**{name: value for name, value in named.items() if name}, **self.extra}

    def adapt(self, said: str, param: Any, sent: Mapping[str, Any], optional: Collection[str]) -> str:
        """Change what is refused in `said`, the text of an error; `param` is the name that the error gives, if it does.

        Of a value that the server does not take, only one that changes nothing is left out.
        What has been changed, for people; empty if nothing could be.
        """
        names = {field: name for field in optional if (name := self.names.get(field, field)) in sent}
        if not _REFUSED.search(said):
            names = {field: name for field, name in names.items() if field in _NEUTRAL and sent[name] == _NEUTRAL[field]}
        places = {field: _place(name, said, param) for field, name in names.items()}
        found = {field: place for field, place in places.items() if place is not None}
        if found:
            field = min(found, key=lambda name: found[name])
            if field != LIMIT:
                self.names[field] = ""
                if field == "stream":
                    self.names["stream_options"] = ""
                return f"does not take {field}: it is left out, and the server's own default holds"
            if self.names.get(LIMIT, LIMIT) == LIMIT:
                self.names[LIMIT] = NEW_LIMIT
                return f"does not take {LIMIT}: it is called {NEW_LIMIT}"
        elif _REFUSED.search(said) and _SYSTEM.search(said) and not self.fold_system:
            self.fold_system = True
            return "does not take system messages: they stand in the first message of the user"
        return ""


def names_field(said: str, param: Any, sent: Mapping[str, Any]) -> bool:
    """Is a refusal about a field of what was sent?"""
    return any(_place(name, said, param) is not None for name in sent)


def _place(name: str, said: str, param: Any) -> int | None:
    """Where the text names a field; before everything if the error is about it."""
    if name == param:
        return -1
    found = re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said)
    return found.start() if found else None
