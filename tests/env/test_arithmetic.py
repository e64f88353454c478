"""The arithmetic environments: the reference's measured frequencies, and rows that add up."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from ramet.agents.tree import Message, Task
from ramet.env.arithmetic import RowsEnvironment, SelfcestEnvironment, _draft, parse_sum, rows_task, selfcest_expression, spell
from ramet.env.splits import PARTS, part_of
from ramet.errors import ConfigError, TaskError
from ramet.recipes.nano.demonstrations import demonstrate
from ramet.rewards.exact_match import graded_integer, integer_match, stated_integer

COUNT = 20_000


@pytest.fixture(scope="module")
def sampled():
    rng = random.Random(0)
    return [selfcest_expression(rng) for _ in range(COUNT)]


def near(share: float, expected: float) -> bool:
    """Within four standard errors of a difference of two samples of this size, the table's rounding included."""
    return abs(share - expected) < 4 * (2 * expected * (1 - expected) / COUNT) ** 0.5 + 0.0006


def shares(values, keys) -> list[float]:
    counts = Counter(values)
    return [counts[key] / sum(counts.values()) for key in keys]


def test_values_are_right_and_bounded(sampled):
    for expression, value in sampled[:3000]:
        assert eval(expression) == value
        assert len(str(abs(value))) <= 16


@pytest.mark.parametrize(
    ("what", "keys", "expected"),
    [
        (lambda e: len(re.findall(r"[+\-*]", e)), range(3, 11), [0.189, 0.166, 0.142, 0.128, 0.110, 0.095, 0.089, 0.082]),
        (lambda e: e.count("("), range(3), [0.278, 0.447, 0.275]),
        (lambda e: e.count("*"), range(7), [0.079, 0.270, 0.333, 0.204, 0.088, 0.023, 0.003]),
    ],
)
def test_frequencies_per_expression(sampled, what, keys, expected):
    got = shares([what(e) for e, _ in sampled], keys)
    assert all(near(g, e) for g, e in zip(got, expected, strict=True)), got


def test_frequencies_of_operators_digits_signs_and_lengths(sampled):
    operators = shares((c for e, _ in sampled for c in e if c in "+-*"), "*+-")
    assert operators == pytest.approx([0.348, 0.371, 0.281], abs=0.006)
    digits = shares((len(n) for e, _ in sampled for n in re.findall(r"\d+", e)), range(3, 8))
    assert digits == pytest.approx([0.220, 0.211, 0.202, 0.191, 0.176], abs=0.006)
    assert near(sum(v < 0 for _, v in sampled) / COUNT, 0.341)
    lengths = [len(e) for e, _ in sampled]
    assert sum(lengths) / COUNT == pytest.approx(55, abs=0.6) and 95 <= max(lengths) <= 125


def test_acceptance():
    rng = random.Random(1)
    accepted = sum(len(str(abs(_draft(rng)[1]))) <= 16 for _ in range(COUNT))
    assert near(accepted / COUNT, 0.555)


def test_rows_add_up_and_say_everything():
    for task in RowsEnvironment().tasks("iid", 300, 7):
        values = [v for row in task.documents.values() for v in parse_sum(row)]
        assert sum(values) == task.reference and len(values) == task.meta["operands"]
        assert all(0 < abs(v) <= 9 for v in values)
        assert all(1 <= len(parse_sum(row)) <= 6 for row in task.documents.values())
        for key, row in task.documents.items():
            assert f"{key}: {row}" in task.messages[0].content


def test_tasks_are_a_function_of_their_arguments_and_splits_differ():
    env = RowsEnvironment()
    assert env.tasks("iid", 20, 3) == env.tasks("iid", 20, 3)
    assert env.tasks("iid", 20, 3)[:5] == env.tasks("iid", 5, 3)
    assert env.tasks("iid", 20, 3) != env.tasks("train", 20, 3) != env.tasks("train", 20, 4)
    assert {env.size(t) for t in env.tasks("ood", 200, 0)} == set(range(48, 55))
    assert {env.size(t) for t in env.tasks("train", 400, 0)} == set(range(2, 25))
    for other in (env, SelfcestEnvironment()):
        with pytest.raises(ConfigError, match="no split 'test'; there are train, tune"):
            other.tasks("test", 1, 0)


def operands(task: Task) -> tuple[int, ...]:
    return tuple(value for row in task.documents.values() for value in parse_sum(row))


