"""APB's retaining heads: small networks that say which keys will matter, before any question is known.

One head a layer maps a row's query, key and value, before rotation, to a score per KV head (specification, section 1.12):
[Q, K, V] -> 1024 -> KV heads. They are trained on the largest score that any question row gives a row, by Locret's recipe:
smooth L1, and a small price on jumps between neighbours. The model's own weights stay as they are.

    heads = RetainingHeads.of(model)
    losses = train_heads(model, heads, samples, steps=3000)
    prefill(model, group, Method("apb"), ..., heads=heads)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ramet.errors import CheckpointError, first_line

WIDTH = 1024
SMOOTHNESS = 0.0025
"""Price on the squared difference of neighbouring rows' scores."""


class RetainingHeads(nn.Module):
    """One head a layer."""

    def __init__(self, layers: int, heads: int, kv_heads: int, head: int, width: int = WIDTH) -> None:
        super().__init__()
        inner = (heads + 2 * kv_heads) * head
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, kv_heads)) for _ in range(layers))

    @classmethod
    def of(cls, model: Any, width: int = WIDTH) -> RetainingHeads:
        """Untrained heads for a decoder."""
        config = model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head, width)

    def scores(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[Hk, T] for rows q [Hq, T, D], k and v [Hk, T, D] before rotation."""
        rows = torch.cat([x.transpose(0, 1).flatten(1) for x in (q, k, v)], -1)
        out: Tensor = self.layers[layer](rows.to(next(self.parameters()).dtype))
        return out.transpose(0, 1)

    def save(self, path: Path) -> None:
        save_file(self.state_dict(), path)

    def load(self, path: Path) -> None:
        """Raises `CheckpointError` for what does not fit."""
        try:
            self.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"retaining heads in {path} do not fit this model: {first_line(error)}") from error


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [H, T, D] before rotary embedding; cos and sin [T, D] as the model's rotary module gives them."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cos - turned * sin) / (cos.square() + sin.square())


def targets(q: Tensor, k: Tensor) -> Tensor:
    """[Hk, T]: the largest scaled score of question rows q [Hq, Tq, D], of all heads of the group, for keys k [Hk, T, D]."""
    grouped = q.reshape(k.shape[0], -1, q.shape[-1])
    largest: Tensor = (grouped @ k.transpose(-1, -2)).amax(1)
    return largest / math.sqrt(q.shape[-1])


def loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 to `wanted`, and smoothness along the rows; both [Hk, T]."""
    jumps: Tensor = SMOOTHNESS * (scores[:, 1:] - scores[:, :-1]).square().mean()
    return F.smooth_l1_loss(scores, wanted) + jumps
