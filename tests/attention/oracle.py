"""The slow exact version: dense attention in float64 under a mask that is written down row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.attention.anchored import Selections
from ramet.attention.plan import BlockPlan


def tensors(seed: int, heads: int, kv_heads: int, rows: int, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(h, rows, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask [Hk, Tq, Tk] of what may be seen."""
    group = q.shape[0] // k.shape[0]
    scores = q @ k.repeat_interleave(group, 0).transpose(-1, -2) * scale
    scores = scores.masked_fill(~mask.repeat_interleave(group, 0), -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v.repeat_interleave(group, 0)


def causal(rows: int) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril()


def spava_mask(plan: BlockPlan, selections: Selections, kv_heads: int) -> Tensor:
    """[Hk, N, N] of section 1.8, for plans whose anchor is part of the sequence."""
    n, total = plan.context, plan.length
    mask = torch.zeros(kv_heads, total, total, dtype=torch.bool)
    mask[:, : plan.anchor, : plan.anchor] = causal(plan.anchor)
    for virtual, (start, stop) in enumerate(plan.blocks):
        mask[:, start:stop, : plan.anchor] = True
        mask[:, start:stop, start:stop] = causal(stop - start)
        for earlier in range(virtual):
            for head in range(kv_heads):
                if earlier in selections.rows:
                    mask[head, start:stop, selections.rows[earlier][head]] = True
    mask[:, n:, :n] = True
    mask[:, n:, n:] = causal(plan.query)
    return mask