def test_what_is_trained_on_tuned_on_and_measured_differs_in_content():
    env = RowsEnvironment((2, 4), ood_operands=(2, 4), row=(1, 2))
    sums_of = {split: {operands(t) for seed in range(5) for t in env.tasks(split, 100, seed)} for split in PARTS}
    assert len(sums_of["train"]) > 200 and all(len(sums) > 100 for sums in sums_of.values())
    assert not sums_of["train"] & (sums_of["tune"] | sums_of["tune_ood"] | sums_of["iid"] | sums_of["ood"])
    assert not (sums_of["tune"] | sums_of["tune_ood"]) & (sums_of["iid"] | sums_of["ood"])


@pytest.mark.parametrize("split", ["tune", "tune_ood", "iid", "ood"])
def test_tasks_that_count_as_independent_differ(split):
    tasks = RowsEnvironment().tasks(split, 300, 0)
    assert len({operands(t) for t in tasks}) == len({t.id for t in tasks}) == 300


def test_the_base_is_shown_no_sum_that_is_tuned_on_or_measured():
    rng = random.Random(0)
    shown = set()
    for _ in range(20_000):
        text = demonstrate(rng).prompt
        shown.add(tuple(v for row in re.findall(r"^[A-Z]: (\S+)$", text, re.MULTILINE) for v in parse_sum(row)))
    short = [values for values in shown if 2 <= len(values) <= 4]
    assert len(short) > 1000 and {part_of(spell(values, signed=True)) for values in short} == {"train"}
    env = RowsEnvironment()
    assert not shown & {operands(t) for split in ("tune", "iid", "ood") for t in env.tasks(split, 300, 0)}


@pytest.mark.parametrize("split", ["tune", "tune_ood", "iid", "ood"])
def test_where_there_are_too_few_sums_that_is_said(split):
    for few in (RowsEnvironment((1, 1), (1, 1), largest=1), RowsEnvironment((2, 2), (2, 2), largest=2)):
        with pytest.raises(ConfigError, match="different tasks for the split"):
            few.tasks(split, 10, 0)


@pytest.mark.parametrize("settings", [{"operands": (0, 3)}, {"operands": (5, 2)}, {"row": (0, 0)}, {"largest": 0}])
def test_ranges_that_hold_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match="at least 1"):
        RowsEnvironment(**settings)


@pytest.mark.parametrize("text", ["", "12*3", "a+b", "__import__('os')", "1+", "9" * 7, "1++2", "(1)", "1;2", "\u0661+1"])
def test_what_is_not_a_sum_is_refused(text):
    with pytest.raises(TaskError, match="is not a sum"):
        parse_sum(text)


def test_sums_are_read():
    assert parse_sum(" 12 + 34-5 ") == [12, 34, -5]
    assert parse_sum("-3+4") == [-3, 4]
    with pytest.raises(TaskError, match="at most 26 rows"):
        rows_task([1] * 157, "long")


def test_grading_reads_a_whole_integer_and_nothing_else():
    task = rows_task([3, 4], "t")
    for right in ("7", " 7 ", "+7", "7.", "07"):
        assert integer_match(task, right) == 1.0
    for wrong in (None, "", "8", "7/1", "7 8", "3/7", "0,7", ",7", "7,", "seven", "7" * 500, "-7", "7e0", "0x7"):
        assert integer_match(task, wrong) == 0.0
    assert stated_integer("-1,234") == -1234 and stated_integer("\u22125") == -5


def test_a_task_without_an_answer_is_an_error_and_not_a_zero():
    for reference in (None, "7", True):
        with pytest.raises(TaskError, match="no integer reference"):
            integer_match(Task("t", (Message("user", "x"),), reference=reference), "7")


def test_the_graded_score():
    def score(target: int, answer: str | None) -> float:
        return graded_integer(Task("t", (Message("user", "x"),), reference=target), answer)

    assert score(10, "it is 10") == 1.0 and score(10, "10 or 11") < 1.0
    assert score(7, "9") == pytest.approx(0.14491, abs=1e-5)  # 0.2 / log2(2 + 2 / sqrt(11))
    assert score(5, "five") == 0.0 and score(5, None) == 0.0
    # Where the release divides by zero (max(A, B) = -2) and overflows.
    assert 0 < score(-2, "-3") < 0.2
    assert 0 <= score(3, "9" * 350) < 0.01
    assert score(3, "9" * 5000) == 0.0


def test_the_reference_environment_grades_and_names_its_tasks():
    env = SelfcestEnvironment()
    task = env.tasks("train", 3, 0)[2]
    assert env.grade(task, str(task.reference)) == 1.0 and task.id == "train-0-2" and 4 <= env.size(task) <= 11
