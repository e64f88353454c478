"""Uncertainty of accuracies and of their differences, clustered by task.

Samples of one task are not independent; tasks are. Intervals are therefore over tasks, with the t quantile of tasks - 1 degrees of
freedom: at 16 tasks 2.13 standard errors, not 1.96. What is compared at several budgets is corrected for their number (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval over `n` tasks."""

    mean: float
    low: float
    high: float
    n: int


def quantile(n: int) -> float:
    """How many standard errors a 95% interval of `n` independent values reaches to either side: the quantile of t with n - 1."""
    from scipy.stats import t  # half a second

    return float(t.ppf(0.975, n - 1)) if n > 1 else math.inf


def wilson(p: float, variance: float, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) around a mean `p` in [0, 1] of `n` values, where the mean has this variance.

    Its effective size is that at which a binomial would have the variance; with none (all right or all wrong) it is `n`, so that
    100 of 100 is not reported as certain. One value says nothing: (0, 1).
    """
    if n < 2:
        return 0.0, 1.0
    square = quantile(n) ** 2
    effective = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else float(n)
    centre = (p + square / (2 * effective)) / (1 + square / effective)
    half = math.sqrt(square * (p * (1 - p) / effective + square / (4 * effective**2))) / (1 + square / effective)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_interval(scores: Mapping[str, Sequence[float]]) -> Interval:
    """Mean over tasks of their mean scores, with a Wilson interval at the effective sample size.

    `scores` maps a task to its samples' scores. Where some are beyond [0, 1], as a reward of the user's may be, the interval is t's.
    """
    if not scores:
        raise ValueError("no tasks")
    means = np.array([np.mean(s) for s in scores.values()], dtype=np.float64)
    n, p = len(means), float(means.mean())
    if not _are_shares(scores):
        return mean_interval(means.tolist()) if n > 1 else Interval(p, min(p, 0.0), max(p, 1.0), n)
    low, high = wilson(p, float(means.var(ddof=1)) / n if n > 1 else 0.0, n)
    return Interval(p, low, high, n)


def _are_shares(scores: Mapping[str, Sequence[float]]) -> bool:
    return all(0 <= score <= 1 for task in scores.values() for score in task)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number: with no difference anywhere, the least of them is below 0.05 in at most 5% of cases.

    Holm (1979): the k-th smallest of m is multiplied by m - k + 1, and none gets less than a smaller one.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = least
    return corrected


def sign_test(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> float:
    """Two-sided exact sign test over the tasks on which a and b differ (McNemar's test where a task has one sample).

    A bootstrap of few discordant tasks excludes zero too easily: four wins against none are p = 0.125.
    """
    signs = [np.sign(_difference(a[t], b[t])) for t in set(a) & set(b)]
    wins, losses = signs.count(1), signs.count(-1)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return float(min(1.0, 2 * tail))


def paired_difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Interval:
    """Mean of a - b over the tasks that both have, with a t interval over tasks, within [-1, 1] where scores are in [0, 1]."""
    common = sorted(set(a) & set(b))
    if not common:
        raise ValueError("the two have no task in common")
    differences = [_difference(a[t], b[t]) for t in common]
    beyond = max(1.0, *map(abs, differences)) if len(differences) == 1 else math.inf
    return mean_interval(differences, 1.0 if _are_shares(a) and _are_shares(b) else beyond)


def _difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the means; what only comes from the order of adding is none."""
    return round(float(np.mean(a) - np.mean(b)), 12)


def mean_interval(values: Sequence[float], limit: float = math.inf) -> Interval:
    """Mean of independent values, of tasks or of seeds, none beyond +-`limit`, with a t interval.

    The interval around a single value is as wide as it can be.
    """
    n, mean = len(values), float(np.mean(values))
    half = quantile(n) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, max(-limit, mean - half), min(limit, mean + half), n)


def clustered_mean(values: Sequence[float], clusters: Sequence[str], differences: bool = False) -> Interval:
    """Mean of scores in [0, 1], or `differences` of them, of which those of one cluster belong together; `n`: the number of clusters.

    The variance is that of the ratio of the clusters' sums to their sizes. Scores get Wilson's interval, differences a t interval.
    """
    names = {name: n for n, name in enumerate(dict.fromkeys(clusters))}
    if not names:
        raise ValueError("no values")
    where, array, n = np.array([names[c] for c in clusters]), np.asarray(values, dtype=np.float64), len(names)
    mean = float(array.mean())
    residuals = np.bincount(where, weights=array - mean)
    variance = float((residuals**2).sum()) * n / (n - 1) / len(array) ** 2 if n > 1 else 0.0
    if not differences:
        return Interval(mean, *wilson(mean, variance, n), n)
    half = quantile(n) * math.sqrt(variance) if n > 1 else math.inf
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half), n)
