"""Retaining heads learn, without a question, what questions will look for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ramet.attention import retaining
from ramet.attention.anchored import Selections
from ramet.attention.comm import simulated
from ramet.attention.hf import attach, prefill, recorded
from ramet.attention.methods import Method
from ramet.attention.retaining import RetainingHeads, targets, unrotated
from ramet.attention.train_heads import train_heads
from ramet.errors import CheckpointError
from tests.attention.test_hf import ids, tiny


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rotation_is_undone_exactly(kind: str) -> None:
    """Against the states before rotation: at position 0 nothing is rotated, so a text of one repeated token shows them."""
    model = tiny(kind)
    attach(model)
    layers, (cos, sin) = recorded(model, [5] * 9)
    q, k, _ = layers[0]
    for rotated in (q, k):
        plain = unrotated(rotated, cos, sin)
        assert (plain - rotated[:, :1]).abs().max() < 1e-5


def test_targets_are_the_largest_scores() -> None:
    q, k = torch.randn(4, 3, 8), torch.randn(2, 10, 8)
    dots = torch.einsum("hqd,htd->hqt", q, k.repeat_interleave(2, 0)) / 8**0.5
    assert torch.allclose(targets(q, k), dots.view(2, 6, 10).amax(1))


def recall(model: object, heads: RetainingHeads, seed: int, kept: int = 10) -> float:
    """The share of the rows that the question scores highest which the heads' highest hold."""
    layers, (cos, sin) = recorded(model, ids(seed, 60))
    shares: list[Tensor] = []
    for layer, (q, k, v) in enumerate(layers):
        wanted = targets(q[:, 50:], k[:, :50]).topk(kept).indices
        plain = [unrotated(x[:, :50], cos[:50], sin[:50]) for x in (q, k)]
        got = heads.scores(layer, *plain, v[:, :50]).topk(kept).indices
        shares += [torch.isin(g, w).float().mean() for g, w in zip(got, wanted, strict=True)]
    return float(torch.stack(shares).mean())


def test_heads_learn_and_are_used(tmp_path: Path) -> None:
    model = tiny()
    attach(model)
    torch.manual_seed(0)
    heads = RetainingHeads.for_model(model, width=32)
    before = sum(recall(model, heads, seed) for seed in range(100, 110)) / 10
    losses = train_heads(model, heads, ((ids(seed, 60), 10) for seed in range(10_000)), steps=150, rate=5e-3, warmup=10)
    after = sum(recall(model, heads, seed) for seed in range(100, 110)) / 10
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert before < 0.35 < after, "chance is 0.2"
    selections, other = ([[Selections() for _ in range(3)]] for _ in range(2))
    method = Method("apb", anchor=4, passing=3)
    simulated(3, lambda group: prefill(model, group, method, [ids(1, 60)], [6], selections=selections, heads=heads))
    simulated(3, lambda group: prefill(model, group, method, [ids(1, 60)], [6], selections=other))
    assert any(not torch.equal(selections[0][layer].rows[1], other[0][layer].rows[1]) for layer in range(3))
    heads.save(tmp_path / "heads.safetensors")
    again = RetainingHeads.for_model(model, width=32)
    again.load(tmp_path / "heads.safetensors")
    assert recall(model, again, 200) == recall(model, heads, 200)
    with pytest.raises(CheckpointError, match="do not fit this model"):
        RetainingHeads.for_model(model, width=16).load(tmp_path / "heads.safetensors")
    assert retaining.WIDTH == 1024
