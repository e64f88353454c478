"""Exact attention of a set of queries over a set of keys, returning the log-sum-exp that merging needs.

    attend(q, k, v, scale, causal) -> PartialAttention(out [Hq, Tq, D] in q's type, lse [Hq, Tq] in float32 or wider)

q is [Hq, Tq, D]; k and v are [Hk, Tk, D]. Each KV head serves Hq / Hk consecutive query heads and is never copied. A `causal` mask is
aligned to the lower right: the last query sees all keys. Without keys the output is 0 and its lse is -inf, which `merge` ignores.

Backends, selected by `backend` or, for "auto", by device and type:
    flash       torch's flash kernels for CPU and CUDA (aten), which return the log-sum-exp that SDPA does not expose
    flash_attn  the flash-attn package, on CUDA (Dao 2023, FlashAttention-2, arXiv 2307.08691)
    flex        torch's FlexAttention
    reference   a plain softmax in float64: slow, for tests

Operations can be counted: `with metered() as meter: ...; meter.flops` (4 Tq Tk D per head, half of that for a causal square).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.attention.merge import PartialAttention, merge
from ramet.errors import ConfigError


@dataclass
class Meter:
    """Counts the floating-point operations of `attend`, by the convention of `cost`."""

    flops: float = 0.0


_METER: ContextVar[Meter | None] = ContextVar("attention_meter", default=None)


@contextmanager
def metered() -> Iterator[Meter]:
    """Count the operations of all `attend` calls of this thread or task inside the block."""
    meter = Meter()
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, backend: str = "auto") -> PartialAttention:
    """Attention of q [Hq, Tq, D] over k and v [Hk, Tk, D], scaled by `scale`; see the module.

    Raises `ConfigError` for an unknown backend, for shapes that do not fit, and for a causal mask over fewer keys than queries.
    """
    (heads, rows, _), (kv_heads, keys, _) = q.shape, k.shape
    if heads % kv_heads or k.shape != v.shape:
        raise ConfigError(f"attention shapes do not fit: queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}")
    if causal and rows > keys:
        raise ConfigError(f"causal attention needs a key for each of the {rows} queries (got {keys} keys)")
    if not rows or not keys:
        return PartialAttention(torch.zeros_like(q), q.new_full((heads, rows), -torch.inf, dtype=wide(q)))
    if causal and rows == 1:
        causal = False
    if causal and rows < keys:
        before = attend(q, k[:, : keys - rows], v[:, : keys - rows], scale, backend=backend)
        return merge([before, attend(q, k[:, keys - rows :], v[:, keys - rows :], scale, True, backend)])
    meter = _METER.get()
    if meter is not None:
        meter.flops += heads * q.shape[2] * (2.0 if causal else 4.0) * rows * keys
    return _kernel(backend, q)(q, k, v, scale, causal)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: PartialAttention, scale: float, causal: bool, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for attention over *part* of the keys, given the output and lse over *all* of them.

    grad   gradient [Hq, Tq, D] of the merged output
    whole  the merged output and lse; summed over the parts of the keys, the gradients are those of attention over all keys

    Gradients have the accumulation type (`wide`), because callers add parts up. With `causal`, keys and queries must be equal in number.
    On CPU, "auto" and "flash" use torch's flash kernel; everything else is computed here, `_ROWS` query rows at a time. See
    FlashAttention (arXiv 2205.14135), appendix B.2, for the derivation from the output and the log-sum-exp.
    """
    kind = wide(q)
    if not q.shape[1] or not k.shape[1]:
        return torch.zeros_like(q, dtype=kind), torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)
    gq, gk, gv = _grouped(q, k, v)
    if backend in ("auto", "flash") and not q.is_cuda:
        out, lse, gout = (x.reshape(*gq.shape[:2], *x.shape[1:]) for x in (whole.out, whole.lse, grad))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gout.contiguous(), gq, gk, gv, out.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2), 0.0, causal, scale=scale
        )
        return grads[0].reshape(q.shape).to(kind), grads[1].sum(1, dtype=kind), grads[2].sum(1, dtype=kind)
    gq, gk, gv = (x.to(kind) for x in (gq, gk, gv))
    gout, lse = grad.to(kind).reshape(gq.shape), whole.lse.reshape(gq.shape[:3])
    delta = (whole.out.reshape(gq.shape) * gout).sum(-1)
    dq, dk, dv = torch.zeros_like(gq), torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)
    for start in range(0, q.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = gq[:, :, rows] @ gk.transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + start), -torch.inf)
        weights = torch.exp(scores - lse[:, :, rows, None])
        d_scores = weights * (gout[:, :, rows] @ gv.transpose(-1, -2) - delta[:, :, rows, None]) * scale
        dq[:, :, rows] = d_scores @ gk
        dk += (d_scores.transpose(-1, -2) @ gq[:, :, rows]).sum(1)
        dv += (weights.transpose(-1, -2) @ gout[:, :, rows]).sum(1)
    return dq.reshape(q.shape), dk, dv


