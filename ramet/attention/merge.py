"""One attention out of partial ones: parts weigh as their sums of exponentials (specification, section 1.9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PartialAttention(NamedTuple):
    """Attention on a part of the keys: its output and the log of the sum of exponentials that normalised it."""

    out: Tensor
    lse: Tensor


def merge(parts: Sequence[PartialAttention]) -> PartialAttention:
    """Attention on the union of the parts' keys; the parts' keys must be disjoint.

    Computed in float32 (float64 for float64 parts) and in the order given, so that equal parts merge to equal bits on
    every rank. A part with lse -inf has no keys and adds nothing; all such gives out 0, lse -inf.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    weights = torch.nan_to_num(lse.softmax(0), nan=0.0).unsqueeze(-1)
    out = weights[0] * parts[0].out
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = out.addcmul_(weight, part.out.to(out.dtype))
    return PartialAttention(out.to(parts[0].out.dtype), lse.logsumexp(0))
