"""Are a model's scores odds? Temperature, calibration error, and whether length alone explains a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ramet.errors import RewardError


@dataclass(frozen=True)
class Calibration:
    """Of differences of scores (chosen less rejected) on held-out pairs.

    temperature       by which differences are divided so that their sigmoid is likeliest to give the preferences
    ece, ece_before   expected calibration error after and before, in [0, 1]
    centre            middle of the scores of chosen and rejected answers
    length_correlation  Spearman's, of an answer's length and its score
    """

    temperature: float
    ece: float
    ece_before: float
    centre: float
    length_correlation: float
    n: int


def calibrate(chosen: Sequence[float], rejected: Sequence[float], lengths: Sequence[tuple[int, int]]) -> Calibration:
    """`lengths` are those of the chosen and the rejected answer. Raises `RewardError` for too few pairs."""
    if len(chosen) < 2 or not len(chosen) == len(rejected) == len(lengths):
        raise RewardError(f"calibration needs two held-out pairs at least (got {len(chosen)})")
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
    """The temperature in [1/64, 64] with the least mean log-loss of sigmoid(difference / temperature), to a thousandth of its logarithm.

    Preferences count as (n + 1) / (n + 2) sure (Platt's smoothing): otherwise pairs that are all right would ask for a temperature of 0.
    """
    sure = (len(difference) + 1) / (len(difference) + 2)
    low, high = -np.log(64), np.log(64)
    for _ in range(4):  # the loss is unimodal in the temperature
        grid = np.linspace(low, high, 65)
        scaled = [difference / np.exp(g) for g in grid]
        losses = [float((sure * np.logaddexp(0, -z) + (1 - sure) * np.logaddexp(0, z)).mean()) for z in scaled]
        best = int(np.argmin(losses))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 64)]
    return float(np.exp((low + high) / 2))


def expected_error(logits: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the model's confidence in its own preference against how often it is right, in equal bins."""
    right = np.where(logits == 0, 0.5, logits > 0)
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(logits), 700)))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return float(sum(abs(right[place == b].mean() - confidence[place == b].mean()) * (place == b).mean() for b in set(place.tolist())))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    ranks = [_ranks(np.asarray(x, dtype=np.float64)) for x in (a, b)]
    if min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
