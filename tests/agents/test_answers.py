"""Where an answer stands in what a model says."""

from __future__ import annotations

import pytest

from ramet.agents.answers import extract_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("**Final Answer:**\n\n\\[\n\\boxed{72}\n\\]", "72"),
        ("The answer is:\n$$\n\\boxed{72}\n$$", "72"), ("Answer:\n\\[\n72\n\\]", "72"),
        ("### Final Answer\n\n72", "72"), ("**Final answer**\n\\[ 72 \\]\nI hope it is right.", "72"),
        ("Answer: \\[\n72\n\\]\nDone.", "72"),
        ("Answer:\n```\n72\n```", "72"), ("Answer:\n```text\n72\n```", "72"), ("Answer: ```72```", "72"), ("Answer:\n**72**", "72"),
        ("<answer>72</answer>", "72"), ("Answer: <answer>72</answer>", "72"), ("<answer>\n72\n</answer> Bye", "72"), ("<answer>72", "72"),
        ("so <ANSWER>72</ANSWER>", "72"), ("Answer\uff1a72", "72"), ("Final answer\uff1a\n72", "72"),
        ("Answer: \\boxed{72", "72"), ("Answer: \\boxed{\n72\n}", "72"), ("Answer: \\boxed{\n\\frac{1}{2}\n} so", "\\frac{1}{2}"),
        ("Thus \\boxed{72}.\n\nAnswer: see above", "72"), ("Thus \\boxed{72}.\nAnswer: as boxed above.", "72"),
        ("Answer: above average", "above average"),
        ("Thus \\boxed{72}.\nAnswer:", "72"), ("So\n\\[\n72\n\\]", "72"), ("So\n$$\n72\n$$", "72"), ("So\n```\n72\n```", "72"),
        ("So the answer is 72.", "72."), ("The final answer is $72$", "$72$"), ("she gives her\nanswer", "answer"), ("so \\boxed{72", "72"),
        ("48+24 = <<48+24=72>>72 clips.\n#### 72", "72"), ("#### $1,200", "$1,200"), ("So the correct answer is Paris", "Paris"),
        ("<final_answer>72</final_answer>", "72"), ("So [ANSWER]72[/ANSWER]. Bye", "72"), ("[answer]\n72\n[/answer]", "72"),
        ("答案\uff1a72", "72"), ("最终答案是: **72**\nbye", "72"), ("Q: How many?\nA: 72", "72"), ("**Q:** x?\n**A:** 72", "72"),
        ("A: Paris", "A: Paris"),
        ("A: 5\nB: 6\n\nThe answer is B", "B"), ("A: 5\nB: 6\nAnswer: 6", "6"), ("A: 5\n\\boxed{6}", "6"),
        ("The answer\nis hard to find\nAnswer: 3", "3"),
    ],
)  # fmt: skip
def test_however_it_is_wrapped_the_value_is_read(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("opened", ["<think>", "<thinking>", "[THINK]", "◁think▷", "<THINK>", "Hm.\n<think>"])
def test_what_is_only_thought_is_not_said(opened):
    thought = f"{opened}Perhaps \\boxed{{1}}\nAnswer: 72"
    assert extract_answer(thought) is None if opened != "Hm.\n<think>" else extract_answer(thought) == "Hm."
    closed = opened.rpartition("\n")[2].replace("<", "</").replace("[", "[/").replace("◁", "◁/")
    assert extract_answer(f"{thought}{closed}\nAnswer: 3") == "3"
    assert extract_answer(f"{thought}{closed}\nAnswer: 3\n{opened}\nAnswer: 4") == "3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{5}", "5"), ("\\boxed{\\frac{1}{2}} then \\boxed{3} done", "3"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{open", None), ("\\boxed{1} and \\boxed{open", "1"), ("{}}}{", None), ("", None), ("\\boxed{a{b}c}}", "a{b}c"),
        ("\\boxed{\\boxed{7}}", "7"), ("\\fbox{5}", "5"), ("\\framebox{5}", "5"), ("\\boxed {5}", "5"),
        ("\\boxed 5", "5"), ("$\\boxed 5$.", "5"),
        ("\\boxed5", "5"), ("\\boxed 12, so", "12"), ("\\boxed\\frac12$", "\\frac12"), ("$\\boxed x$", "x"), ("\\fbox{$5$}", "$5$"),
        ("Put it into \\boxed and say why", None), ("\\boxed 1 then \\boxed{2}", "2"),
    ],
)  # fmt: skip
def test_the_last_box(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "\\boxed ", "}", "Answer: above\n", "Answer:\n```\n", "<think>", "</think>", "<answer>", "\\[", "`", "*", " "],
)
def test_answers_are_found_in_texts_that_would_keep_a_quadratic_search_for_minutes(piece):
    for end in ("", "\nx \\boxed{1}"):
        extract_answer(piece * 40_000 + end)
    assert extract_answer(piece * 40_000 + "\nAnswer: 1") in ("1", None if "<think>" in piece else "1")


def test_boxes_give_way_to_a_stated_answer():
    assert extract_answer("\\boxed{4}\nAnswer: 5\nbye") == "5"
    assert extract_answer("thus \\boxed{4}\nI hope this helps") == "4"
    assert extract_answer("thus \\boxed{4}, and", finished=False) == "4"
    assert extract_answer("\\boxed{}\nlast") == "last"
