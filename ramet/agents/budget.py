"""Budgets, and the ledgers that enforce them by escrow.

A `Budget` is frozen data: the limits of one tree. `None` is unlimited, 0 allows nothing.

A `Ledger` is the account of one branch. Everything is reserved before it is spent, so that in every currency and at every moment

    spent + reserved <= limit

Two things are charged although no grant covers them (`Ledger.charge`), and raise the limits where need be: what a backend generated
past its grant, against the contract, and what an earlier run had spent on a sample when it was interrupted.

Starting clones (`fork`) reserves their shares in the parent's ledger; a clone's own ledger has its share as its limit. What the clone
did not use is returned when its ledger closes, however the clone ends. No method awaits, so each is atomic under anyio.

There are three kinds of currency:
- pooled (`generated`, `prefilled`, `clones`, `tool_calls`, `tool_milliseconds`): the shares of parallel clones add up;
- sequential (`critical_path`): parallel clones run side by side, so a fork reserves the longest share and spends the longest use;
- per branch (`branch_generated`, `turns`): every branch has the full limit.

Width, depth and context are checked where they arise (`ramet.agents.actor`), and `seconds` is the deadline of the tree
(`ramet.agents.runtime`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field, field_validator

from ramet.errors import BudgetExhausted, LedgerError
from ramet.schema import Section

_Limit = Annotated[int, Field(ge=0, strict=True)]


class Budget(Section):
    """Limits of one tree. `None` (in files: "unlimited") is unlimited; 0 allows nothing."""

    generated: _Limit | None = None
    """Sampled tokens over all branches."""
    prefilled: _Limit | None = None
    """Prompt tokens that the backend has to compute, over all branches."""
    critical_path: _Limit | None = None
    """Sampled tokens along the longest chain of branches that wait for one another."""
    clones: _Limit | None = None
    """Clones started in the whole tree."""
    width: _Limit | None = 32
    """Clones in one call."""
    depth: _Limit | None = 1
    """Levels of clones under the root; 0: no spawning. Unlimited is 2,000."""
    turns: _Limit | None = 16
    """Sampled turns of one branch."""
    branch_generated: _Limit | None = None
    """Sampled tokens of one branch."""
    context: _Limit | None = None
    """Tokens in the context of one branch."""
    answer_reserve: _Limit = 0
    """Generated tokens that each branch keeps for stating an answer once everything else is spent."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Wall-clock seconds for the whole tree."""
    tool_calls: _Limit | None = None
    """Calls of tools, each at its tool's cost, over all branches."""
    tool_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds that tools run, over all branches, calls that run side by side added up."""

    @property
    def tool_milliseconds(self) -> int | None:
        """`tool_seconds` as ledgers count it, in whole numbers."""
        return None if self.tool_seconds is None else int(1000 * self.tool_seconds)

    @field_validator("*", mode="before")
    @classmethod
    def _unlimited(cls, value: Any) -> Any:
        return None if value == "unlimited" else value


POOLED = ("generated", "prefilled", "clones", "tool_calls", "tool_milliseconds")
TOOLS = ("tool_calls", "tool_milliseconds")
"""What a call of a tool is spent in."""
SAMPLED = ("generated", "critical_path", "branch_generated")
"""The currencies that every sampled token is charged in."""
CURRENCIES = (*POOLED, "critical_path", "branch_generated", "turns")
"""All currencies of a ledger."""
_NOTHING = dict.fromkeys(CURRENCIES, 0)


class Ledger:
    """The account of one branch. Create the root's with `Ledger.for_root`, a clone's with `fork`."""

    __slots__ = ("_children", "_held", "_limit", "_moves", "_open", "_past", "_share", "_spent", "budget")

    def __init__(self, budget: Budget, limit: dict[str, int | None], moves: list[int] | None = None):
        self.budget = budget
        self._moves = [0] if moves is None else moves
        self._share = limit
        self._limit = limit.copy()
        self._spent = _NOTHING.copy()
        self._held = _NOTHING.copy()
        self._past = _NOTHING.copy()
        self._children: dict[Ledger, None] = {}
        self._open = True

    @classmethod
    def for_root(cls, budget: Budget) -> Ledger:
        """The ledger of the root of a tree with this budget."""
        return cls(budget, {currency: getattr(budget, currency) for currency in CURRENCIES})

    def limit(self, currency: str) -> int | None:
        """What may be spent in all: the share, and what was charged beyond it; None if unlimited."""
        return self._limit[currency]

    def share(self, currency: str) -> int | None:
        """The limit that the ledger was opened with; None if unlimited."""
        return self._share[currency]

    def spent(self, currency: str) -> int:
        """What this branch and its closed clones have spent."""
        return self._spent[currency]

    def reserved(self, currency: str) -> int:
        """What is reserved for samples in flight and for open clones."""
        return self._held[currency]

    def amounts(self) -> tuple[int, ...]:
        """Everything spent and reserved, in the order of `CURRENCIES`; two calls return the same if nothing moved between them."""
        return (*self._spent.values(), *self._held.values())

    @property
    def moves(self) -> int:
        """How many times anything has been reserved, spent or refunded in the whole tree."""
        return self._moves[0]

    def left(self, currency: str) -> int | None:
        """What can still be reserved; None if unlimited."""
        limit = self._limit[currency]
        return None if limit is None else limit - self._spent[currency] - self._held[currency]

    def total(self, currency: str) -> int:
        """What this branch and everything under it have spent so far, running clones included. For pooled currencies."""
        return sum(ledger._spent[currency] for ledger in self._walk())

    def _walk(self) -> Iterator[Ledger]:
        """This ledger and the open ones under it. Without recursion: a chain of clones may be deeper than Python's stack."""
        stack = [self]
        while stack:
            ledger = stack.pop()
            yield ledger
            stack.extend(ledger._children)

    def sampleable(self, final: bool = False) -> int | None:
        """Tokens that the next sample may have; None if unlimited. Only the `final` one may use the answer reserve."""
        least: int | None = None
        for currency in SAMPLED:
            limit = self._limit[currency]
            if limit is not None:
                left = limit - self._spent[currency] - self._held[currency]
                least = left if least is None or left < least else least
        return None if least is None else max(least - (0 if final else self.budget.answer_reserve), 0)

    def _beyond(self, currency: str, keep: int | None) -> int | None:
        """What can still be reserved if `keep` (None: the answer reserve) stays; None if unlimited."""
        left = self.left(currency)
        return None if left is None else max(left - (self.budget.answer_reserve if keep is None else keep), 0)

    def reserve(self, generated: int, prefilled: int) -> Grant:
        """Reserve the tokens of one sample. Raises `BudgetExhausted`, reserving nothing, if any currency has too little left."""
        wanted = _sample(generated, prefilled, 1)
        self._hold(wanted)
        return Grant(self, wanted)

    def reserve_call(self, calls: int, milliseconds: int) -> CallGrant:
        """Reserve one call of a tool: its cost, and the longest that it may take. Raises `BudgetExhausted`, reserving nothing."""
        wanted = dict(zip(TOOLS, (calls, milliseconds), strict=True))
        self._hold(wanted)
        return CallGrant(self, wanted)

    def remaining(self) -> dict[str, float]:
        """What is left of each limited currency, as a `Budget` names it."""
        left: dict[str, float] = {currency: amount for currency in CURRENCIES if (amount := self.left(currency)) is not None}
        if "tool_milliseconds" in left:
            left["tool_seconds"] = left.pop("tool_milliseconds") / 1000
        return left

    def tightest(self) -> str:
        """The currency that leaves the fewest tokens to sample."""
        left = {currency: amount for currency in SAMPLED if (amount := self.left(currency)) is not None}
        return min(left, key=left.__getitem__, default=SAMPLED[0])

    def charge(self, generated: int, prefilled: int, past: bool = False) -> None:
        """Charge what no grant covers, from what is left. If too little is left, the limits are raised by the rest.

        What an earlier run spent (`past`) raises the limits by all of it, so that being interrupted does not shorten a tree.
        """
        self._moves[0] += 1
        for currency, amount in _sample(generated, prefilled, 0).items():
            self._spent[currency] += amount
            if past:
                self._past[currency] += amount
                self._raise(currency, amount)
            self._give_way(currency)

    def _raise(self, currency: str, amount: int) -> None:
        """Raise a limit by `amount`."""
        limit = self._limit[currency]
        if limit is not None:
            self._limit[currency] = limit + amount

    def _give_way(self, currency: str) -> None:
        """Raise a limit to what is spent and reserved, if it is lower."""
        limit = self._limit[currency]
        if limit is not None:
            self._limit[currency] = max(limit, self._spent[currency] + self._held[currency])

    def can_fork(self, keep: int | None = None) -> bool:
        """Whether at least one generated token is left for a clone; `keep` as in `fork`."""
        return 0 not in (self._beyond("generated", keep), self._beyond("critical_path", keep))

    def fork(
        self, wants: Sequence[int | None], keep_prefilled: int = 0, keep: int | None = None, answer_reserve: int | None = None
    ) -> Fork:
        """Open one ledger per clone; `wants` holds the `max_tokens` of each, or None for a fair share.

        The generated tokens that are left, without the `keep` that stay with this branch (None: its answer reserve), are shared by
        `fair_shares`. The other pooled currencies are shared equally; of the prefilled tokens, the branch keeps `keep_prefilled` to
        go on with. `answer_reserve` is that of the clones, if it is not this branch's own. Raises `BudgetExhausted`, reserving
        nothing, if too few `clones` are left.
        """
        fork = Fork(self)
        fork.add(wants, keep_prefilled, keep, answer_reserve)
        return fork

    def check(self) -> None:
        """Raise `LedgerError` if the invariant is broken in this ledger or in that of an open clone."""
        for ledger in self._walk():
            for currency in CURRENCIES:
                limit, spent, held = ledger._limit[currency], ledger._spent[currency], ledger._held[currency]
                if spent < 0 or held < 0 or (limit is not None and spent + held > limit):
                    raise LedgerError(f"{currency}: spent {spent} + reserved {held} against a limit of {limit}")

    def _hold(self, wanted: dict[str, int]) -> None:
        """Reserve amounts by currency, or raise `BudgetExhausted` and reserve nothing."""
        if not self._open:
            raise LedgerError("the ledger is closed")
        for currency, amount in wanted.items():
            limit = self._limit[currency]
            if amount < 0:
                raise LedgerError(f"cannot reserve {amount} {currency}")
            if limit is not None and amount > (left := limit - self._spent[currency] - self._held[currency]):
                raise BudgetExhausted(currency, amount, left)
        self._moves[0] += 1
        for currency, amount in wanted.items():
            self._held[currency] += amount

    def _settle(self, held: dict[str, int], used: dict[str, int]) -> None:
        """Turn reserved amounts into spent ones; what was not used is free again."""
        self._moves[0] += 1
        for currency, amount in held.items():
            self._held[currency] -= amount
            self._spent[currency] += used.get(currency, 0)


