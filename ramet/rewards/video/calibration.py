"""Calibration of a model's scores on held-out pairs: temperature, calibration error, and how far length alone explains a score.

See Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599: temperature scaling (section 4.2) and the expected
calibration error (section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ramet.errors import RewardError


@dataclass(frozen=True)
class Calibration:
    """Calibration of score differences, chosen minus rejected, on held-out pairs.

    temperature         the divisor of differences under which their sigmoid gives the preferences the highest likelihood
    ece, ece_before     expected calibration error with and without the temperature, in [0, 1]
    centre              mean of the median score of chosen and that of rejected answers
    length_correlation  Spearman's rank correlation between the length of an answer and its score
    n                   number of pairs
    """

    temperature: float
    ece: float
    ece_before: float
    centre: float
    length_correlation: float
    n: int


def calibrate(chosen: Sequence[float], rejected: Sequence[float], lengths: Sequence[tuple[int, int]]) -> Calibration:
    """Calibrate the scores of n pairs.

    chosen, rejected  scores of the two answers of each pair
    lengths           lengths of the chosen and the rejected answer of each pair, in any one unit

    Raises `RewardError` for fewer than two pairs, or arguments of different lengths.
    """
    if len(chosen) < 2 or not len(chosen) == len(rejected) == len(lengths):
        raise RewardError(f"calibration needs at least two held-out pairs (got {len(chosen)})")
    good, bad = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    difference = good - bad
    temperature = fitted_temperature(difference)
    return Calibration(
        temperature,
        expected_error(difference / temperature),
        expected_error(difference),
        float(np.median(good) + np.median(bad)) / 2,
        rank_correlation([n for pair in lengths for n in pair], [s for pair in zip(chosen, rejected, strict=True) for s in pair]),
        len(chosen),
    )


def fitted_temperature(difference: np.ndarray) -> float:
    """The temperature in [1/64, 64] that minimises the mean log loss of sigmoid(difference / temperature), for differences [n].

    Its logarithm is accurate to a thousandth. The target probability of a preference is (n + 1) / (n + 2), as in Platt scaling (Platt
    1999): with 1, pairs that the model all gets right would drive the temperature to 0.
    """
    target = (len(difference) + 1) / (len(difference) + 2)
    low, high = -np.log(64), np.log(64)
    for _ in range(4):  # the loss is unimodal in the temperature
        grid = np.linspace(low, high, 65)
        scaled = [difference / np.exp(g) for g in grid]
        losses = [float((target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z)).mean()) for z in scaled]
        best = int(np.argmin(losses))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 64)]
    return float(np.exp((low + high) / 2))


def expected_error(logits: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error, in [0, 1], of the preferences whose log-odds are `logits` [n], in bins of equal width.

    Confidence is the probability of the answer that the model prefers, and accuracy the share of pairs in which that is the chosen one.
    """
    right = np.where(logits == 0, 0.5, logits > 0)
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(logits), 700)))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return float(sum(abs(right[place == b].mean() - confidence[place == b].mean()) * (place == b).mean() for b in set(place.tolist())))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1]; 0 where one of the sequences is constant."""
    ranks = [_ranks(np.asarray(x, dtype=np.float64)) for x in (a, b)]
    if min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
