"""A search tool over documents of one's own: BM25 over passages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field

from ramet.agents.tools import Tool, tool
from ramet.errors import ConfigError, require

PASSAGE_CHARACTERS = 1000
MOST_PASSAGES = 20
_WORDS = r"(?u)\b\w+\b"


def search_tool(documents: Mapping[str, str], *, name: str = "search", about: str = "the documents") -> Tool:
    """A tool `name` that finds passages in `documents`, texts by key; `about` says to the model what they are.

    A result is a line `key: passage` for each passage, the best first, of those that have a word of the query; which they are depends
    on nothing but the documents and the query. Raises `ConfigError` where there is nothing to be found, or bm25s is not installed.
    """
    require("bm25s", "search_tool")
    import bm25s
    import numpy as np

    if wrong := [key for key, text in documents.items() if not isinstance(text, str)]:
        raise ConfigError(f"tool {name}: document {wrong[0]!r} is not a text")
    found = [(key, passage) for key, text in documents.items() for passage in passages(text, PASSAGE_CHARACTERS)]

    def words(text: str) -> list[str]:
        read: list[list[str]] = bm25s.tokenize([text], token_pattern=_WORDS, stopwords=[], return_ids=False, show_progress=False)
        return read[0] if read else []

    split = [words(f"{key} {passage}") for key, passage in found]
    if not any(split):
        raise ConfigError(f"tool {name}: there is no word in its documents")
    index = bm25s.BM25()
    index.index(split, show_progress=False)

    def search(query: str, k: Annotated[int, Field(ge=1, le=MOST_PASSAGES)] = 3) -> str:
        asked = words(query)
        scores = index.get_scores(asked) if asked else np.zeros(len(found))
        best = [int(place) for place in np.argsort(-scores, kind="stable")[:k] if scores[place] > 0]
        return "\n\n".join(": ".join(found[place]) for place in best) or "(nothing found)"

    search.__doc__ = f"Find the passages of {about} that match a query best by its words."
    return tool(name=name)(search)


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