class Grant:
    """A reservation for one sample. If its `with` block is left unsettled, all of it is refunded."""

    __slots__ = ("_held", "_ledger", "_open")

    def __init__(self, ledger: Ledger, held: dict[str, int]):
        self._ledger = ledger
        self._held = held
        self._open = True

    @property
    def generated(self) -> int:
        """Tokens that the sample may generate."""
        return self._held["generated"]

    def settle(self, generated: int, prefilled: int, turns: int = 1) -> None:
        """Spend what was used and refund the rest. `turns` is 0 for a failed attempt, which produced no turn.

        Raises `LedgerError` if more was used than granted (charge that with `Ledger.charge`), or if the grant is settled already.
        """
        if not self._open:
            raise LedgerError("the grant is settled already")
        if not 0 <= generated <= self._held["generated"] or not 0 <= prefilled <= self._held["prefilled"]:
            self._close({})
            raise LedgerError(
                f"used {generated} generated, {prefilled} prefilled of a grant of {self._held['generated']} and {self._held['prefilled']}"
            )
        self._close(_sample(generated, prefilled, turns))

    def _close(self, used: dict[str, int]) -> None:
        if self._open:
            self._open = False
            self._ledger._settle(self._held, used)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close({})


class CallGrant(Grant):
    """A reservation for one call of a tool. Leaving its `with` block unsettled refunds all of it."""

    __slots__ = ()

    @property
    def seconds(self) -> float:
        """The longest that the call may take."""
        return self._held["tool_milliseconds"] / 1000

    def settle_call(self, seconds: float) -> float:
        """Spend the call's cost and the time that it took, at most the time reserved; refund the rest. Once. The seconds charged."""
        if not self._open:
            raise LedgerError("the grant is settled already")
        used = min(math.ceil(1000 * seconds), self._held["tool_milliseconds"])
        self._close({**self._held, "tool_milliseconds": used})
        return used / 1000


