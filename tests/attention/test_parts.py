"""Kernels, merging, selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.attention import select
from ramet.attention.kernels import attend
from ramet.attention.merge import PartialAttention, merge
from ramet.errors import ConfigError
from tests.attention.oracle import tensors


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", ["flash", "flex", "reference"])
@pytest.mark.parametrize(
    ("rows", "keys", "causal"), [(5, 9, False), (5, 9, True), (7, 7, True), (1, 9, True), (0, 3, False), (3, 0, False)]
)
def test_backends_agree(backend: str, rows: int, keys: int, causal: bool) -> None:
    q, k, v = (x.float() for x in tensors(1, 6, 2, 9, 16))
    expected = attend(q[:, :rows].double(), k[:, :keys].double(), v[:, :keys].double(), 0.25, causal, "reference")
    ours = attend(q[:, :rows], k[:, :keys], v[:, :keys], 0.25, causal, backend)
    assert ours.out.dtype == ours.lse.dtype == torch.float32
    assert torch.allclose(ours.out.double(), expected.out, atol=1e-6)
    assert torch.allclose(ours.lse.double(), expected.lse, atol=1e-6)


def test_bfloat16_keeps_its_log_sum_exp_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in tensors(2, 4, 4, 12, 16))
    ours, exact = attend(q, k, v, 0.25), attend(q, k, v, 0.25, backend="reference")
    assert ours.lse.dtype == torch.float32
    assert ours.out.dtype == torch.bfloat16
    assert torch.allclose(ours.out.float(), exact.out.float(), atol=0.02)


def test_shapes_and_backends_that_do_not_fit_are_named() -> None:
    q, k, v = tensors(3, 3, 2, 4)
    with pytest.raises(ConfigError, match="do not fit"):
        attend(q, k, v, 1.0)
    with pytest.raises(ConfigError, match="unknown attention backend 'fast'; choose one of auto, flash"):
        attend(q[:2], k, v, 1.0, backend="fast")
    with pytest.raises(ConfigError, match="needs the flash-attn package"):
        attend(q[:2], k, v, 1.0, backend="flash_attn")


@settings(max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any), st.randoms())
def test_merged_parts_are_the_whole_in_any_order(sizes: list[int], random: object) -> None:
    q, k, v = tensors(sum(sizes), 4, 2, sum(sizes))
    whole = attend(q, k, v, 0.5)
    parts, at = [], 0
    for size in sizes:
        parts.append(attend(q, k[:, at : at + size], v[:, at : at + size], 0.5))
        at += size
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = merge(parts)
    assert torch.allclose(merged.out, whole.out, atol=1e-13)
    assert torch.allclose(merged.lse, whole.lse, atol=1e-13)


def test_parts_without_keys_merge_to_nothing_and_huge_scores_do_not_overflow() -> None:
    empty = PartialAttention(torch.zeros(1, 2, 3), torch.full((1, 2), -torch.inf))
    assert torch.equal(merge([empty, empty]).out, torch.zeros(1, 2, 3))
    assert torch.equal(merge([empty, empty]).lse, empty.lse)
    huge = PartialAttention(torch.ones(1, 2, 3), torch.full((1, 2), 1e4))
    assert torch.equal(merge([huge, empty, huge]).out, torch.ones(1, 2, 3))


def test_mean_scores_are_the_mean_of_all_dot_products() -> None:
    q, k, _ = tensors(4, 6, 2, 20)
    dots = (q.reshape(2, -1, 8) @ k.transpose(-1, -2)).mean(1)
    assert torch.allclose(select.mean_scores(q, k), dots, atol=1e-14)


def test_pooling_stays_inside_and_ties_go_to_earlier_rows() -> None:
    scores = torch.tensor([[0.0, 0, 0, 9, 0, 0, 0, 0]])
    assert select.pooled(scores).tolist() == [[0, 9, 9, 9, 9, 9, 0, 0]]
    assert select.top(select.pooled(scores), 3).tolist() == [[1, 2, 3]]
    assert select.top(torch.zeros(1, 6), 2).tolist() == [[0, 1]]
