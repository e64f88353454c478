"""Attention in blocks with an anchor: Spava (arXiv 2601.21444), APB (arXiv 2502.12085) and Star Attention (arXiv 2411.17116).

The anchor attends to itself causally. A block attends to the whole anchor, to the rows that earlier blocks pass on, and to itself
causally. The query attends to every row of the context, and to itself causally. There is no backward pass.

For one sequence and one layer, a rank works in this order, so that communication overlaps with computation:

    1. select rows in each of its blocks and start to send them
    2. compute the query's attention over the keys held here and start to send its output and log-sum-exp
    3. compute the attention of the anchor, and of each block over the anchor and itself
    4. wait for the selected rows, attend to them, and merge by log-sum-exp
    5. wait for the query's partial results and merge them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ramet.attention.comm import RankGroup, Work
from ramet.attention.kernels import attend
from ramet.attention.merge import PartialAttention, merge
from ramet.attention.plan import BlockPlan
from ramet.attention.select import Scorer, mean_scores, pooled, rows_at, top


@dataclass(frozen=True)
class LocalRows:
    """The local rows of one sequence in one layer, in the order of `plan.slices`: q [Hq, T, D], k and v [Hk, T, D]; q and k rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class Selections:
    """The rows that were passed on in one layer, for tests and measurements."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    """Sequence rows [Hk, kept] for each virtual host."""


def send_selected(
    plan: BlockPlan, group: RankGroup, x: LocalRows, score: Callable[[slice], Tensor], selections: Selections | None = None
) -> list[Work]:
    """Select rows in each block of this rank and start to gather them. Returns one gather per block, in the order of the blocks.

    score       gives scores [Hk, T] of a slice of local rows
    selections  receives the selected rows of each block

    Each gathered buffer is [2, Hk, widest, D], holding keys and values padded with zeros.
    """
    works: list[Work] = []
    if not plan.widest:
        return works
    _, blocks, _ = plan.slices(group.rank)
    for virtual, where in zip(plan.owned(group.rank), blocks, strict=True):
        low, high = plan.selectable(virtual)
        buffer = x.k.new_zeros((2, x.k.shape[0], plan.widest, x.k.shape[2]))
        if plan.kept(virtual):
            index = top(pooled(score(where))[:, low:high], plan.kept(virtual)) + low
            buffer[0, :, : plan.kept(virtual)] = rows_at(x.k[:, where], index)
            buffer[1, :, : plan.kept(virtual)] = rows_at(x.v[:, where], index)
            if selections is not None:
                selections.rows[virtual] = index + plan.blocks[virtual][0]
        works.append(group.gather(buffer))
    return works


def query_on_cache(plan: BlockPlan, group: RankGroup, x: LocalRows, scale: float, backend: str) -> PartialAttention:
    """Attention of the query over the keys cached on this rank: its share of the anchor, its blocks and, on its owner, the query itself."""
    query, own = plan.slices(group.rank)[2], plan.query_rows(group.rank)
    parts = [attend(x.q[:, query], x.k[:, where], x.v[:, where], scale, backend=backend) for where in plan.cached_rows(group.rank)]
    if own.stop:
        parts.append(attend(x.q[:, own], x.k[:, own], x.v[:, own], scale, True, backend))
    return merge(parts)


def gather_partial(group: RankGroup, part: PartialAttention) -> Callable[[], Tensor]:
    """Start to gather every rank's partial attention. The function returned waits for them and gives the merged output [Hq, T, D]."""
    wide = torch.cat([part.out.to(part.lse.dtype), part.lse[..., None]], -1)
    work = group.gather(wide)

    def finish() -> Tensor:
        gathered = work.wait()
        return merge([PartialAttention(g[..., :-1], g[..., -1]) for g in gathered]).out.to(part.out.dtype)

    return finish


def passed(plan: BlockPlan, virtual: int, gathered: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The selected keys and values [Hk, n, D] that `virtual` attends to, from the gathered buffers [ranks, 2, Hk, widest, D]."""
    rounds = {v: r for rank in range(plan.hosts) for r, v in enumerate(plan.owned(rank))}
    pieces = [gathered[rounds[v]][plan.owners[v], :, :, : plan.kept(v)] for v in plan.before(virtual)]
    keys, values = torch.cat(pieces, dim=2) if pieces else gathered[0][0, :, :, :0]
    return keys, values


def anchored(
    plan: BlockPlan,
    group: RankGroup,
    x: LocalRows,
    scale: float,
    scorer: Scorer = mean_scores,
    scores: Tensor | None = None,
    backend: str = "auto",
    selections: Selections | None = None,
) -> Tensor:
    """Attention output [Hq, T, D] of the local rows. Raises what `attend` raises.

    scorer      ranks the rows of a block for the query
    scores      importance [Hk, T] of the local rows, taken instead of the scorer's (APB's retaining heads)
    backend     attention kernel; see `kernels`
    selections  receives the selected rows of each block
    """
    anchor, blocks, query = plan.slices(group.rank)
    out = torch.empty_like(x.q)

    def score(where: slice) -> Tensor:
        return scorer(x.q[:, query], x.k[:, where]) if scores is None else scores[:, where]

    works = send_selected(plan, group, x, score, selections)
    finish_query = gather_partial(group, query_on_cache(plan, group, x, scale, backend))
    if anchor.stop:
        out[:, anchor] = attend(x.q[:, anchor], x.k[:, anchor], x.v[:, anchor], scale, True, backend).out
    own = {}
    for virtual, where in zip(plan.owned(group.rank), blocks, strict=True):
        parts = [attend(x.q[:, where], x.k[:, where], x.v[:, where], scale, True, backend)]
        if anchor.stop:
            parts.append(attend(x.q[:, where], x.k[:, anchor], x.v[:, anchor], scale, backend=backend))
        own[virtual] = parts
    gathered: list[Tensor] = []
    for virtual, where in zip(plan.owned(group.rank), blocks, strict=True):
        if works:
            needed = max((rank_round(plan, v) for v in plan.before(virtual)), default=-1)
            while len(gathered) <= needed:
                gathered.append(works[len(gathered)].wait())
            if needed >= 0:
                own[virtual].append(attend(x.q[:, where], *passed(plan, virtual, gathered), scale, backend=backend))
        out[:, where] = merge(own[virtual]).out
    out[:, query] = finish_query()
    for work in works[len(gathered) :]:
        work.wait()
    return out


def rank_round(plan: BlockPlan, virtual: int) -> int:
    """The round in which the selection of `virtual` is sent: its index among its owner's blocks."""
    return plan.owned(plan.owners[virtual]).index(virtual)
