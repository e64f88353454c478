"""The ledger: spent + reserved <= limit, in every currency, at every node, whatever happens."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ramet.agents.budget import CURRENCIES, POOLED, Budget, Fork, Grant, Ledger, fair_shares
from ramet.errors import BudgetExhausted, LedgerError

limits = st.none() | st.integers(0, 60)
budgets = st.builds(
    Budget,
    generated=limits,
    prefilled=limits,
    critical_path=limits,
    clones=st.none() | st.integers(0, 6),
    branch_generated=limits,
    turns=st.none() | st.integers(0, 5),
    tool_calls=st.none() | st.integers(0, 8),
    tool_seconds=st.none() | st.integers(0, 20).map(lambda tenths: tenths / 10),
    answer_reserve=st.integers(0, 6),
)


class Crash(Exception):
    pass


def grow(data: st.DataObject, root: Ledger, ledger: Ledger, depth: int, log: dict[str, int]) -> int:
    """Random life of one branch: samples, cancelled samples, forks, crashes. Returns its true critical path."""
    path = 0
    for _ in range(data.draw(st.integers(0, 3))):
        what = data.draw(st.sampled_from(["sample", "unsettled", "call", "lost call", "fork", "crash"]))
        if what in ("sample", "unsettled"):
            try:
                grant = ledger.reserve(data.draw(st.integers(0, 25)), data.draw(st.integers(0, 25)))
            except BudgetExhausted:
                root.check()
                continue
            root.check()
            with grant:
                if what == "sample":
                    used = data.draw(st.integers(0, grant.generated))
                    grant.settle(used, 0)
                    path += used
                    log["generated"] += used
            root.check()
        elif what in ("call", "lost call"):
            cost, longest = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 2000))
            try:
                call = ledger.reserve_call(cost, longest)
            except BudgetExhausted:
                root.check()
                continue
            root.check()
            with contextlib.suppress(Crash), call:
                if what == "lost call":
                    raise Crash
                charged = call.settle_call(data.draw(st.floats(0, 4)))
                log["tool_calls"] += cost
                log["tool_milliseconds"] += round(1000 * charged)
                assert charged <= longest / 1000
            root.check()
        elif what == "fork" and depth:
            wants = data.draw(st.lists(st.none() | st.integers(1, 30), min_size=1, max_size=3))
            try:
                fork = ledger.fork(wants)
            except BudgetExhausted:
                root.check()
                continue
            root.check()
            paths = [0]
            with contextlib.suppress(Crash), fork:
                for child in fork.ledgers:  # further ones are appended on the way
                    log["clones"] += 1
                    child_path = _surviving(data, root, child, depth - 1, log)
                    paths.append(child_path)
                    if data.draw(st.booleans()):
                        fork.close(child)
                    root.check()
                    if data.draw(st.integers(0, 3)) == 0:
                        with contextlib.suppress(BudgetExhausted):
                            fork.add([data.draw(st.none() | st.integers(1, 30))], keep=data.draw(st.none() | st.integers(0, 9)))
                        root.check()
                if data.draw(st.booleans()):
                    raise Crash
            path += max(paths)
            root.check()
        elif what == "crash":
            break
    return path


def _surviving(data, root, child, depth, log) -> int:
    return grow(data, root, child, depth, log)


@settings(max_examples=400)
@given(budgets, st.data())
def test_conservation_over_random_trees(budget: Budget, data: st.DataObject):
    ledger = Ledger.for_root(budget)
    log = {"generated": 0, "clones": 0, "tool_calls": 0, "tool_milliseconds": 0}
    path = grow(data, ledger, ledger, 2, log)
    ledger.check()
    for currency in CURRENCIES:
        assert ledger.reserved(currency) == 0, currency
        limit = getattr(budget, currency)
        assert limit is None or ledger.spent(currency) <= limit
    # What was used was charged, once: nothing lost on any way out, nothing counted twice.
    assert ledger.spent("generated") == ledger.total("generated") == log["generated"]
    assert all(ledger.spent(currency) == log[currency] for currency in ("clones", "tool_calls", "tool_milliseconds"))
    assert ledger.spent("critical_path") == path


def test_siblings_cannot_both_spend_the_same_remainder():
    ledger = Ledger.for_root(Budget(generated=10))
    with ledger.fork([8, 8]) as fork:
        first, second = fork.ledgers
        assert first.left("generated") + second.left("generated") == 10
        assert ledger.left("generated") == 0
        with pytest.raises(BudgetExhausted):
            first.reserve(6, 0)
        with pytest.raises(BudgetExhausted):
            ledger.reserve(1, 0)


def test_clones_that_start_one_after_another_in_one_fork_spend_the_path_of_the_longest():
    ledger = Ledger.for_root(Budget(generated=30, critical_path=10, answer_reserve=4))
    with Fork(ledger) as fork:
        for tokens in (5, 10, 3):
            (child,) = fork.add([None], keep=0)
            assert child.sampleable(final=True) == min(10, ledger.budget.generated - ledger.total("generated"))
            with child.reserve(tokens, 0) as grant:
                grant.settle(tokens, 0)
            fork.close(child)
            ledger.check()
        assert ledger.spent("critical_path") == 10 and ledger.left("critical_path") == 0
    assert (ledger.spent("generated"), ledger.spent("critical_path"), ledger.spent("clones")) == (18, 10, 3)
    with ledger.fork([None], answer_reserve=1) as fork:
        assert fork.ledgers[0].left("generated") == 12 - 4 and fork.ledgers[0].sampleable() == 0


def test_what_a_clone_spent_is_not_lost_when_it_crashes():
    ledger = Ledger.for_root(Budget(generated=10))
    with contextlib.suppress(Crash), ledger.fork([None]) as fork:
        with fork.ledgers[0].reserve(7, 0) as grant:
            grant.settle(4, 0)
        raise Crash
    assert ledger.spent("generated") == 4 and ledger.left("generated") == 6


def test_zero_is_nothing_and_none_is_unlimited():
    with pytest.raises(BudgetExhausted):
        Ledger.for_root(Budget(generated=0)).reserve(1, 0)
    assert Ledger.for_root(Budget(generated=0)).sampleable() == 0
    assert Ledger.for_root(Budget()).sampleable() is None
    Ledger.for_root(Budget()).reserve(10**9, 10**9)
    with pytest.raises(BudgetExhausted):
        Ledger.for_root(Budget(clones=0)).fork([None])
    with Ledger.for_root(Budget(generated=100)).fork([None]) as fork:
        assert fork.ledgers[0].limit("clones") is None and fork.ledgers[0].limit("generated") == 100
    with Ledger.for_root(Budget(generated=0)).fork([None, 5]) as fork:
        assert [child.limit("generated") for child in fork.ledgers] == [0, 0]


def test_parallel_clones_share_the_critical_path_and_do_not_add_it_up():
    ledger = Ledger.for_root(Budget(critical_path=50))
    with ledger.reserve(10, 0) as grant:
        grant.settle(10, 0)
    with ledger.fork([None, None, None]) as fork:
        for child, used in zip(fork.ledgers, (5, 20, 9), strict=True):
            assert child.left("critical_path") == 40
            with child.reserve(used, 0) as grant:
                grant.settle(used, 0)
    assert ledger.spent("critical_path") == 30 and ledger.left("critical_path") == 20
    assert ledger.spent("generated") == 44


def test_the_answer_reserve_is_kept_from_samples_and_from_clones():
    ledger = Ledger.for_root(Budget(generated=20, answer_reserve=6))
    assert ledger.sampleable() == 14 and ledger.sampleable(final=True) == 20
    with ledger.fork([None, None]) as fork:
        assert sum(child.limit("generated") for child in fork.ledgers) == 14
        assert ledger.sampleable(final=True) == 6


def test_misuse_is_an_error_of_its_own():
    ledger = Ledger.for_root(Budget(generated=10))
    grant = ledger.reserve(5, 0)
    with pytest.raises(LedgerError, match="used 6"):
        grant.settle(6, 0)
    assert ledger.reserved("generated") == 0
    with pytest.raises(LedgerError, match="settled already"):
        grant.settle(1, 0)
    with pytest.raises(LedgerError):
        ledger.reserve(-1, 0)
    with pytest.raises(LedgerError, match="reservations open"), ledger.fork([None]) as fork:
        fork.ledgers[0].reserve(1, 0)
        fork.close(fork.ledgers[0])
    assert isinstance(grant, Grant) and isinstance(fork, Fork)


@pytest.mark.parametrize(
    "bad", [{"generated": -1}, {"generated": 1.5}, {"generated": "9"}, {"generated": True}, {"generaeted": 1}, {"depth": -1}]
)
def test_budgets_are_validated(bad):
    with pytest.raises(ValidationError):
        Budget(**bad)


@given(st.none() | st.integers(0, 100), st.lists(st.none() | st.integers(1, 50), min_size=1, max_size=8))
def test_fair_shares(total, wants):
    shares = fair_shares(total, wants)
    if total is None:
        assert shares == wants
        return
    assert all(share >= 0 for share in shares)
    assert all(want is None or share <= want for share, want in zip(shares, wants, strict=True))
    wanted = None if None in wants else sum(wants)
    # All is handed out unless nobody wants it, up to what does not divide among capped wants.
    assert sum(shares) <= total
    assert sum(shares) >= min(total if wanted is None else min(total, wanted), total) - len(wants)
    unsatisfied = [s for s, w in zip(shares, wants, strict=True) if w is None or s < w]
    assert not unsatisfied or max(shares) - min(unsatisfied) <= 1
    assert POOLED
