"""Training retaining heads: each learns which keys the question that follows a context will attend to.

The default schedule is the one published for APB (arXiv 2502.12085): 3,000 steps of AdamW at 5e-4 with 300 steps of warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ramet.attention.hf import recorded
from ramet.attention.retaining import RetainingHeads, loss, targets, unrotated


def train_heads(
    model: Any,
    heads: RetainingHeads,
    samples: Iterable[tuple[list[int], int]],
    steps: int = 3000,
    rate: float = 5e-4,
    warmup: int = 300,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the heads of all layers, one sample per step. Returns each step's loss, averaged over layers.

    samples  token ids of a context followed by a question, and the number of ids that belong to the question
    steps    most steps; training also ends with the samples
    rate     peak learning rate
    warmup   steps over which the learning rate rises linearly
    report   called with the number of the step, from 1, and its loss
    """
    optimiser = torch.optim.AdamW(heads.parameters(), lr=rate, betas=(0.9, 0.95))
    losses: list[float] = []
    for step, (ids, query) in zip(range(steps), samples, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(warmup, 1))
        layers, (cos, sin) = recorded(model, ids)
        context, total = len(ids) - query, torch.zeros(())
        for layer, (q, k, v) in enumerate(layers):
            plain_q, plain_k = (unrotated(x[:, :context], cos[:context], sin[:context]) for x in (q, k))
            scores = heads.scores(layer, plain_q, plain_k, v[:, :context])
            total = total + loss(scores, targets(q[:, context:], k[:, :context]).to(scores.dtype))
        optimiser.zero_grad()
        (total / len(layers)).backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 0.5)
        optimiser.step()
        losses.append(total.item() / len(layers))
        if report is not None:
            report(step + 1, losses[-1])
    return losses
