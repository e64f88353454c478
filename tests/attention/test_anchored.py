"""Spava, Star and APB equal dense attention under their masks, in float64, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ramet.attention import select
from ramet.attention.anchored import LocalRows, Selections, anchored
from ramet.attention.comm import RankGroup, simulated
from ramet.attention.plan import BlockPlan, apb, spava, star
from tests.attention.oracle import causal, masked, spava_mask, tensors

SCALE = 0.3


def run(plan: BlockPlan, q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[list[Tensor], Selections]:
    """Each rank's output, and all that was passed on."""
    selections = Selections()

    def rank(group: RankGroup) -> Tensor:
        rows = plan.rows(group.rank)
        return anchored(plan, group, LocalRows(q[:, rows], k[:, rows], v[:, rows]), SCALE, selections=selections, **options)  # type: ignore[arg-type]

    return simulated(plan.hosts, rank), selections


def assert_equal_rows(plan: BlockPlan, outs: list[Tensor], expected: Tensor) -> None:
    for rank, out in enumerate(outs):
        assert (out - expected[:, plan.rows(rank)]).abs().amax() < 1e-14


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", list(select.SCORERS))
def test_spava_is_attention_under_its_mask(hosts: int, heads: int, kv_heads: int, name: str) -> None:
    plan = spava(83, 5, hosts, anchor=6, passing=2)
    q, k, v = tensors(hosts, heads, kv_heads, plan.length)
    outs, selections = run(plan, q, k, v, scorer=select.scorer(name))
    assert set(selections.rows) == set(range(2 * hosts))
    assert_equal_rows(plan, outs, masked(q, k, v, spava_mask(plan, selections, kv_heads), SCALE))


