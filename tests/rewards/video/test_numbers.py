"""Best of n and calibration against what must hold: bounds, closed forms, and slow exact versions."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from ramet.agents.tree import Segment
from ramet.benchmarks.evaluation.best_of_n import best_of_n
from ramet.benchmarks.evaluation.statistics import clustered_mean
from ramet.errors import ConfigError, RewardError, TaskError
from ramet.rewards.video.best_of_n import CandidateAnswers, PairwiseSelector, ScoreSelector
from ramet.rewards.video.calibration import calibrate, expected_error, fitted_temperature, rank_correlation
from ramet.rewards.video.fakes import FakeJudge, fake_judge, valid_output


def candidates(count: int, answers: int = 8, share: float = 0.4, seed: int = 0) -> list[CandidateAnswers]:
    made = []
    for n in range(count):
        rng = random.Random(f"{seed}/{n}")
        right = tuple(rng.random() < share for _ in range(answers))
        stated = tuple("yes" if r else f"no {rng.randrange(3)}" for r in right)
        said = tuple(f"{s} ({i}, {n})" for i, s in enumerate(stated))
        made.append(CandidateAnswers(str(n), Segment(f"v{n // 2}"), "q", said, stated, right))
    return made


class Truth:
    name = "truth"

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def score(self, items: Any) -> list[float]:
        return [float(i.answer.startswith("yes")) + self.noise * random.Random(i.answer).gauss(0, 1) for i in items]


def table(records: list[Any]) -> dict[tuple[str, int], float]:
    return {(r["method"], r["n"]): r["accuracy"] for r in records}


def test_no_picker_beats_pass_at_n_and_the_truth_reaches_it() -> None:
    asked = candidates(80)
    pickers: dict[str, Any] = {
        "truth": ScoreSelector(Truth()), "noisy": ScoreSelector(Truth(1.0)),
        "duels": PairwiseSelector(FakeJudge("oracle", lambda s, r: valid_output(1 if s.first.startswith("yes") else 2))),
        "places": PairwiseSelector(fake_judge("always-first", {})),
    }  # fmt: skip
    found = table(best_of_n(asked, pickers, (1, 2, 4, 8)))
    for n in (1, 2, 4, 8):
        assert found["truth", n] == found["pass", n]
        assert found["duels", n] == pytest.approx(found["pass", n], abs=1e-12)
        assert found["random", n] - 0.06 <= found["noisy", n] <= found["pass", n]
        assert abs(found["places", n] - found["random", n]) < 0.1  # ties in both orders: the first of a random draw stays
    assert all(found[m, 1] == found["pass", 1] for m in ("majority", "random", *pickers))


def test_curves_are_the_exact_ones_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """pass@n is 1 - C(wrong, n) / C(all, n); what random picks is the share of right answers."""
    asked = candidates(60)
    monkeypatch.setattr("ramet.benchmarks.evaluation.best_of_n.DRAWS", 300)
    found = table(best_of_n(asked, {}, (1, 2, 4, 8)))
    for n in (1, 2, 4, 8):
        exact = np.mean([1 - math.comb(8 - sum(q.right), n) / math.comb(8, n) for q in asked])
        assert found["pass", n] == pytest.approx(exact, abs=0.01)
        assert found["random", n] == pytest.approx(np.mean([sum(q.right) / 8 for q in asked]), abs=0.01)


def test_calls_are_counted_and_nothing_is_asked_twice() -> None:
    asked = candidates(5)
    scores, knock, robin = (
        ScoreSelector(Truth()),
        PairwiseSelector(fake_judge("random", {}), k=3),
        PairwiseSelector(fake_judge("random", {}), "round-robin"),
    )
    best_of_n(asked, {"s": scores, "k": knock, "r": robin}, (8,))
    assert scores.calls == 5 * scores.cost(8) == 5 * 8
    assert knock.calls == 5 * knock.cost(8) == 5 * 7 * 2 * 3
    assert robin.calls == 5 * robin.cost(8) == 5 * 28 * 2
    best_of_n(asked, {"r": robin}, (8,))
    assert robin.calls == 5 * 28 * 2
    alike = CandidateAnswers("a", None, "q", ("x", "x"), ("x", "x"), (True, True))
    picker = PairwiseSelector(fake_judge("raising", {}))
    assert picker(alike, [0, 1]) == 0
    assert picker.calls == 0
    with pytest.raises(ConfigError, match="a question has 2"):
        best_of_n([alike], {}, (4,))


def test_a_question_whose_video_cannot_be_read_is_left_out_for_every_method() -> None:
    """And the others count as they do without it."""
    asked = candidates(12)

    class Blinking(Truth):
        def score(self, items: Any) -> list[float]:
            if items[0].video == asked[4].video:
                raise TaskError("v2 cannot be read")
            return super().score(items)

    found = best_of_n(asked, {"truth": ScoreSelector(Blinking())}, (1, 4))
    rest = best_of_n([q for q in asked if q.video != asked[4].video], {"truth": ScoreSelector(Truth())}, (1, 4))
    assert {(r["questions"], r["unreadable"]) for r in found} == {(10, 2)}
    assert [r | {"unreadable": 0} for r in found] == rest
    with pytest.raises(TaskError, match="v2 cannot be read"):
        best_of_n(asked[4:6], {"truth": ScoreSelector(Blinking())}, (1, 4))


def test_round_robin_counts_wins() -> None:
    """0 beats 1, 1 beats 2, 2 beats 0, all beat 3: a circle, decided by the order of the draw."""
    beats = {("0", "1"), ("1", "2"), ("2", "0"), ("0", "3"), ("1", "3"), ("2", "3")}
    judge = FakeJudge("circle", lambda s, r: valid_output(1 if (s.first, s.second) in beats else 2))
    question = CandidateAnswers("q", None, "q", ("0", "1", "2", "3"), ("0", "1", "2", "3"), (True, False, False, False))
    picker = PairwiseSelector(judge, "round-robin")
    assert [picker(question, draw) for draw in ([3, 1, 2, 0], [0, 3], [2, 0], [1, 0])] == [1, 0, 2, 0]


def test_temperature_is_that_which_made_the_preferences() -> None:
    """Scores whose odds are off by a factor: the factor is found, and the calibration error goes away."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    signs = np.where(rng.random(len(logits)) < 1 / (1 + np.exp(-logits)), 1, -1)
    difference = signs * logits * 3  # of the preferred over the other, three times too sure
    assert fitted_temperature(difference) == pytest.approx(3, rel=0.05)
    assert expected_error(difference / 3) < 0.01 < 0.05 < expected_error(difference)
    grid = np.exp(np.linspace(-4, 4, 4001))
    sure = 2001 / 2002
    losses = [(sure * np.logaddexp(0, -z) + (1 - sure) * np.logaddexp(0, z)).mean() for z in (difference[:2000] / t for t in grid)]
    exact = grid[np.argmin(losses)]
    assert fitted_temperature(difference[:2000]) == pytest.approx(exact, rel=0.005)


