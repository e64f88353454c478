"""What a layer costs a rank by arithmetic: pairs attended to, floating-point operations, bytes (specification, sections 2.2, 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

from ramet.attention.methods import Method
from ramet.attention.plan import BlockPlan, ShardedPlan


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer: hidden size d, query heads, KV heads, head size, width of the feed-forward network."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    feed_forward: int

    @property
    def linear(self) -> float:
        """Operations per row outside attention: 4 d^2 + 4 d^2 / g + 6 d I."""
        inner = self.heads * self.head
        return 4.0 * self.hidden * inner + 4.0 * self.hidden * self.kv_heads * self.head + 6.0 * self.hidden * self.feed_forward


QWEN_3B = LayerShape(2048, 16, 2, 128, 11008)
"""Qwen2.5-3B, and the language model of Qwen2.5-VL-3B."""


def pairs(plan: BlockPlan | ShardedPlan, rank: int) -> float:
    """Query-key pairs that a rank attends to in a layer; half of a causal square and its diagonal."""
    if isinstance(plan, ShardedPlan):
        return sum((start + stop + 1) * (stop - start) / 2 for start, stop in plan.blocks(rank))
    anchor = plan.anchor_size(rank)
    total = anchor * (anchor + 1) / 2
    for virtual in plan.owned(rank):
        size = plan.size(virtual)
        total += size * (size + 1) / 2 + size * (anchor + sum(map(plan.kept, plan.before(virtual))))
    start, stop = plan.anchor_shard(rank)
    total += plan.query * (stop - start + sum(plan.size(v) for v in plan.owned(rank)))
    return total + (plan.query * (plan.query + 1) / 2 if rank == plan.query_owner else 0)


def attention_flops(method: Method, plan: BlockPlan | ShardedPlan, rank: int, shape: LayerShape) -> float:
    """4 operations per pair, query head and head dimension, and Spava's scores. Ulysses has all pairs for some heads."""
    seen = sum(pairs(plan, r) for r in range(plan.hosts)) / plan.hosts if method.name == "ulysses" else pairs(plan, rank)
    flops = 4.0 * shape.heads * shape.head * seen
    if isinstance(plan, BlockPlan) and plan.passing:
        flops += 2.0 * shape.kv_heads * shape.head * sum(plan.size(v) for v in plan.owned(rank))
    return flops


def received(method: Method, plan: BlockPlan | ShardedPlan, rank: int, shape: LayerShape, width: int = 4) -> float:
    """Bytes that a rank receives in a layer's prefill, with `width` bytes an element."""
    others = plan.hosts - 1
    if isinstance(plan, BlockPlan):
        passing = 2 * plan.widest * shape.kv_heads * shape.head * plan.rounds
        return float(width * others * (passing + plan.query * shape.heads * (shape.head + 1)))
    rows = plan.length - plan.size(rank)
    if method.name == "ulysses":
        own = -(-shape.kv_heads // plan.hosts) * 2 * shape.head + shape.heads * shape.head / plan.hosts
        return width * (rows * own + plan.size(rank) * shape.heads * shape.head * others / plan.hosts)
    return float(width * rows * 2 * shape.kv_heads * shape.head)