@settings(max_examples=150)
@given(
    st.integers(0, 40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(0, 12),
    st.sampled_from(["flash", "reference"]),
)
def test_any_lengths(context: int, query: int, hosts: int, anchor: int, passing: int, backend: str) -> None:
    plan = spava(context, query, hosts, min(anchor, context), passing)
    q, k, v = tensors(context, 4, 2, plan.length)
    outs, selections = run(plan, q, k, v, backend=backend)
    assert_equal_rows(plan, outs, masked(q, k, v, spava_mask(plan, selections, 2), SCALE))
    kept = [s for rank in range(hosts) for s in (*plan.cached_rows(rank), plan.query_rows(rank))]
    assert sum(s.stop - s.start for s in kept) == plan.length
    assert all(torch.equal(out[:, -query:], outs[0][:, -query:]) for out in outs), "ranks disagree about the query"


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_with_all_rows_passed_on_it_is_dense(hosts: int) -> None:
    plan = spava(61, 3, hosts, anchor=4, passing=100)
    q, k, v = tensors(7, 4, 2, plan.length)
    outs, _ = run(plan, q, k, v)
    assert_equal_rows(plan, outs, masked(q, k, v, causal(plan.length).expand(2, -1, -1), SCALE))


def test_the_query_is_exact_whatever_is_passed_on() -> None:
    q, k, v = tensors(8, 4, 2, 64)
    expected = masked(q, k, v, causal(64).expand(2, -1, -1), SCALE)[:, -4:]
    for passing in (0, 1, 5):
        outs, _ = run(spava(60, 4, 3, 5, passing), q, k, v)
        assert all((out[:, -4:] - expected).abs().amax() < 1e-14 for out in outs)


@pytest.mark.parametrize("hosts", [1, 2, 3, 5])
def test_star_is_attention_under_its_mask(hosts: int) -> None:
    plan = star(47, 4, hosts)
    q, k, v = tensors(9, 4, 2, plan.length)
    outs, selections = run(plan, q, k, v)
    assert not selections.rows
    assert_equal_rows(plan, outs, masked(q, k, v, spava_mask(plan, selections, 2), SCALE))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_apb_is_attention_under_its_mask(hosts: int) -> None:
    """Each rank's anchor copy has states of its own, so the oracle is written over the copies as well."""
    plan = apb(41, 3, hosts, anchor=5, passing=3)
    copies = [tensors(100 + rank, 4, 2, len(plan.anchor_rows(rank))) for rank in range(hosts)]
    q, k, v = tensors(10, 4, 2, plan.length)
    scores = torch.rand(2, plan.length, dtype=torch.float64)
    selections = Selections()

    def local(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = plan.rows(rank)[len(plan.anchor_rows(rank)) :]
        q_, k_, v_ = (torch.cat([copy, x[:, rows]], 1) for copy, x in zip(copies[rank], (q, k, v), strict=True))
        return q_, k_, v_

    def rank(group: RankGroup) -> Tensor:
        return anchored(plan, group, LocalRows(*local(group.rank)), SCALE, scores=scores[:, plan.rows(group.rank)], selections=selections)

    for r, out in enumerate(simulated(hosts, rank)):
        copied = len(plan.anchor_rows(r))
        assert copied == (0 if r == 0 else 3 + 5)
        keys, values = (torch.cat([c, x], 1) for c, x in zip(copies[r][1:], (k, v), strict=True))
        mask = torch.zeros(2, out.shape[1], keys.shape[1], dtype=torch.bool)
        mask[:, :copied, :copied] = causal(copied)
        (start, stop), at = plan.blocks[r], copied
        mask[:, at : at + stop - start, :copied] = True
        mask[:, at : at + stop - start, copied + start : copied + stop] = causal(stop - start)
        for earlier in range(r):
            for head in range(2):
                assert selections.rows[earlier][head].min() >= (5 if earlier == 0 else 0), "anchor rows are everywhere already"
                mask[head, at : at + stop - start, copied + selections.rows[earlier][head]] = True
        mask[:, -3:, copied:] = causal(plan.length)[-3:]
        assert (out - masked(local(r)[0], keys, values, mask, SCALE)).abs().amax() < 1e-14


def test_a_planted_needle_is_passed_on_and_seen() -> None:
    """A key along the query's mean is selected, for its KV head, from the first block into the last."""
    plan = spava(200, 3, 4, anchor=8, passing=5)
    q, k, v = tensors(11, 4, 2, plan.length)
    row = plan.blocks[0][0] + 9
    k[1, row] = 20 * q[2:, -3:].mean((0, 1))
    _, selections = run(plan, q, k, v)
    assert row in selections.rows[0][1]
    assert row not in selections.rows[0][0] or (k[0, row] @ q[:2, -3:].mean((0, 1))) > 0


def test_the_load_is_the_same_on_all_hosts_and_as_computed() -> None:
    """Section 2.3: d [2 l_a^2 + 8 l_a l_b + 4 l_b^2 + 4 (2H - 1) l_b l_p + 4 l_q (l_a / H + 2 l_b)], and 2 l_q^2 d on one rank."""
    from ramet.attention.kernels import metered

    hosts, heads, dim, l_a, l_b, l_p, l_q = 4, 4, 8, 8, 12, 3, 5
    plan = spava(l_a + 2 * hosts * l_b, l_q, hosts, l_a, l_p)
    q, k, v = tensors(12, heads, 2, plan.length, dim)
    traffic = []

    def rank(group: RankGroup) -> float:
        rows = plan.rows(group.rank)
        with metered() as meter:
            anchored(plan, group, LocalRows(q[:, rows], k[:, rows], v[:, rows]), SCALE)
        traffic.append(group.traffic.received)
        return meter.flops

    flops = simulated(hosts, rank)
    d = heads * dim
    expected = d * (2 * l_a**2 + 8 * l_a * l_b + 4 * l_b**2 + 4 * (2 * hosts - 1) * l_b * l_p + 4 * l_q * (l_a // hosts + 2 * l_b))
    assert flops == [expected + 2 * l_q**2 * d] + [expected] * (hosts - 1)
    elements = (hosts - 1) * (2 * l_p * 2 * 2 * dim + l_q * (d + heads))
    assert traffic == [8 * elements] * hosts
