"""Spava, Star and APB: blocks that see an anchor, the selections of earlier blocks and themselves; a query that sees all.

What a rank computes for one sequence and one layer (specification, sections 1.8 to 1.10 and 2.1), in this order, so that
what is sent travels while the next part is computed:

    select in each own block and send         query on the keys held here, and send out and lse
    anchor, and every block on [A | B]        passing blocks have come: attend to them and merge by log-sum-exp
    the query's parts have come: merge

Rows \\ keys: anchor causal; a block all of the anchor, all that earlier blocks pass on, itself causal; the query every
row of the context and itself causal. Nothing here has a backward pass.
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
    """The local rows of one sequence in one layer: q [Hq, T, D], k and v [Hk, T, D], rotated; T as `plan.slices` says."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class Selections:
    """What was passed on, for tests and measurements: per virtual host, rows of the sequence [Hk, kept]."""

    rows: dict[int, Tensor] = field(default_factory=dict)


def send_selected(
    plan: BlockPlan, group: RankGroup, x: LocalRows, score: Callable[[slice], Tensor], seen: Selections | None = None
) -> list[Work]:
    """Select in each own block and start to pass it on; the gathers in the order of the rank's blocks.

    `score` gives [Hk, T] for a slice of local rows. A buffer is [2, Hk, widest, D], keys and values, padded with zeros.
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
            if seen is not None:
                seen.rows[virtual] = index + plan.blocks[virtual][0]
        works.append(group.gather(buffer))
    return works


def query_on_cache(plan: BlockPlan, group: RankGroup, x: LocalRows, scale: float, backend: str) -> PartialAttention:
    """The query on the keys that this rank keeps: its share of the anchor, its blocks, and on their owner itself."""
    query, own = plan.slices(group.rank)[2], plan.query_rows(group.rank)
    parts = [attend(x.q[:, query], x.k[:, where], x.v[:, where], scale, backend=backend) for where in plan.cached_rows(group.rank)]
    if own.stop:
        parts.append(attend(x.q[:, own], x.k[:, own], x.v[:, own], scale, True, backend))
    return merge(parts)


def gather_partial(group: RankGroup, part: PartialAttention) -> Callable[[], Tensor]:
    """Start to share a partial attention; the function that is returned waits and merges all ranks' to out [Hq, T, D]."""
    wide = torch.cat([part.out.to(part.lse.dtype), part.lse[..., None]], -1)
    work = group.gather(wide)

    def finish() -> Tensor:
        gathered = work.wait()
        return merge([PartialAttention(g[..., :-1], g[..., -1]) for g in gathered]).out.to(part.out.dtype)

    return finish


def passed(plan: BlockPlan, virtual: int, gathered: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [Hk, sum of kept, D] that `virtual` attends to, out of the gathered buffers [ranks, 2, Hk, widest, D]."""
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
    seen: Selections | None = None,
) -> Tensor:
    """Attention [Hq, T, D] of the local rows. Raises nothing but what `attend` does.

    scorer   how the query ranks a block's rows; `scores` [Hk, T] over the local rows are taken instead where given,
             as APB's retaining heads do
    """
    anchor, blocks, query = plan.slices(group.rank)
    out = torch.empty_like(x.q)

    def score(where: slice) -> Tensor:
        return scorer(x.q[:, query], x.k[:, where]) if scores is None else scores[:, where]

    works = send_selected(plan, group, x, score, seen)
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
    """In which round `virtual` is passed on: its place among its owner's blocks."""
    return plan.owned(plan.owners[virtual]).index(virtual)
