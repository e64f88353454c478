"""Searching documents of one's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.context import ContextStore
from ramet.agents.tools import ToolRequest, call_tool
from ramet.agents.tree import Segment, ToolStatus
from ramet.errors import ConfigError
from ramet.tools.search import MOST_PASSAGES, passages, search, search_tool
from tests.tools.calling import VIEW, call

DOCUMENTS = {
    "sea": "Herring swim in the sea.\n\n" + "Waves come and go. " * 60 + "\n\nA lighthouse warns ships.",
    "land": "Foxes live in woods, and a lighthouse stands at no wood.",
    "5": "Chapter 5 is about numbers; \u732b is a cat.",
    "empty": "",
}


@pytest.mark.anyio
async def test_passages_are_found_by_their_words_best_first_and_named_by_key():
    search = search_tool(DOCUMENTS, name="look-up", about="a small book")
    assert search.name == "look-up" and "a small book" in search.description
    status, text = await call(search, query="lighthouse ships", k=2)
    first, second = text.split("\n\nland: ")
    assert status is ToolStatus.DONE and first.startswith("sea: ") and first.endswith("A lighthouse warns ships.")
    assert second == DOCUMENTS["land"]
    assert (await call(search, query="5"))[1].startswith("5: Chapter 5") and (await call(search, query="\u732b"))[1].startswith("5: ")
    assert (await call(search, query="LAND", k=1))[1].startswith("land: ")  # a key is searched too
    assert await call(search, query="lighthouse", k=2) == await call(search, query="lighthouse", k=2)


@pytest.mark.anyio
async def test_a_query_that_finds_nothing_says_so_and_one_that_cannot_be_is_told():
    search = search_tool(DOCUMENTS)
    for query in ("zebra", "", "?!", "\0", "<|im_end|>"[:2], "x" * 100_000):
        assert await call(search, query=query) == (ToolStatus.DONE, "(nothing found)"), query
    assert (await call(search, query="a", k=MOST_PASSAGES))[0] is ToolStatus.DONE
    for wrong in ({"query": "a", "k": 0}, {"query": "a", "k": MOST_PASSAGES + 1}, {"query": 5}, {}):
        assert (await call(search, **wrong))[0] is ToolStatus.INVALID, wrong


@pytest.mark.anyio
async def test_the_documents_of_a_task_are_searched_by_whoever_may_read_them():
    nothing = "(nothing found)"
    for documents, said in ((DOCUMENTS, f"land: {DOCUMENTS['land']}"), ({}, nothing), ({"clip": Segment("a.mp4")}, nothing)):
        view = replace(VIEW, store=ContextStore(documents))
        for _ in range(2):  # indexed once
            result, _ = await call_tool(search, ToolRequest("g", "0", 0, 0, "search", '{"query": "foxes", "k": 1}'), view, 60.0)
            assert (result.status, result.text) == (ToolStatus.DONE, said)


def test_what_cannot_be_searched_is_refused_in_one_line():
    for documents, said in (({}, "no word"), ({"a": "", "?": "!!"}, "no word"), ({"a": b"bytes"}, "'a' is not a text")):
        with pytest.raises(ConfigError, match=said):
            search_tool(documents)


@given(st.text("ab \n", max_size=80), st.integers(2, 20))
def test_passages_hold_every_word_in_order_and_are_no_longer_than_they_may_be(text, size):
    pieces = list(passages(text, size))
    assert all(0 < len(piece) <= size for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
