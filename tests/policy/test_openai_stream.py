"""Events out of bytes: the rules of server-sent events, however the bytes are cut, and what servers send in their place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import EventTooLong
from ramet.policy.engines.openai import stream
from ramet.policy.engines.openai.stream import EventReader, ServerSentEvent


def events(body: bytes, size: int = 0) -> list[tuple[str, str]]:
    reader = EventReader()
    blocks = [body[i : i + size] for i in range(0, len(body), size)] if size else [body]
    found: list[ServerSentEvent] = [event for block in blocks for event in reader.feed(block)] + reader.close()
    return [(event.kind, event.text) for event in found]


A = '{"a": 1}'


@pytest.mark.parametrize(
    "body, found",
    [
        (b'data: {"a": 1}\n\n', [("message", A)]),
        (b'data:{"a": 1}\r\n\r\n', [("message", A)]),
        (b'data: {"a": 1}\r\r', [("message", A)]),
        (b'\xef\xbb\xbfdata: {"a": 1}\n\n', [("message", A)]),
        (b'data: {"a": 1}', [("message", A)]),
        (b": ping\n\n:\n\nid: 7\nretry: 10\ndata: x\n\n", [("message", "x")]),
        (b'data: {"a":\ndata: 1}\n\n', [("message", '{"a":\n1}')]),
        (b'data: {"a": 1}\ndata: {"a": 1}\ndata: [DONE]\n', [("message", A), ("message", A), ("message", "[DONE]")]),
        (b"data:\n\ndata: \n\nevent: x\n\ndata: y\n\n", [("message", "y")]),
        (b"event: error\ndata: broken\n\ndata: z\n\n", [("error", "broken"), ("message", "z")]),
        (b"error: {\n\n", [("error", "{")]),
        (b'data: z\n\n{"a": 1}\nnonsense\n', [("message", "z"), ("message", A)]),
        (b'{"a": 1}\n{"a": 1}\n', [("message", A), ("message", A)]),
        (b'{\n "a": 1\n}\n', [("body", '{\n "a": 1\n}\n')]),
        (b"<html>\n\n<p>data: x</p>", [("body", "<html>\n\n<p>data: x</p>")]),
        ("data: \u2028 \u85cf\n\n".encode(), [("message", "\u2028 \u85cf")]),
        (b"data: [DONE]", [("message", "[DONE]")]),
        (b"", []),
        (b"\n\r\n\r", []),
    ],
)
def test_events_are_read_as_browsers_read_them_wherever_the_bytes_are_cut(body, found):
    for size in (0, 1, 2, 3, 7):
        assert events(body, size) == found, size


@settings(max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=8), st.integers(), st.none()), min_size=1), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.integers(1, 9),
)
def test_what_is_sent_as_events_comes_out(objects, line_end, comments, size):
    said = [json.dumps(o, ensure_ascii=False) for o in objects]
    body = "".join((f": c{line_end}" if comments else "") + f"data: {text}{line_end}{line_end}" for text in said)
    assert [text for _, text in events(body.encode("utf-8", "surrogatepass"), size)] == said


@settings(max_examples=60)
@given(st.binary(max_size=200), st.integers(1, 20))
def test_no_bytes_break_the_reader_and_cutting_changes_nothing(body, size):
    assert events(body, size) == events(body)


@pytest.mark.parametrize("body", [b"data: " + b"x" * 2000, b"x" * 2000, b"data: x\n" * 1000, b"<p>\n" + b"y\n" * 1000])
def test_an_event_has_an_end(body, monkeypatch):
    monkeypatch.setattr(stream, "MAX_CHARACTERS", 1000)
    for size in (0, 7):
        with pytest.raises(EventTooLong):
            events(body, size)
    assert len(events(b"data: x\n\n" * 1000, 7)) == 1000
