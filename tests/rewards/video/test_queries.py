"""The answer in a query, whatever decoding has made of the prompt before it."""

from __future__ import annotations

import random

import pytest

from ramet.rewards.video.queries import answer_of

PROMPT = "<|im_start|>user\nWhat colour is the caf\u00e9's  door?<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[PAD]")


@pytest.mark.parametrize(
    "before",
    [
        PROMPT,
        "<|endoftext|>" * 3 + PROMPT,
        "[PAD][PAD] " + PROMPT,
        "<s>" + PROMPT,
        PROMPT.replace("\u00e9", "e\u0301"),
        PROMPT.replace("  ", " "),
        PROMPT.rstrip(),
        PROMPT.replace("<|im_start|>", "").replace("<|im_end|>", ""),
        PROMPT.lower(),
        PROMPT[17:],
        PROMPT[-30:],
        "\ufffd's  door?<|im_end|>\n<|im_start|>assistant\n",
        "assistant\n",
    ],
)
@pytest.mark.parametrize(
    "after", ["", "<|im_end|>", "<|im_end|>\n<|endoftext|>", "</s>", "<|eot_id|>" + "<|endoftext|>" * 40, "\n [PAD][PAD]"]
)
def test_the_answer_is_found(before: str, after: str) -> None:
    """After a prompt that was padded, normalised, stripped of its tokens or cut at the left, before whatever ended or padded it."""
    assert answer_of(before + " It is  Red, no caf\u00e9." + after, PROMPT, SPECIAL) == "It is  Red, no caf\u00e9."


@pytest.mark.parametrize(
    ("query", "prompt", "answer"),
    [
        ("ask: 3", "ask: ", "3"),
        ("", "", ""),
        ("only this", "", "only this"),
        ("ask: ", "ask: ", ""),
        ("ask: ask: ask: 3", "ask: ", "ask: ask: 3"),
        ("a <|im_end|> b<|im_end|>", "a", "b"),
        ("x", "y", None),
        ("Red.", PROMPT, None),
        ("assistant of another kind", "You are an artist", None),
        ("a question?", "another question about it?", None),
        ("ant: red", PROMPT, None),
    ],
)
def test_what_is_no_prompt_is_not_taken_for_one(query: str, prompt: str, answer: str | None) -> None:
    assert answer_of(query, prompt, SPECIAL) == answer


def test_any_cut_of_a_prompt_gives_the_same_answer() -> None:
    """Also of prompts that repeat themselves: the longest part counts."""
    rng = random.Random(0)
    for _ in range(200):
        prompt = "".join(rng.choice("ab ") for _ in range(rng.randint(20, 60))) + "Answer: "
        cut = rng.randrange(0, len(prompt) - 16)
        assert answer_of(prompt[cut:] + "the answer", prompt) == "the answer"


def test_hostile_queries_take_linear_time() -> None:
    """This would not end in hours otherwise."""
    assert answer_of("a" * 200_000 + "c", "a" * 200_000 + "b") is None
    assert answer_of("a" * 10 + "<|x|>" * 40_000, "b") is None
    assert answer_of("b" + "<|x|>" * 40_000, "b") == ""
