"""Exact causal attention over a sharded sequence: ring, zigzag ring and Ulysses. All have a backward pass, for training on long rows.

Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values travel around the ring of ranks, and after `hosts` steps each rank has
attended to every key that its rows may see. With one range of rows per rank the last rank does the most work; the zigzag layout gives
all ranks the same. Ulysses (Jacobs et al. 2023, arXiv 2309.14509): an all-to-all exchange turns shards of rows into shards of heads, each
rank attends with its heads over the whole sequence, and a second exchange restores the shards of rows.
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
    """Ring attention output [Hq, T, D] for the local rows q [Hq, T, D], k and v [Hk, T, D], which are those of `plan.rows(rank)`."""
    out: Tensor = _Ring.apply(q, k, v, plan, group, scale, backend)  # type: ignore[no-untyped-call]
    return out


def visible(plan: ShardedPlan, rank: int, source: int) -> list[tuple[slice, int]]:
    """The slices of local rows of `rank` that attend to rows of `source` without a mask, each with the number of rows that it attends to.

    The rows attended to are always the first of `source`. Slices that attend to equally many are joined, and those that attend to none
    are left out. The causal squares on the diagonal are not included.
    """
    attending, offset = [], 0
    for start, stop in plan.blocks(rank):
        count = sum(b - a for a, b in plan.blocks(source) if b <= start)
        attending.append((slice(offset, offset + stop - start), count))
        offset += stop - start
    if len({count for _, count in attending}) == 1:
        attending = [(slice(0, offset), attending[0][1])]
    return [(rows, count) for rows, count in attending if count]


def _squares(plan: ShardedPlan, rank: int) -> list[slice]:
    """The local slice of each of the rank's ranges of rows, which attends to itself causally."""
    squares, offset = [], 0
    for start, stop in plan.blocks(rank):
        squares.append(slice(offset, offset + stop - start))
        offset += stop - start
    return squares


class _Ring(Function):
    """Ring attention with its backward pass, in which the gradients of keys and values travel the ring with them."""

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
    """An empty buffer [2, Hk, T, D] for the keys and values of rank `source`."""
    return kv.new_empty((2, kv.shape[1], plan.size(source % plan.hosts), kv.shape[3]))


def ulysses(plan: ShardedPlan, group: RankGroup, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str = "auto") -> Tensor:
    """Ulysses attention output [Hq, T, D], with the arguments of `ring`.

    The number of query heads must be a multiple of the number of ranks, and that of KV heads a multiple or a divisor of it; with fewer KV
    heads than ranks, several ranks use the same one. Raises `ConfigError` otherwise.
    """
    size, heads, kv_heads = group.size, q.shape[0], k.shape[0]
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ConfigError(f"Ulysses cannot divide {heads} query heads and {kv_heads} KV heads among {size} ranks; use ring")
    own = [_heads(rank, size, heads) for rank in range(size)]
    own_kv = [_heads(rank, size, kv_heads) for rank in range(size)]
    whole = [_to_heads(plan, group, x, share) for x, share in ((q, own), (k, own_kv), (v, own_kv))]
    out: Tensor = _Attend.apply(*whole, scale, backend)  # type: ignore[no-untyped-call]
    parts = list(out.split([plan.size(r) for r in range(size)], 1))
    like = [(s.stop - s.start, plan.size(group.rank), q.shape[2]) for s in own]
    return torch.cat(_exchange(group, parts, like), 0)


def _heads(rank: int, size: int, heads: int) -> slice:
    """The heads of `rank` of `size` ranks: at least one, shared with other ranks where there are fewer heads than ranks."""
    return slice(rank * heads // size, max((rank + 1) * heads // size, rank * heads // size + 1))


def _to_heads(plan: ShardedPlan, group: RankGroup, x: Tensor, share: list[slice]) -> Tensor:
    """Exchange the local rows of all heads, x [H, T, D], for all rows of this rank's heads; `share` gives the heads of each rank."""
    own = share[group.rank]
    like = [(own.stop - own.start, plan.size(r), x.shape[2]) for r in range(group.size)]
    return torch.cat(_exchange(group, [x[s] for s in share], like), 1)


def _exchange(group: RankGroup, parts: list[Tensor], like: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """A differentiable `group.exchange`."""
    return list(_Exchange.apply(group, like, *parts))  # type: ignore[no-untyped-call]


class _Exchange(Function):
    """All-to-all exchange. Its backward pass is the exchange in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, group: RankGroup, like: Sequence[tuple[int, ...]], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.like = group, [tuple(part.shape) for part in parts]
        return tuple(x.clone() for x in group.exchange(parts, like).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(x.clone() for x in ctx.group.exchange([g.contiguous() for g in grads], ctx.like).wait())


class _Attend(Function):
    """Causal attention on one rank, with the backward pass of `attend_backward`."""

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
