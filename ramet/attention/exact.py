"""Exact attention of a sharded sequence: ring, zigzag ring, Ulysses. All have a backward pass, so long rows can be trained.

Ring: keys and values go round; after `hosts` steps every rank has seen those that its rows may see. With one run of rows
a rank the last rank does the most; in zigzag all do the same. Ulysses: rows are exchanged for heads, each rank attends
with its heads to the whole sequence, and heads are exchanged for rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ramet.attention.comm import RankGroup
from ramet.attention.kernels import attend, attend_backward, wide
from ramet.attention.merge import PartialAttention, merge
from ramet.attention.plan import ShardedPlan
from ramet.errors import ConfigError


def ring(plan: ShardedPlan, group: RankGroup, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "auto") -> Tensor:
    """Causal attention [Hq, T, D] of the local rows; q [Hq, T, D], k and v [Hk, T, D], rows as `plan.rows(rank)`."""
    out: Tensor = _Ring.apply(q, k, v, plan, group, scale, backend)  # type: ignore[no-untyped-call]
    return out


def visible(plan: ShardedPlan, rank: int, source: int) -> list[tuple[slice, int]]:
    """Local rows of `rank`, and how many of the first rows of `source` they see in full.

    Runs that see as much are one slice; runs that see nothing are left out. The causal squares of a rank's own runs are
    not among them.
    """
    seen, at = [], 0
    for start, stop in plan.blocks(rank):
        count = sum(b - a for a, b in plan.blocks(source) if b <= start)
        seen.append((slice(at, at + stop - start), count))
        at += stop - start
    if len({count for _, count in seen}) == 1:
        seen = [(slice(0, at), seen[0][1])]
    return [(rows, count) for rows, count in seen if count]


def _squares(plan: ShardedPlan, rank: int) -> list[slice]:
    """The rank's own runs among its local rows."""
    squares, at = [], 0
    for start, stop in plan.blocks(rank):
        squares.append(slice(at, at + stop - start))
        at += stop - start
    return squares


class _Ring(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: ShardedPlan, group: RankGroup, scale: float, backend: str) -> Tensor:
        rank, size = group.rank, group.size
        squares = [attend(q[:, s], k[:, s], v[:, s], scale, True, backend) for s in _squares(plan, rank)]
        out = torch.cat([part.out for part in squares], 1).to(squares[0].lse.dtype)
        lse = torch.cat([part.lse for part in squares], 1)
        kv = torch.stack([k, v])
        for step in range(size):
            source = (rank - step) % size
            work = group.shift(kv, _like(kv, plan, source - 1)) if step + 1 < size else None
            for rows, count in visible(plan, rank, source):
                part = attend(q[:, rows], kv[0, :, :count], kv[1, :, :count], scale, backend=backend)
                out[:, rows], lse[:, rows] = merge([PartialAttention(out[:, rows], lse[:, rows]), part])
            if work is not None:
                kv = work.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.group, ctx.scale, ctx.backend = plan, group, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, group = ctx.plan, ctx.group
        rank, size = group.rank, group.size

        def part(rows: slice, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            whole = PartialAttention(out[:, rows], lse[:, rows])
            return attend_backward(grad[:, rows], q[:, rows], keys, values, whole, ctx.scale, causal, ctx.backend)

        dq, kv = torch.zeros_like(q, dtype=wide(q)), torch.stack([k, v])
        d_kv = torch.zeros_like(kv, dtype=wide(q))
        for own in _squares(plan, rank):
            dq[:, own], d_kv[0, :, own], d_kv[1, :, own] = part(own, k[:, own], v[:, own], True)
        for step in range(size):
            source = (rank - step) % size
            work = group.shift(kv, _like(kv, plan, source - 1)) if step + 1 < size else None
            for rows, count in visible(plan, rank, source):
                add_q, add_k, add_v = part(rows, kv[0, :, :count], kv[1, :, :count], False)
                dq[:, rows] += add_q
                d_kv[0, :, :count] += add_k
                d_kv[1, :, :count] += add_v
            d_kv = group.shift(d_kv, _like(d_kv, plan, source - 1)).wait()
            if work is not None:
                kv = work.wait()
        return dq.to(q.dtype), *d_kv.to(q.dtype), None, None, None, None


def _like(kv: Tensor, plan: ShardedPlan, source: int) -> Tensor:
    """An empty buffer for the keys and values of rank `source`."""
    return kv.new_empty((2, kv.shape[1], plan.size(source % plan.hosts), kv.shape[3]))


def ulysses(plan: ShardedPlan, group: RankGroup, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "auto") -> Tensor:
    """As `ring`. Query heads must be a multiple of the ranks, KV heads a multiple or a divisor (then they are repeated)."""
    size, heads, kv_heads = group.size, q.shape[0], k.shape[0]
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ConfigError(f"Ulysses cannot share {heads} heads and {kv_heads} KV heads among {size} ranks; use ring")
    own = [_heads(rank, size, heads) for rank in range(size)]
    own_kv = [_heads(rank, size, kv_heads) for rank in range(size)]
    whole = [_to_heads(plan, group, x, share) for x, share in ((q, own), (k, own_kv), (v, own_kv))]
    out: Tensor = _Attend.apply(*whole, scale, backend)  # type: ignore[no-untyped-call]
    parts = list(out.split([plan.size(r) for r in range(size)], 1))
    like = [(s.stop - s.start, plan.size(group.rank), q.shape[2]) for s in own]
    return torch.cat(_exchange(group, parts, like), 0)


def _heads(rank: int, size: int, heads: int) -> slice:
    return slice(rank * heads // size, max((rank + 1) * heads // size, rank * heads // size + 1))


def _to_heads(plan: ShardedPlan, group: RankGroup, x: Tensor, share: list[slice]) -> Tensor:
    own = share[group.rank]
    like = [(own.stop - own.start, plan.size(r), x.shape[2]) for r in range(group.size)]
    return torch.cat(_exchange(group, [x[s] for s in share], like), 1)


def _exchange(group: RankGroup, parts: list[Tensor], like: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return list(_Exchange.apply(group, like, *parts))  # type: ignore[no-untyped-call]


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, group: RankGroup, like: Sequence[tuple[int, ...]], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.like = group, [tuple(part.shape) for part in parts]
        return tuple(x.clone() for x in group.exchange(parts, like).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x.clone() for x in ctx.group.exchange([g.contiguous() for g in grads], ctx.like).wait())


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
        out, lse = attend(q, k, v, scale, True, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.backend = scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = attend_backward(grad, q, k, v, PartialAttention(out, lse), ctx.scale, True, ctx.backend)
        return *(x.to(q.dtype) for x in grads), None, None
