"""Intervals: known values, coverage by simulation, clusters."""

from __future__ import annotations

import numpy as np
import pytest

from ramet.benchmarks.evaluation.baselines import Outcome
from ramet.benchmarks.evaluation.frontier import claims, clear, comparisons, corrected, cost_at, equal_accuracy
from ramet.benchmarks.evaluation.harness import Measured, grouped
from ramet.benchmarks.evaluation.seeds import over_seeds, seeds_markdown
from ramet.benchmarks.evaluation.statistics import accuracy_interval, holm, paired_difference, sign_test


def scores(values) -> dict[str, list[float]]:
    return {str(i): list(np.atleast_1d(v).astype(float)) for i, v in enumerate(values)}


def test_one_sample_a_task_is_the_wilson_interval():
    # 81 of 263 by Wilson's formula: 0.2553 to 0.3662 (Newcombe 1998, table I).
    interval = accuracy_interval(scores([1] * 81 + [0] * 182))
    assert (interval.mean, interval.n) == (pytest.approx(81 / 263), 263)
    assert (interval.low, interval.high) == (pytest.approx(0.2553, abs=6e-4), pytest.approx(0.3662, abs=6e-4))


def test_scores_beyond_0_and_1_have_the_interval_of_t():
    """Of 1, 2, 3, 4: a mean of 2.5 with a standard error of 0.6455, and 3.182 of these to either side."""
    interval = accuracy_interval(scores([1, 2, 3, 4]))
    assert (interval.low, interval.high) == (pytest.approx(2.5 - 3.182 * 0.6455, abs=1e-3), pytest.approx(2.5 + 3.182 * 0.6455, abs=1e-3))
    difference = paired_difference(scores([1, 2, 3, 4]), scores([0, 0, 0, 0]))
    assert (difference.low, difference.high) == (interval.low, interval.high)
    assert accuracy_interval(scores([-2.0])).low == -2.0 and accuracy_interval(scores([-2.0])).high == 1.0
    assert paired_difference(scores([3.0]), scores([0.0])).high == 3.0


def test_all_right_is_not_certain():
    interval = accuracy_interval(scores([1] * 100))
    assert interval.mean == 1.0 and interval.high == 1.0 and 0.95 < interval.low < 0.97
    assert (accuracy_interval(scores([0])).low, accuracy_interval(scores([0])).high) == (0.0, 1.0)


def test_of_few_tasks_less_is_known_than_the_normal_distribution_says():
    """Wilson's interval of 4 of 16 is 0.102 to 0.495; with 2.131 standard errors for 1.960, and 15 for 16, 0.091 to 0.525."""
    interval = accuracy_interval(scores([1] * 4 + [0] * 12))
    assert (interval.low, interval.high) == (pytest.approx(0.0914, abs=1e-3), pytest.approx(0.5248, abs=1e-3))
    one, other = accuracy_interval(scores([1] * 81 + [0] * 182)), accuracy_interval(scores([1] * 8 + [0] * 18))
    assert other.high - other.low > 3 * (one.high - one.low)


def test_copies_of_a_sample_add_no_certainty():
    rng = np.random.default_rng(0)
    once = rng.random(200) < 0.3
    narrow, wide = accuracy_interval(scores(once)), accuracy_interval({str(i): [float(v)] * 10 for i, v in enumerate(once)})
    assert (narrow.low, narrow.high) == (pytest.approx(wide.low), pytest.approx(wide.high))


def test_coverage_of_both_intervals():
    rng = np.random.default_rng(1)
    held = held_difference = 0
    rounds = 300
    for _ in range(rounds):
        p = rng.beta(2, 2, size=80)
        a = {str(i): list((rng.random(3) < q).astype(float)) for i, q in enumerate(p)}
        b = {str(i): list((rng.random(3) < q * 0.8).astype(float)) for i, q in enumerate(p)}
        interval = accuracy_interval(a)
        held += interval.low <= 0.5 <= interval.high
        difference = paired_difference(a, b)
        held_difference += difference.low <= 0.1 <= difference.high
    assert held / rounds > 0.91 and held_difference / rounds > 0.90


def test_pairing_is_by_task():
    a, b = {"x": [1.0], "y": [0.0], "only a": [1.0]}, {"y": [0.0], "x": [0.0]}
    difference = paired_difference(a, b)
    assert difference.mean == 0.5 and difference.n == 2
    assert paired_difference(a, b) == paired_difference(a, b)
    with pytest.raises(ValueError, match="no task in common"):
        paired_difference({"x": [1.0]}, {"y": [1.0]})


def test_the_order_of_samples_makes_no_difference():
    a, b = ({str(t): list(order) for t in range(8)} for order in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)))
    assert np.mean(a["0"]) != np.mean(b["0"])
    assert sign_test(a, b) == 1.0 and paired_difference(a, b).low == 0.0 == paired_difference(a, b).high


