"""Merging attention computed over disjoint sets of keys into attention over their union, by log-sum-exp.

This is the online softmax of FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.1), applied across ranks: each part is
weighted by the share of its sum of exponentials in the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PartialAttention(NamedTuple):
    """Attention over a subset of the keys.

    out  the output [.., Tq, D], normalised over the subset
    lse  the logarithm of the sum of exponentials [.., Tq] that normalised it, in float32 or float64; -inf for a subset without keys
    """

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[PartialAttention]) -> PartialAttention:
    """Attention over the union of the parts' keys, which must be disjoint. All parts have the same shapes.

    The sum is computed in float32 (float64 for float64 parts) and in the order of `parts`, so that the same parts give bitwise the
    same result on every rank. A part whose lse is -inf contributes nothing; if all are, the result is out 0 and lse -inf.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    weights = torch.nan_to_num(lse.softmax(0), nan=0.0).unsqueeze(-1)
    out = weights[0] * parts[0].out
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = out.addcmul_(weight, part.out.to(out.dtype))
    return PartialAttention(out.to(parts[0].out.dtype), lse.logsumexp(0))
