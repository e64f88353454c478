"""The documents of a task, which clones are given by key.

A call names keys, ranges of keys (`A-I`) or globs (`paper/*`), and the clone's prompt contains the documents. They always come in the
order of the store, whatever order the call names them in, and before the objective, so that sibling clones with the same documents
share a prompt prefix that the backend computes once.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping

from ramet.agents.tree import Segment
from ramet.errors import TaskError

MAX_PATTERNS, MAX_PATTERN = 64, 256
"""Ranges and globs that are expanded in one list of keys, each of which costs a pass over all keys; and characters of one."""


class ContextStore:
    """The documents of one task. A key matches exactly, or else ignoring case and surrounding space, or else as a range or a glob.

    Raises `TaskError` if two keys differ only in case and space.
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

    def texts(self) -> dict[str, str]:
        """The documents that are texts, by key, in order."""
        return {key: document for key, document in self._documents.items() if isinstance(document, str)}

    def resolve(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """The known keys in the order of the store without repeats, and what names none, as it was given.

        `A-I` names the documents from A to I in the order of the store; `*`, `?` and `[...]` match as in file names.
        """
        known: dict[str, None] = {}
        unknown: dict[str, None] = {}
        patterns = 0
        for key in keys:
            match = self._match(key)
            if match is not None:
                known[match] = None
                continue
            patterns += 1
            matches = self._expanded(key) if patterns <= MAX_PATTERNS and len(key) <= MAX_PATTERN else []
            known.update(dict.fromkeys(matches))
            if not matches:
                unknown[key] = None
        return sorted(known, key=self._order.__getitem__), list(unknown)

    def _match(self, key: str) -> str | None:
        return key if key in self._documents else self._folded.get(key.strip().casefold())

    def _expanded(self, pattern: str) -> list[str]:
        """The keys that a range or a glob names."""
        for at, character in enumerate(pattern):
            if character == "-":
                first, last = self._match(pattern[:at]), self._match(pattern[at + 1 :])
                if first is not None and last is not None:
                    return list(self._documents)[self._order[first] : self._order[last] + 1]
        if not any(character in pattern for character in "*?["):
            return []
        glob = pattern.strip().casefold()
        return [key for folded, key in self._folded.items() if fnmatch.fnmatchcase(folded, glob)]

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
