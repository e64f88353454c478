"""APB's retaining heads: small networks that predict which keys will matter, without knowing the question.

One head per layer maps the query, key and value of a row, before rotation, to one score per KV head: [Q, K, V] -> 1024 -> KV heads (APB,
Huang et al. 2025, arXiv 2502.12085; the heads are those of Locret, Huang et al. 2024). The target of a row is the largest attention score
that any row of the question gives it. The loss is smooth L1 plus a penalty on differences between neighbouring rows. The model's own
weights do not change.

    heads = RetainingHeads.for_model(model)
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
"""Hidden units of a head."""
SMOOTHNESS = 0.0025
"""Weight of the squared difference between neighbouring rows' scores in the loss."""


class RetainingHeads(nn.Module):
    """Retaining heads for all layers of a decoder, one two-layer network each.

    layers    decoder layers
    heads     query heads
    kv_heads  key-value heads, each of which gets a score
    head      dimension of one attention head
    width     hidden units
    """

    def __init__(self, layers: int, heads: int, kv_heads: int, head: int, width: int = WIDTH) -> None:
        super().__init__()
        inner = (heads + 2 * kv_heads) * head
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, kv_heads)) for _ in range(layers))

    @classmethod
    def for_model(cls, model: Any, width: int = WIDTH) -> RetainingHeads:
        """Untrained heads with the dimensions of a Hugging Face decoder."""
        config = model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head, width)

    def scores(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores [Hk, T] in layer `layer` for rows q [Hq, T, D], k and v [Hk, T, D] before rotation."""
        rows = torch.cat([x.transpose(0, 1).flatten(1) for x in (q, k, v)], -1)
        out: Tensor = self.layers[layer](rows.to(next(self.parameters()).dtype))
        return out.transpose(0, 1)

    def save(self, path: Path) -> None:
        """Write the weights to a safetensors file."""
        save_file(self.state_dict(), path)

    def load(self, path: Path) -> None:
        """Load weights that `save` wrote. Raises `CheckpointError` if they cannot be read or do not fit this model."""
        try:
            self.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"retaining heads in {path} do not fit this model: {first_line(error)}") from error


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo rotary embedding: x [H, T, D] before its rotation by cos and sin [T, D], as the model's rotary module returns them."""
    half = x.shape[-1] // 2
    rotated_half = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cos - rotated_half * sin) / (cos.square() + sin.square())


def targets(q: Tensor, k: Tensor) -> Tensor:
    """Targets [Hk, T] for keys k [Hk, T, D]: the largest scaled dot product with any row of the question, q [Hq, Tq, D], in the group."""
    grouped = q.reshape(k.shape[0], -1, q.shape[-1])
    largest: Tensor = (grouped @ k.transpose(-1, -2)).amax(1)
    return largest / math.sqrt(q.shape[-1])


def loss(scores: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 loss of scores [Hk, T] against `target` [Hk, T], plus the penalty on differences between neighbouring rows."""
    roughness: Tensor = SMOOTHNESS * (scores[:, 1:] - scores[:, :-1]).square().mean()
    return F.smooth_l1_loss(scores, target) + roughness
