"""When a mathematical answer is right: the table of pairs, copies of the question, hostile text, many threads."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.agents.answers import extract_answer
from ramet.agents.tree import Message, Task
from ramet.errors import TaskError
from ramet.rewards.maths import canonical, math_match, number
from tests.rewards.other_rules import hendrycks, math_verify

PAIRS = [json.loads(line) for line in Path(__file__).with_name("maths_pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def match(gold: str, answer: object, question: str = "") -> float:
    return math_match(Task("t", (Message("user", question),) if question else (), {}, gold), answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['reference']} | {pair['answer']}")
def test_every_pair_of_the_table_has_its_verdict(pair):
    assert match(pair["reference"], pair["answer"]) == pair["equal"]


def test_every_disagreement_with_other_graders_is_decided_in_writing():
    """math-verify takes 25 seconds for the table: `python -m tests.rewards.other_rules` fills its column; one row in 24 is checked."""
    assert len(PAIRS) > 800 and len({(pair["reference"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)
    for pair in PAIRS:
        agreed = pair["equal"] == pair["hendrycks"] == pair["math_verify"]
        assert agreed == (pair["decided"] is None), pair
        assert pair["hendrycks"] == hendrycks(pair["reference"], pair["answer"])
    for pair in PAIRS[::24]:
        assert pair["math_verify"] == math_verify(pair["reference"], pair["answer"]), pair


@pytest.mark.parametrize(
    ("question", "gold", "copied", "right"),
    [
        ("Simplify $\\sqrt{72}$.", "6\\sqrt{2}", "\\sqrt{72}", "6\\sqrt2"),
        ("Rationalize the denominator of $\\dfrac{1}{\\sqrt{2}}$.", "\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt2}{2}"),
        ("Reduce $\\frac{12}{30}$ to lowest terms.", "\\frac{2}{5}", "\\frac{12}{30}", "2/5"),
        ("Reduce $\\frac{12}{30}$ to lowest terms.", "\\frac{2}{5}", "12/30", "0.4"),
        ("Simplify $\\frac46$.", "\\frac{2}{3}", "\\frac{4}{6}", "\\frac23"),
        ("Simplify $\\frac{4}{6}$.", "\\frac{2}{3}", "\\frac46", "\\frac23"),
        ("Write 0.375 as a common fraction.", "\\frac{3}{8}", "0.375", "3/8"),
        ("Write $-2 < x < 7$ in interval notation.", "(-2,7)", "-2<x<7", "x \\in (-2, 7)"),
        ("Write $4.5 \\times 10^{-3}$ as a decimal.", "0.0045", "4.5 \\times 10^{-3}", "0.0045"),
        ("Write 2.5 as a mixed number.", "2\\frac{1}{2}", "2.5", "2 1/2"),
        ("What is $\\log_2 32$?", "5", "\\log_2 32", "5.0"), ("Factor $x^2-9$.", "(x-3)(x+3)", "x^2-9", "(x+3)(x-3)"),
    ],
)  # fmt: skip
def test_the_question_is_no_answer_to_itself(question, gold, copied, right):
    assert match(gold, copied, question) == 0.0
    assert match(gold, right, question) == 1.0


def test_a_right_number_may_stand_in_the_question():
    assert match("5", "$5.00", "It costs $5.00. What does it cost?") == 1.0
    assert match("x+1", "1+x", "Let f(x) = 1+x. What is f(x)?") == 1.0
    assert match("1000", "1,000", "Of 1,000 sheep none dies.") == 1.0


def test_a_task_without_a_reference_or_with_one_that_cannot_be_read_is_named():
    for bad in (None, "", 5):
        with pytest.raises(TaskError, match="task t has no reference"):
            math_match(Task("t", (), {}, bad), "5")
    for bad in ("\\frac{1}{2", "(1,2", "}{", "(" * 70 + "1" + ")" * 70, "9" * 2000):
        with pytest.raises(TaskError, match=r"task t: its reference answer .* cannot be read"):
            match(bad, "5x")


HOSTILE = [
    "2*" + "-" * 900 + "1", "2^" + "-" * 900 + "1", "5%" + "%" * 900, "x'" + "'" * 900, "\\sin" * 200 + " x", "\\frac1" * 150 + "x",
    "x_" * 400 + "x",
    "(x+1)^" * 100 + "2", "((((x+1)^{20}+1)^{20}+1)^{20}+1)^{20}", "1:" * 400 + "1", "\\binom1,000", "\\frac.5", "\\pm1," * 150 + "2",
    "a=" * 400 + "1",
    "9^{9^{9^9}}", "9^{9^9}", "9**9**9**9", "(" * 400, "(" * 400 + ")" * 400, "{" * 300 + "}" * 300, "\\frac{" * 80, "\\frac" * 150,
    "1" * 499, "!" * 300, "5" + "!" * 200, "(((9!)!)!)!", "2^" * 200, "x^" * 300 + "x", "-" * 999, "1/" * 400 + "1", "\\pm" * 300,
    "|" * 500, "\\sqrt" * 200, "$" * 500, "\\sin(10^{10^{5}})", "\\binom{10^9}{10^8}", "e^{10^{9}}", "(x+1)^{1000000}", "2^{1000000000}",
    "10^{-1000000000}", "1e99999", "\\gcd(10^{99},6)", "0/0", "1/0", "0^0", "0^{-1}", "\\log 0", "\\ln(-1)", "\\begin{pmatrix}",
    "\\end{pmatrix}", "\\text{", "\\left", "=", "x=", "<", ",", "()", "\\{\\}", "1.2.3", "..5", "_", "^", "x_", "'", "`", "\\boxed{}",
    "\\boxed", "%", "\\overline{", "\\frac{1}{2}{3}", "\\sum_{n=1}^{10^9} n", "\\int", "\x00\ud800x", "\ufeff", "a" * 5_000_000,
    "5 " * 1_000_000, 5.0, 5, ["5"], b"5", True,
]  # fmt: skip


@pytest.mark.parametrize(
    "gold", ["5", "x+1", "\\sqrt{2}", "(1,2)", "\\{1,2\\}", "x>3", "\\text{yes}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "9^{9}"]
)
def test_answers_that_would_hang_or_break_are_wrong(gold):
    """An algebra system would compute some of these for ever: that the test ends is what it shows."""
    assert [match(gold, answer) for answer in HOSTILE] == [0.0] * len(HOSTILE)


@settings(max_examples=150)
@given(st.text(max_size=40), st.text("0123456789+-*/^_{}()[]\\|,.=<>$% xyabfracsqrtmixpe", max_size=60))
def test_any_text_has_a_verdict_and_reads_itself_right(noise, formula):
    for text in (noise, formula):
        assert match("x+1", text) in (0.0, 1.0) and isinstance(canonical(text), str)
        try:
            own = match(text or "1", text or "1")
        except TaskError:
            continue
        assert own in (0.0, 1.0)


@given(
    st.integers(-(10**6), 10**6),
    st.integers(0, 99),
    st.sampled_from(["{}", "${}", "${}$", "{} dollars", "\\boxed{{{}}}", "x = {}", "{} km/h", "**{}**", "{}."]),
)
def test_a_number_is_right_in_every_dress_and_another_in_none(value, cents, dress):
    for gold, said in (
        (f"{value}", f"{value}"),
        (f"{value}", f"{value}.00"),
        (f"{value}.{cents:02}", f"{value:,}.{cents:02}"),
        (f"{value}", f"{value:,}"),
    ):
        assert match(gold, dress.format(said)) == 1.0
        assert match(str(value + 1) + ".5", dress.format(said)) == 0.0


def test_many_threads_judge_as_one():
    work = [(p["reference"], p["answer"], p["equal"]) for p in PAIRS] * 2
    random.Random(0).shuffle(work)
    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(lambda w: match(w[0], w[1]), work))
    assert said == [float(w[2]) for w in work]


def test_answers_that_vote_together():
    for alike in (
        ["0.5", "\\frac{1}{2}", "$0.50$", "1/2 cup"],
        ["x+1", "1 + x", "\\left(1+x\\right)"],
        ["1, 2", "2,1"],
        ["\\text{Paris}", "paris."],
    ):
        assert len({canonical(text) for text in alike}) == 1
    assert len({canonical(text) for text in ("1", "2", "x", "x+1", "(1,2)", "(2,1)", "", "\\frac{", "yes")}) == 9
    assert number("3\\frac{1}{2}") == number("3.5") == number("7/2")
    assert not any(number(text) for text in ("x", "", "3 km", "three", "\\frac{"))


@pytest.mark.parametrize(
    "said",
    [
        "**Final Answer:**\n\n\\[\n\\boxed{72}\n\\]", "Answer: 72 clips", "Answer: $72$.", "So she sold 72 clips.", "The answer is 72.",
        "\\boxed{72 \\text{ clips}}", "Answer: \\(72\\)", "Answer: **72**", "<answer>$72</answer>", "so $x = 72$",
    ],
)  # fmt: skip
def test_what_models_say_is_graded_as_it_is_meant(said):
    assert match("72", extract_answer(said)) == 1.0 and match("27", extract_answer(said)) == 0.0