_ROWS = 512
"""Query rows whose scores are held at once in the backward pass."""
_Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], PartialAttention]


def wide(x: Tensor) -> torch.dtype:
    """The type in which sums over x are accumulated: float32, or float64 for a float64 tensor."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernel(backend: str, q: Tensor) -> _Kernel:
    """The kernel called `backend`, or the one that "auto" selects for q. Raises `ConfigError` for an unknown name."""
    if backend == "auto":
        backend = "flash_attn" if q.is_cuda and _flash_attn() is not None and q.dtype != torch.float32 else "flash"
        if q.is_cuda and q.dtype in (torch.float32, torch.float64):
            backend = "reference" if q.dtype == torch.float64 else "flex"
    try:
        return KERNELS[backend]
    except KeyError:
        raise ConfigError(f"unknown attention backend {backend!r}; choose one of auto, {', '.join(KERNELS)}") from None


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [Hk, g, Tq, D], k and v [Hk, g, Tk, D], with KV heads as the batch; keys repeat over the group by a stride of 0, uncopied."""
    group = q.shape[0] // k.shape[0]
    shape = (k.shape[0], group, k.shape[1], k.shape[2])
    return q.reshape(k.shape[0], group, *q.shape[1:]), k[:, None].expand(shape), v[:, None].expand(shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> PartialAttention:
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_grouped(q, k, v), 0.0, causal, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_grouped(q, k, v), 0.0, causal, scale=scale)
    return PartialAttention(out.reshape(q.shape), lse.reshape(q.shape[:2]))


def _flash_package(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> PartialAttention:
    function = _flash_attn()
    if function is None:
        raise ConfigError("the attention backend flash_attn needs the flash-attn package and a GPU; use the backend auto")
    out, lse, _ = function(*(x.transpose(0, 1)[None] for x in (q, k, v)), softmax_scale=scale, causal=causal, return_attn_probs=True)
    return PartialAttention(out[0].transpose(0, 1), lse[0])


@functools.cache
def _flash_attn() -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    try:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    return flash_attn_func  # type: ignore[no-any-return, unused-ignore]


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> PartialAttention:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[1], k.shape[1], device=str(q.device))
    out, aux = flex_attention(
        q[None], k[None], v[None], scale=scale, block_mask=mask, enable_gqa=q.shape[0] != k.shape[0], return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return PartialAttention(out[0], aux.lse[0])


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> PartialAttention:
    wide_q, wide_k, wide_v = (x.double() for x in _grouped(q, k, v))
    scores = wide_q @ wide_k.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    out = scores.softmax(-1) @ wide_v
    return PartialAttention(out.reshape(q.shape).to(q.dtype), scores.logsumexp(-1).reshape(q.shape[:2]).to(wide(q)))


KERNELS: dict[str, _Kernel] = {"flash": _flash, "flash_attn": _flash_package, "flex": _flex, "reference": _reference}
