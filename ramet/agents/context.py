"""The documents of a task, which clones are given by key.

A spawn call names keys, and the clone's prompt contains the documents. They always come in the order of the store, whatever order
the call names them in, and before the objective, so that sibling clones with the same documents share a prompt prefix that the
backend computes once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from ramet.agents.tree import Segment
from ramet.errors import TaskError


class ContextStore:
    """The documents of one task. A key matches exactly, or else ignoring case and surrounding space.

    Raises `TaskError` if two keys differ only in that.
    """

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
        """The known keys in the order of the store without repeats, and the unknown ones as they were given."""
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
        """One `key: text` entry per document in the order of the store; videos are numbered as `media` lists them.

        Raises `KeyError` for an unknown key.
        """
        known, unknown = self.resolve(keys)
        if unknown:
            raise KeyError(f"unknown context keys: {', '.join(unknown)}")
        numbers = itertools.count(1)
        documents = ((key, self._documents[key]) for key in known)
        return "\n".join(f"{key}: {f'video {next(numbers)}' if isinstance(d, Segment) else d}" for key, d in documents)

    def media(self, keys: Iterable[str]) -> tuple[Segment, ...]:
        """The videos among the documents of these keys, in the order of the store."""
        return tuple(d for key in self.resolve(keys)[0] if isinstance(d := self._documents[key], Segment))


def clone_prompt(store: ContextStore, objective: str, keys: Iterable[str]) -> str:
    """The text of a clone's prompt: its documents, then its objective, then a note on keys that do not exist."""
    known, unknown = store.resolve(keys)
    parts = [store.render(known)] if known else []
    parts.append(objective)
    if unknown:
        parts.append(f"(unknown context keys: {', '.join(unknown)})")
    return "\n".join(parts)