def test_cost_at_equal_accuracy():
    points = [{"accuracy": 0.2, "critical_path": 10}, {"accuracy": 0.6, "critical_path": 30}, {"accuracy": 0.5, "critical_path": 40}]
    assert cost_at(points, 0.4, "critical_path") == pytest.approx(20)
    assert cost_at(points, 0.1, "critical_path") == 10 and cost_at(points, 0.7, "critical_path") is None
    ours = [{**p, "policy": "trained", "split": "iid", "generated": 1} for p in points]
    solo = {"policy": "solo", "split": "iid", "generated": 1}
    theirs = [
        {**solo, "accuracy": 0.40, "ci_high": 0.45, "critical_path": 50},
        {**solo, "accuracy": 0.41, "ci_high": 0.46, "critical_path": 90},  # not clearly better: 50 is what it needs
    ]
    path = next(r for r in equal_accuracy([*ours, *theirs]) if r["cost"] == "critical_path")
    assert path["ratio"] == pytest.approx(0.4)


@pytest.mark.parametrize(("wins", "losses", "p"), [(4, 0, 0.125), (6, 0, 0.03125), (0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024)])
def test_the_sign_test_by_hand(wins, losses, p):
    a = scores([1] * wins + [0] * losses + [1] * 20)
    b = scores([0] * wins + [1] * losses + [1] * 20)
    assert sign_test(a, b) == pytest.approx(p)


def test_claims_count_what_the_intervals_say():
    rows = [(0.1, 0.05, 0.2), (0.0, -0.1, 0.1), (-0.2, -0.3, -0.1), (0.3, 0.2, 0.4)]
    compared = corrected(
        [
            {"baseline": "solo", "split": "iid", "difference": d, "ci_low": a, "ci_high": b, "p_value": p}
            for (d, a, b), p in zip(rows, (0.01, 0.01, 0.01, 0.04), strict=True)
        ]
    )
    (claim,) = claims(compared)
    assert (claim["not_worse"], claim["clearly_better"], claim["clearly_worse"], claim["budgets"]) == (3, 2, 1, 4)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([0.02, 0.001, 0.001]) == pytest.approx([0.02, 0.003, 0.003])


def outcomes(policy: str, budget: int, right) -> list[Measured]:
    cost = Outcome("7", budget, budget, 1, False, 0, "answered")
    return [Measured(policy, "iid", budget, str(i), 1, float(r), cost) for i, r in enumerate(right)]


def test_where_nothing_differs_seven_budgets_seldom_show_a_clear_difference():
    """Two methods of equal accuracy, independent at each of seven budgets: uncorrected, a quarter of such tables show one."""
    rng = np.random.default_rng(0)
    shown = uncorrected = 0
    for _ in range(200):
        measured = [m for policy in ("trained", "solo") for b in range(7) for m in outcomes(policy, 10 + b, rng.random(150) < 0.5)]
        compared = comparisons(grouped(measured))
        shown += any(clear(c) for c in compared)
        uncorrected += any(c["p_value"] < 0.05 for c in compared)
    assert uncorrected > 30 and shown <= 16  # 5% of 200 is 10, and its standard error 3


def test_a_comparison_of_one_task_says_nothing():
    (compared,) = comparisons(grouped([*outcomes("trained", 9, [True]), *outcomes("solo", 9, [False])]))
    assert (compared["ci_low"], compared["ci_high"], compared["p_value"], clear(compared)) == (-1.0, 1.0, 1.0, 0)


def test_what_seeds_say_together_is_over_seeds():
    """Accuracies of three seeds with 4.303 standard errors, differences paired by seed; what one of them lacks is left out."""

    def run(trained: float, solo: float, more: bool = False) -> list[dict]:
        points = [("trained", 48, trained), ("solo", 48, solo), *([("base", 48, 0.1)] if more else [])]
        return [{"record": "point", "policy": p, "split": "iid", "budget": b, "accuracy": a} for p, b, a in points]

    records = over_seeds([run(0.6, 0.5, more=True), run(0.7, 0.5), run(0.8, 0.8)])
    trained, solo = records
    assert (trained["policy"], trained["seeds"], trained["difference"]) == ("trained", 3, 0.0)
    assert trained["accuracy"] == pytest.approx(0.7) and trained["ci_high"] == pytest.approx(0.7 + 4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert (solo["accuracy_min"], solo["accuracy_max"]) == (0.5, 0.8) and solo["difference"] == pytest.approx(0.1)
    assert solo["difference_low"] == pytest.approx(0.1 - 4.3027 * 0.1 / 3**0.5, rel=1e-3)
    assert "| trained controller | 0.70 (0.60-0.80) |" in seeds_markdown(records)
