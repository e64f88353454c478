"""Equivalence of mathematical answers, and model text that would keep an algebra system busy for ever."""

from __future__ import annotations

import time

import pytest

from ramet.agents.tree import Task
from ramet.errors import RewardError, TaskError
from ramet.rewards import maths
from ramet.rewards.maths import Verifier, math_match


def match(gold: str, answer: str | None) -> float:
    return math_match(Task("t", (), {}, gold), answer)


@pytest.mark.parametrize(
    "gold, answer, expected",
    [
        ("18", "18", 1), ("18", "$18$", 1), ("18", "18.0", 1), ("18", "\\boxed{18}", 1), ("18", "x = 18.", 1), ("1000", "1,000", 1),
        ("18", "81", 0), ("4", "3/4", 0), ("4", "it is 3 or 4", 0), ("18", "", 0), ("18", None, 0), ("-3", "\u22123", 1),
        ("\\frac{1}{2}", "0.5", 1), ("\\frac{3}{4}", "3/4", 1), ("\\frac{3}{4}", "\\dfrac{3}{4}", 1), ("0.5", "1/3", 0), ("1", "1/0", 0),
        ("x^2+1", "1+x^2", 1), ("x^2+1", "x^2-1", 0), ("\\sqrt{2}", "2^{1/2}", 1), ("(1,2)", "(1, 2)", 1), ("(1,2)", "(2,1)", 0),
        ("50\\%", "0.5", 1), ("\\frac{\\pi}{2}", "\\pi/2", 1),
    ],
)  # fmt: skip
def test_equivalence(gold, answer, expected):
    assert match(gold, answer) == expected


def test_a_task_without_a_reference_is_named():
    for bad in (None, "", 5):
        with pytest.raises(TaskError, match="task t has no reference"):
            math_match(Task("t", (), {}, bad), "5")


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "(" * 400, "\\frac{" * 80, "1" * 499, "{" * 499, "!" * 300, "2^" * 200, "\x00\ud800x"])
def test_answers_that_hang_or_break_are_wrong_in_bounded_time(answer):
    verifier = Verifier(seconds=3.0)
    try:
        assert not verifier.equivalent("x+1", "x")  # started
        begun = time.perf_counter()
        assert not verifier.equivalent("x+1", answer)
        assert time.perf_counter() - begun < 20
        assert verifier.equivalent("x+1", "1+x"), "the next answer is judged as ever"
    finally:
        verifier.close()


def test_a_verifier_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(maths.sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match="does not start"):
        Verifier().equivalent("a", "b")
