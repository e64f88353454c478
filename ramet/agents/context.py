"""Documents by key.

A spawn call names keys; the clone gets the texts. Documents are always laid out in the order of the
store, whatever order the call named them in, and before the objective, so that sibling clones with
the same documents share a prompt prefix that the backend computes once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from ramet.agents.tree import Segment
from ramet.errors import TaskError


class ContextStore:
    """The documents of one task. Keys match exactly, else ignoring case and surrounding space."""

    def __init__(self, documents: Mapping[str, str | Segment]):
        self._documents = dict(documents)
        self._order = {key: position for position, key in enumerate(self._documents)}
        self._folded: dict[str, str] = {}
        for key in self._documents:
            if self._folded.setdefault(key.strip().casefold(), key) != key:
                raise TaskError(f"document keys {self._folded[key.strip().casefold()]!r} and {key!r} differ only in case")

    def __len__(self) -> int:
        return len(self._documents)

    def resolve(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """Known keys in canonical order without repeats, and the unknown ones as they were given."""
        known: set[str] = set()
        unknown: list[str] = []
        for key in keys:
            match = key if key in self._documents else self._folded.get(key.strip().casefold())
            if match is not None:
                known.add(match)
            elif key not in unknown:
                unknown.append(key)
        return sorted(known, key=self._order.__getitem__), unknown

    def render(self, keys: Iterable[str]) -> str:
        """One `key: text` entry a line, in canonical order; videos by number, as `media` has them. Unknown keys are an error here."""
        known, unknown = self.resolve(keys)
        if unknown:
            raise KeyError(f"unknown context keys: {', '.join(unknown)}")
        numbers = itertools.count(1)
        found = ((key, self._documents[key]) for key in known)
        return "\n".join(f"{key}: {f'video {next(numbers)}' if isinstance(d, Segment) else d}" for key, d in found)

    def media(self, keys: Iterable[str]) -> tuple[Segment, ...]:
        """The videos among the documents of these keys, in canonical order."""
        return tuple(d for key in self.resolve(keys)[0] if isinstance(d := self._documents[key], Segment))


def clone_prompt(store: ContextStore, objective: str, keys: Iterable[str]) -> str:
    """What a clone reads: its documents, then its objective, then a note on keys that do not exist."""
    known, unknown = store.resolve(keys)
    parts = [store.render(known)] if known else []
    parts.append(objective)
    if unknown:
        parts.append(f"(unknown context keys: {', '.join(unknown)})")
    return "\n".join(parts)