def test_pairs_that_are_all_right_do_not_make_odds_certain() -> None:
    """151 of 152 is what 150 of 150 are taken for."""
    assert 1 / (1 + np.exp(-3.0 / fitted_temperature(np.full(150, 3.0)))) == pytest.approx(151 / 152, abs=1e-3)


def test_calibration_error_of_few_pairs_by_hand() -> None:
    assert expected_error(np.array([0.0, 0.0])) == 0.0  # half right, half sure
    sure = np.log(9.0)  # 0.9
    assert expected_error(np.array([sure, sure, -sure, sure])) == pytest.approx(0.15)
    found = calibrate([2.0, 3.0], [0.0, 1.0], [(5, 2), (9, 1)])
    assert found.centre == pytest.approx(1.5)
    assert found.length_correlation == pytest.approx(rank_correlation([5, 2, 9, 1], [2, 0, 3, 1]))
    with pytest.raises(RewardError, match="at least two held-out pairs"):
        calibrate([1.0], [0.0], [(1, 1)])


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [3, 2, 1]) == 0
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 40).tolist(), rng.integers(0, 6, 40).tolist()
    ranks = [[sum(y < x for y in v) + (sum(y == x for y in v) - 1) / 2 for x in v] for v in (a, b)]
    assert rank_correlation(a, b) == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))


def test_intervals_over_clusters_are_wider_than_over_pairs() -> None:
    rng = random.Random(0)
    right = {c: float(rng.random() < 0.6) for c in range(60)}
    values, clusters = [right[c] for c in range(60) for _ in range(10)], [str(c) for c in range(60) for _ in range(10)]
    clustered = clustered_mean(values, clusters)
    single = clustered_mean(values, [str(n) for n in range(600)])
    assert clustered.mean == single.mean == sum(values) / 600
    assert clustered.high - clustered.low == pytest.approx((single.high - single.low) * math.sqrt(10), rel=0.15)
    sure = clustered_mean([1.0] * 40, [str(n // 4) for n in range(40)])
    assert (sure.mean, sure.high, sure.n) == (1.0, pytest.approx(1.0), 10)
    assert 0.6 < sure.low < 0.8


def test_the_interval_of_a_small_case_is_that_of_all_its_bootstraps() -> None:
    """As many standard errors of the enumerated bootstrap as t with clusters - 1 has; differences, so that it is symmetric."""
    values, clusters = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, -1.0, 0.0], list("aabbcdef")
    sums = {c: sum(v for v, own in zip(values, clusters, strict=True) if own == c) for c in "abcdef"}
    every = [sum(sums[c] for c in draw) / sum(clusters.count(c) for c in draw) for draw in itertools.product(sums, repeat=6)]
    found = clustered_mean(values, clusters, differences=True)
    spread = float(np.std(every)) * math.sqrt(6 / 5)
    assert clustered_mean([1.0, 0.0, 0.0, 0.0, 0.0], "abcde", differences=True).low < 0  # none is negative, and one win shows nothing
    assert found.mean == 0.25 and (found.high - found.low) / 2 == pytest.approx(2.5706 * spread, rel=0.1)
