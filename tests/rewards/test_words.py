"""The word scorers give what the official ones give: values worked out by hand from the official rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.tree import Task
from ramet.errors import TaskError
from ramet.rewards.f1 import exact_match, f1, normalise, token_f1


def task(*answers: str) -> Task:
    return Task("t", (), {}, answers)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Beatles", "beatles"),
        ("  An   apple, a day! ", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("A-side", "aside"),
        ("can't", "cant"),
        ("«Le Monde»", "«le monde»"),
        ("the", ""),
    ],
)
def test_normalising(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "answer, gold, verdicts, expected",
    [
        ("Barack Obama", "Obama", True, 2 * (1 / 2 * 1) / (1 / 2 + 1)),
        ("the city of New York", "New York City", True, 2 * (3 / 4 * 1) / (3 / 4 + 1)),
        ("a a b", "b b", True, 1.0 * 2 / 3),  # articles go: "b" against "b b"
        ("yes", "yes", True, 1.0),
        ("yes it is", "yes", True, 0.0),
        ("yes it is", "yes", False, 0.5),
        ("no", "no way", True, 0.0),
        ("noanswer", "Paris", True, 0.0),
        ("", "", True, 0.0),
        ("", "", False, 1.0),
        ("the", "a", False, 1.0),
        ("", "Paris", False, 0.0),
        ("x x y", "x y y", True, 2 / 3),
    ],
)
def test_token_f1(answer, gold, verdicts, expected):
    assert token_f1(answer, gold, verdicts) == pytest.approx(expected)


def test_the_best_alias_counts_and_no_answer_is_no_match():
    assert exact_match(task("United States", "USA"), "the U.S.A.") == 1.0
    assert f1(task("New York", "NYC"), "nyc") == 1.0
    assert exact_match(task("x"), None) == f1(task("x"), None) == 0.0
    for bad in (None, (), "Paris", (1,)):
        with pytest.raises(TaskError, match="no reference answer in words"):
            exact_match(Task("t", (), {}, bad), "x")


@pytest.mark.parametrize("gold", ["The", "A", "?", "an", "!!!"])
@pytest.mark.parametrize("verdicts", [True, False])
def test_silence_earns_nothing_even_where_the_rules_leave_nothing_of_the_reference(gold, verdicts):
    for said in (None, "", " ", "...", "the an"):
        assert exact_match(task(gold), said) == f1(task(gold), said, verdicts) == 0.0
    assert exact_match(task(gold), f" {gold.upper()} ") == f1(task(gold), gold.lower(), verdicts) == 1.0


@given(st.text(), st.text())
def test_scores_are_symmetric_bounded_and_agree(a, b):
    score = token_f1(a, b, verdicts=False)
    assert 0 <= score <= 1 and score == token_f1(b, a, verdicts=False)
    if normalise(a) == normalise(b):
        assert score == 1.0
    assert token_f1(a, b) <= score
