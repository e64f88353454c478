"""Uncertainty of accuracies and of their differences, clustered by task.

Samples of one task are not independent; tasks are. Intervals are therefore over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval over `n` tasks."""

    mean: float
    low: float
    high: float
    n: int


def accuracy_interval(scores: Mapping[str, Sequence[float]]) -> Interval:
    """Mean score with a Wilson interval at the effective sample size.

    `scores` maps a task to its samples' scores in [0, 1]. The effective size is that at which a
    binomial of this mean would have the variance that the task means have; with no variance (all right
    or all wrong) it is the number of tasks, so that 100 of 100 is not reported as certain.
    """
    if not scores:
        raise ValueError("no tasks")
    means = np.array([np.mean(s) for s in scores.values()], dtype=np.float64)
    n, p = len(means), float(means.mean())
    effective = float(n)
    if n > 1:
        variance = float(means.var(ddof=1)) / n
        if variance > 0 and 0 < p < 1:
            effective = p * (1 - p) / variance
    centre = (p + Z95**2 / (2 * effective)) / (1 + Z95**2 / effective)
    half = Z95 / (1 + Z95**2 / effective) * np.sqrt(p * (1 - p) / effective + Z95**2 / (4 * effective**2))
    return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), n)


def sign_test(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> float:
    """Two-sided exact sign test over the tasks on which a and b differ (McNemar's test where a task has one sample).

    A bootstrap of few discordant tasks excludes zero too easily: four wins against none are p = 0.125.
    """
    signs = [np.sign(np.mean(a[t]) - np.mean(b[t])) for t in set(a) & set(b)]
    wins, losses = signs.count(1), signs.count(-1)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Mean of a - b over the tasks that both have, with a percentile bootstrap over tasks."""
    common = sorted(set(a) & set(b))
    if not common:
        raise ValueError("the two have no task in common")
    differences = np.array([np.mean(a[t]) - np.mean(b[t]) for t in common], dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(common), size=(resamples, len(common)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high), len(common))


def clustered_mean(values: Sequence[float], clusters: Sequence[str], seed: int = 0, resamples: int = 4000) -> Interval:
    """Mean of `values` with a percentile bootstrap over whole clusters; `n` is their number.

    Where all values agree a bootstrap knows no doubt: there, a Wilson interval over the clusters.
    """
    names = {name: n for n, name in enumerate(dict.fromkeys(clusters))}
    if not names:
        raise ValueError("no values")
    where = np.array([names[c] for c in clusters])
    sums = np.bincount(where, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(where).astype(np.float64)
    mean, n = float(sums.sum() / sizes.sum()), len(names)
    if len(set(values)) == 1:
        return accuracy_interval({name: [values[0]] for name in names}) if 0 <= mean <= 1 else Interval(mean, mean, mean, n)
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    low, high = np.quantile(sums[draws].sum(axis=1) / sizes[draws].sum(axis=1), [0.025, 0.975])
    return Interval(mean, float(low), float(high), n)
