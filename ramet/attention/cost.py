"""The analytic cost of one decoder layer on one rank: query-key pairs, floating-point operations, bytes received.

Operations are counted as in the complexity table of APB (Huang et al. 2025, arXiv 2502.12085): 4 m k d for m queries of width d over k
keys, and half of that for a causal square. A multiply-add counts as two operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.attention.methods import Method
from ramet.attention.plan import BlockPlan, ShardedPlan


@dataclass(frozen=True)
class LayerShape:
    """The dimensions of a decoder layer.

    hidden        hidden size d
    heads         query heads
    kv_heads      key-value heads
    head          dimension of one head
    feed_forward  intermediate size I of the gated feed-forward network
    """

    hidden: int
    heads: int
    kv_heads: int
    head: int
    feed_forward: int

    @property
    def linear(self) -> float:
        """Operations per row outside attention, 4 d^2 + 4 d^2 / g + 6 d I with g query heads per KV head: projections and network."""
        inner = self.heads * self.head
        return 4.0 * self.hidden * inner + 4.0 * self.hidden * self.kv_heads * self.head + 6.0 * self.hidden * self.feed_forward


QWEN_3B = LayerShape(2048, 16, 2, 128, 11008)
"""The layers of Qwen2.5-3B, which is also the language model of Qwen2.5-VL-3B."""


def pairs(plan: BlockPlan | ShardedPlan, rank: int) -> float:
    """Query-key pairs that one head of `rank` attends over in a layer. A causal square of n rows counts n (n + 1) / 2."""
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
    """Operations of attention on `rank` in a layer: 4 per pair, query head and head dimension, and 2 per element of the keys scored.

    A Ulysses rank attends over all pairs with 1 / hosts of the heads, which is counted as all heads over 1 / hosts of the pairs.
    """
    attended = sum(pairs(plan, r) for r in range(plan.hosts)) / plan.hosts if method.name == "ulysses" else pairs(plan, rank)
    flops = 4.0 * shape.heads * shape.head * attended
    if isinstance(plan, BlockPlan) and plan.passing:
        flops += 2.0 * shape.kv_heads * shape.head * sum(plan.size(v) for v in plan.owned(rank))
    return flops


def received(method: Method, plan: BlockPlan | ShardedPlan, rank: int, shape: LayerShape, width: int = 4) -> float:
    """Bytes that `rank` receives from the others in the prefill of one layer, at `width` bytes per element."""
    others = plan.hosts - 1
    if isinstance(plan, BlockPlan):
        passing = 2 * plan.widest * shape.kv_heads * shape.head * plan.rounds
        return float(width * others * (passing + plan.query * shape.heads * (shape.head + 1)))
    rows = plan.length - plan.size(rank)
    if method.name == "ulysses":
        own = -(-shape.kv_heads // plan.hosts) * 2 * shape.head + shape.heads * shape.head / plan.hosts
        return width * (rows * own + plan.size(rank) * shape.heads * shape.head * others / plan.hosts)
    return float(width * rows * 2 * shape.kv_heads * shape.head)
