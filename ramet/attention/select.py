"""Selecting the rows of a block that are passed to later blocks, for each KV head, by their relevance to the query.

The default score is that of Spava (Huang et al. 2026, arXiv 2601.21444): the dot product of a rotated key with the mean of the query's
rows and of the query heads that share the KV head, smoothed by a max pool. The other scorers are for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.attention.kernels import wide
from ramet.errors import ConfigError

POOL = 5
"""Width of the max pool over neighbouring rows' scores, in rows."""

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Maps the query's rows [Hq, Tq, D] and the keys of a block [Hk, T, D], both rotated, to scores [Hk, T]. The highest are passed on."""


def mean_scores(q: Tensor, k: Tensor) -> Tensor:
    """Dot product of each key with the mean query of its group: one matrix-vector product per KV head, in float32 or wider."""
    mean = q.reshape(k.shape[0], -1, q.shape[-1]).mean(1, dtype=wide(q))
    return torch.einsum("htd,hd->ht", k.to(mean.dtype), mean)


def max_scores(q: Tensor, k: Tensor) -> Tensor:
    """The largest dot product of each key with any query row of any head in its group."""
    return _dots(q, k).amax(1)


def softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """The mean attention probability of each key, where the softmax is taken within the block."""
    return (_dots(q, k) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)


def recency(q: Tensor, k: Tensor) -> Tensor:
    """The row's index, so that the last rows of the block are selected whatever they hold. A baseline."""
    return torch.arange(k.shape[1], device=k.device, dtype=torch.float32).expand(k.shape[:2])


def random_scores(q: Tensor, k: Tensor) -> Tensor:
    """Uniform random scores from a generator seeded with the block's size, and so the same in every run. A baseline."""
    generator = torch.Generator().manual_seed(k.shape[1])
    return torch.rand(k.shape[:2], generator=generator).to(k.device)


SCORERS: dict[str, Scorer] = {
    "mean": mean_scores,
    "max": max_scores,
    "softmax": softmax_scores,
    "recency": recency,
    "random": random_scores,
}


def scorer(name: str) -> Scorer:
    """The scorer called `name` in `SCORERS`. Raises `ConfigError`, listing the names, for any other."""
    try:
        return SCORERS[name]
    except KeyError:
        raise ConfigError(f"unknown scorer {name!r}; choose one of {', '.join(SCORERS)}") from None


def pooled(scores: Tensor) -> Tensor:
    """Scores [Hk, T] max-pooled over windows of `POOL` rows within the block, so that runs of neighbouring rows are selected."""
    return F.max_pool1d(scores[None], POOL, 1, POOL // 2)[0] if scores.shape[-1] else scores


def top(scores: Tensor, count: int) -> Tensor:
    """Indices [Hk, count] of the highest of scores [Hk, T], in ascending order. Ties go to the earlier row."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return best.sort(-1).values


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows [Hk, k, D] of x [Hk, T, D] at `index` [Hk, k], chosen for each head separately."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))


def _dots(q: Tensor, k: Tensor) -> Tensor:
    """Dot products [Hk, g Tq, T] of all query rows of each group with the keys of its KV head, in float32 or wider."""
    grouped = q.reshape(k.shape[0], -1, q.shape[-1]).to(wide(q))
    return grouped @ k.to(wide(q)).transpose(-1, -2)
