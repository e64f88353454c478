"""Which rows of a block are passed on: per KV head, by what the query looks for (specification, section 1.6)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.attention.kernels import wide
from ramet.errors import ConfigError

POOL = 5

# Queries [Hq, Tq, D] and the rotated keys of a block [Hk, T, D] to scores [Hk, T]; higher is passed on.
Scorer = Callable[[Tensor, Tensor], Tensor]


def mean_scores(q: Tensor, k: Tensor) -> Tensor:
    """k . mean of the query rows and of the KV head's query heads: one matrix-vector product a head, in float32."""
    mean = q.reshape(k.shape[0], -1, q.shape[-1]).mean(1, dtype=wide(q))
    return torch.einsum("htd,hd->ht", k.to(mean.dtype), mean)


def max_scores(q: Tensor, k: Tensor) -> Tensor:
    """The largest dot product of any query row and head of the group."""
    return _dots(q, k).amax(1)


def softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """The mean attention probability inside the block."""
    return (_dots(q, k) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)


def recency(q: Tensor, k: Tensor) -> Tensor:
    """The last rows of the block, whatever they say."""
    return torch.arange(k.shape[1], device=k.device, dtype=torch.float32).expand(k.shape[:2])


def random_scores(q: Tensor, k: Tensor) -> Tensor:
    """Any rows, drawn from a generator seeded by the block's size: the same in every run."""
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
    try:
        return SCORERS[name]
    except KeyError:
        raise ConfigError(f"unknown scorer {name!r}; there are {', '.join(SCORERS)}") from None


def pooled(scores: Tensor) -> Tensor:
    """The largest of each row's neighbourhood of five, inside the block: what is passed on comes in runs."""
    return F.max_pool1d(scores[None], POOL, 1, POOL // 2)[0] if scores.shape[-1] else scores


def top(scores: Tensor, count: int) -> Tensor:
    """Indices [Hk, count] of the highest scores in the order of the sequence; of equal ones the earlier rows."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return best.sort(-1).values


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x [Hk, T, D] at index [Hk, k] -> [Hk, k, D]."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))


def _dots(q: Tensor, k: Tensor) -> Tensor:
    grouped = q.reshape(k.shape[0], -1, q.shape[-1]).to(wide(q))
    return grouped @ k.to(wide(q)).transpose(-1, -2)