class Fork:
    """The escrow of clones that run side by side, with one of `ledgers` per clone. Leaving its `with` block closes them all.

    Further ones may be opened (`add`) while earlier ones are open or closed: of all of them, the longest counts as `critical_path`.
    """

    __slots__ = ("_longest", "_parent", "_path", "_path_held", "_without_past", "ledgers")

    def __init__(self, parent: Ledger):
        self._parent = parent
        self._longest = self._path_held = self._path = self._without_past = 0
        self.ledgers: list[Ledger] = []

    def add(
        self, wants: Sequence[int | None], keep_prefilled: int = 0, keep: int | None = None, answer_reserve: int | None = None
    ) -> list[Ledger]:
        """Open one more ledger for each of `wants`; see `Ledger.fork`."""
        parent, count = self._parent, len(wants)
        clones, prefilled, path = parent.left("clones"), parent.left("prefilled"), parent._beyond("critical_path", keep)
        if clones is not None and clones < count:
            raise BudgetExhausted("clones", count, clones)
        path = None if path is None else path + self._longest  # what those before had, these may have beside them
        each = {
            "prefilled": None if prefilled is None else max(prefilled - keep_prefilled, 0) // count,
            "clones": None if clones is None else (clones - count) // count,
            **{currency: None if (left := parent.left(currency)) is None else left // count for currency in TOOLS},
        }
        limits: list[dict[str, int | None]] = [
            {
                "generated": share,
                "critical_path": path if share is None else share if path is None else min(path, share),
                "branch_generated": parent.budget.branch_generated,
                "turns": parent.budget.turns,
                **each,
            }
            for share in fair_shares(parent._beyond("generated", keep), wants)
        ]
        longest = max(self._longest, *(limit["critical_path"] or 0 for limit in limits))
        held = {c: sum(limit[c] or 0 for limit in limits) for c in POOLED}
        held["clones"] += count
        held["critical_path"] = longest - self._longest
        parent._hold(held)
        self._path_held += longest - self._longest
        self._longest = longest
        budget = parent.budget
        if answer_reserve is not None and answer_reserve != budget.answer_reserve:
            budget = budget.model_copy(update={"answer_reserve": answer_reserve})
        opened = [Ledger(budget, limit, parent._moves) for limit in limits]
        self.ledgers += opened
        parent._children.update(dict.fromkeys(opened))
        return opened

    def close(self, ledger: Ledger) -> None:
        """Close one clone's ledger: what it spent becomes its parent's spending, and the rest is returned."""
        if not ledger._open:
            return
        if any(ledger._held.values()):
            raise LedgerError("a clone's ledger closes with reservations open")
        ledger._open = False
        parent = self._parent
        del parent._children[ledger]
        held = {currency: ledger._share[currency] or 0 for currency in POOLED}
        used = {currency: ledger._spent[currency] for currency in POOLED}
        held["clones"] += 1
        used["clones"] += 1
        path, past = ledger._spent["critical_path"], self._path - self._without_past
        used["critical_path"] = max(path - self._path, 0)
        held["critical_path"] = min(used["critical_path"], self._path_held)
        self._path_held -= held["critical_path"]
        self._path += used["critical_path"]
        self._without_past = max(self._without_past, path - ledger._past["critical_path"])
        parent._settle(held, used)
        for currency in POOLED:
            parent._past[currency] += ledger._past[currency]
            parent._raise(currency, ledger._past[currency])
            if ledger._limit[currency] != ledger._share[currency]:
                parent._give_way(currency)
        past = self._path - self._without_past - past
        parent._past["critical_path"] += past
        parent._raise("critical_path", past)
        parent._give_way("critical_path")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for ledger in self.ledgers:
            self.close(ledger)
        self._parent._settle({"critical_path": self._path_held}, {})
        self._path_held = 0


def _sample(generated: int, prefilled: int, turns: int) -> dict[str, int]:
    """The cost of one sample, by currency."""
    return {"generated": generated, "critical_path": generated, "branch_generated": generated, "prefilled": prefilled, "turns": turns}


def fair_shares(total: int | None, wants: Sequence[int | None]) -> list[int | None]:
    """Max-min fair shares of `total` tokens: none is larger than what is wanted, and otherwise all are equal.

    If the total is unlimited, each gets what it wants. Tokens left over by the division go to the first ones.
    """
    if total is None:
        return list(wants)
    shares: list[int | None] = [0] * len(wants)
    left = total
    order = sorted(range(len(wants)), key=lambda i: (wants[i] is None, wants[i] or 0, i))
    for position, i in enumerate(order):
        want = wants[i]
        waiting = len(order) - position
        share = -(-left // waiting) if want is None else min(want, left // waiting)
        shares[i] = share
        left -= share
    return shares
