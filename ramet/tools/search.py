"""Search by words: a tool over the documents of a task, and tools over documents of one's own. BM25 over passages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated
from weakref import WeakKeyDictionary

from pydantic import Field

from ramet.agents.context import ContextStore
from ramet.agents.tools import BranchView, Tool, tool
from ramet.errors import ConfigError, require

PASSAGE_CHARACTERS = 1000
MOST_PASSAGES = 20
_WORDS = r"(?u)\b\w+\b"
_Count = Annotated[int, Field(ge=1, le=MOST_PASSAGES)]


class Index:
    """The passages of `documents`, texts by key, by the words that are in them and in their keys."""

    def __init__(self, documents: Mapping[str, str]):
        import bm25s

        self._passages = [(key, passage) for key, text in documents.items() for passage in passages(text, PASSAGE_CHARACTERS)]
        words = [_words(f"{key} {passage}") for key, passage in self._passages]
        self.empty = not any(words)
        """Whether there is nothing to be found."""
        self._ranks = bm25s.BM25()
        if not self.empty:
            self._ranks.index(words, show_progress=False)

    def find(self, query: str, count: int) -> str:
        """A line `key: passage` for each of the best `count` passages that have a word of the query, the best first.

        Which they are depends on nothing but the documents and the query.
        """
        terms = _words(query)
        if self.empty or not terms:
            return "(nothing found)"
        scores = self._ranks.get_scores(terms)
        best = [int(place) for place in (-scores).argsort(kind="stable")[:count] if scores[place] > 0]
        return "\n\n".join(": ".join(self._passages[place]) for place in best) or "(nothing found)"


def _words(text: str) -> list[str]:
    import bm25s

    read: list[list[str]] = bm25s.tokenize([text], token_pattern=_WORDS, stopwords=[], return_ids=False, show_progress=False)
    return read[0] if read else []


def search_tool(documents: Mapping[str, str], *, name: str = "search", about: str = "the documents") -> Tool:
    """A tool `name` that finds passages in `documents` of one's own (`Index`); `about` says to the model what they are.

    Raises `ConfigError` where there is nothing to be found, or bm25s is not installed.
    """
    require("bm25s", "search_tool")
    if wrong := [key for key, text in documents.items() if not isinstance(text, str)]:
        raise ConfigError(f"tool {name}: document {wrong[0]!r} is not a text")
    index = Index(documents)
    if index.empty:
        raise ConfigError(f"tool {name}: there is no word in its documents")

    def find(query: str, k: _Count = 3) -> str:
        return index.find(query, k)

    find.__doc__ = f"Find the passages of {about} that match a query best by its words."
    return tool(name=name)(find)


_INDICES: WeakKeyDictionary[ContextStore, Index] = WeakKeyDictionary()


@tool
def search(query: str, branch: BranchView, k: _Count = 3) -> str:
    """Find the passages of the documents that match a query best by its words."""
    index = _INDICES.get(branch.store)
    if index is None:
        index = _INDICES[branch.store] = Index(branch.store.texts())
    return index.find(query, k)


def passages(text: str, size: int) -> Iterator[str]:
    """A text in pieces of at most `size` characters, cut where a paragraph, a line or a word ends if one does."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            cuts = (text.rfind(separator, start + size // 2, end) for separator in ("\n\n", "\n", " "))
            end = next((cut for cut in cuts if cut > 0), end)
        if passage := text[start:end].strip():
            yield passage
        start = end
