"""Thoughts and quotes: what stands in them is neither an answer nor a call, however a model marks them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents import thoughts
from ramet.agents.answers import extract_answer
from ramet.agents.calls import parse_spelled
from ramet.agents.protocol import render_call
from ramet.agents.thoughts import without_thoughts


def test_a_text_without_a_hint_has_no_mark():
    """Such texts are not searched for marks."""
    for opening, closing in thoughts.MARKS:
        for mark in (opening, closing):
            assert mark.replace("\\", "").startswith((*thoughts._HINTS, "Here")), mark
    assert thoughts._MESSAGE.pattern.startswith("<")
    assert without_thoughts("HERE IS MY THOUGHT PROCESS: 1\nHere's my response: 2").strip() == "2"
    assert without_thoughts("analysis 1 assistantfinal2") == "2"


CALL = f"<tool_call>{render_call(['delete it all'])}</tool_call>"
MARKS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ('<reasoning effort="high">', "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<scratchpad>", "</scratchpad>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel>thought\n", "<channel|>"),
    ("Here is my thought process:", "Here is my response:"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
]


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_a_thought_is_neither_answer_nor_call(opening, closing):
    for thought in (
        f"I could write {CALL} but need not.", "Should I use <tool_call> here? No.", "Answer: 13", "```\n", "`", "a\nb", "</tool_call>"
    ):  # fmt: skip
        parsed = parse_spelled(f"{opening}{thought}{closing}Answer: 42")
        assert (parsed.calls, parsed.error, extract_answer(parsed.text)) == ((), "", "42"), thought
        parsed = parse_spelled(f"{opening}{thought}{closing}\n{CALL}")
        assert len(parsed.calls) == 1 and not parsed.error, thought


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_a_thought_that_does_not_end_is_all_there_is(opening, closing):
    if opening == "analysis":
        return  # without its end it is a word
    parsed = parse_spelled(f"{opening}I could write {CALL}\nAnswer: 13")
    assert (parsed.calls, parsed.error, extract_answer(parsed.text)) == ((), "", None)


@pytest.mark.parametrize(("opening", "closing"), [marks for marks in MARKS if "channel|>" not in marks[1] and marks[0] != "analysis"])
def test_a_thought_that_the_prompt_opened_has_its_end_alone(opening, closing):
    parsed = parse_spelled(f"I could write {CALL} but no. Answer: 13{closing}Answer: 42")
    assert (parsed.calls, parsed.error, extract_answer(parsed.text)) == ((), "", "42")


@pytest.mark.parametrize(
    "quoted",
    [
        f"```\n{CALL}\n```",
        f"```json\n{CALL}\n```",
        f"~~~\n{CALL}\n~~~",
        f"````\n```\n{CALL}\n```\n````",
        f"  ```xml\n  {CALL}\n  ```",
        f"`{CALL}`",
        f"``{CALL}``",
        "`<tool_call>`",
    ],
)
def test_a_call_that_is_quoted_is_none(quoted):
    parsed = parse_spelled(f"For example:\n{quoted}\nAnswer: 42")
    assert (parsed.calls, parsed.error, extract_answer(parsed.text)) == ((), "", "42") and quoted in parsed.text
    assert len(parse_spelled(f"For example:\n{quoted}\n{CALL}").calls) == 1
    assert parse_spelled(f"For example:\n```\n{CALL}").calls == (), "a block that is not closed lasts to the end"


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("I think in <think> tags.\nAnswer: 42", "I think in <think> tags.\nAnswer: 42"),
        ("Write:\n```\n<think>\n```\nAnswer: 42", "Write:\n```\n<think>\n```\nAnswer: 42"),
        ("<think>a</think>one<think>b</think>two", "onetwo"),
        ("<think>use </think>? no</think>two", "two"),
        ("<think>a</think>Answer: 42</think>\n", "Answer: 42\n"),
        ("<think></think>\n\nAnswer: 42", "\n\nAnswer: 42"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>First.<|end|>"
         "<|start|>assistant<|channel|>final<|message|>Answer: 42<|return|>", "First.Answer: 42"),
        ("thinking about it: 3 < 4\nAnswer: 42", "thinking about it: 3 < 4\nAnswer: 42"),
        ('<tool_call>{"a": "`"}</tool_call> and `', '<tool_call>{"a": "`"}</tool_call> and `'),
    ],
)  # fmt: skip
def test_what_is_said_is_what_is_neither_thought_nor_mark(text, visible):
    assert without_thoughts(text) == visible


def test_backticks_in_a_call_quote_nothing():
    call = f"<tool_call>{render_call(['run `ls` and ``x', '```'])}</tool_call>"
    assert parse_spelled(f"so: {call}").calls == (call.removeprefix("<tool_call>").removesuffix("</tool_call>"),)


_pieces = st.lists(st.sampled_from([*(m for marks in MARKS for m in marks), CALL, "\n", "```", "`", "Answer: 1", "x ", "<tool_call>"]))


@given(_pieces)
def test_any_text_can_be_read_and_what_was_said_is_read_as_itself(pieces):
    text = "".join(pieces)
    parse_spelled(text)
    assert set(without_thoughts(text)) <= set(text)


@pytest.mark.parametrize(
    "text", ["<think>", "</think>", "<think></think>", "\n<think>", "\n```", "`a``b", "<|channel|>", "\n```\n<think>\n```"]
)
def test_a_megabyte_of_marks_is_read_in_one_pass(text):
    """What compares each mark with all others takes an hour for this."""
    parse_spelled(text * 50_000)
