"""Every interleaving of small trees, and every sequence of operations on small ledgers against an independent model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import pytest

from ramet.agents.budget import CURRENCIES, Budget, Fork, Grant, Ledger
from ramet.agents.growth import Growth
from ramet.agents.protocol import render_call
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import Fault, PlainFormat, ScriptedPolicy
from ramet.agents.simulation import explore
from ramet.agents.tools import Tools, tool
from ramet.agents.tree import Message, Status, Task, Tree
from ramet.benchmarks.faults.invariants import Means, Setup, check_growth, check_quiet, check_tree
from ramet.errors import BudgetExhausted, TransientPolicyError


def test_all_orders_of_independent_steps_are_found():
    seen = set()

    async def main() -> None:
        order = ""

        async def worker(name: str) -> None:
            nonlocal order
            for _ in range(3):
                order += name
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(worker, "a")
            group.start_soon(worker, "b")
        seen.add(order)

    _, all_of_them = explore(main)
    assert all_of_them and len(seen) == 20  # 6 choose 3


TASK = Task("t", (Message("user", "go"),))


def delegating(context: str) -> str:
    if context.startswith("T") and "1: " not in context:
        return f"<tool_call>{render_call(['a', {'objective': 'b', 'max_tokens': 12}])}</tool_call>\0"
    return "Answer: 1\0"


def once(request: object, attempt: int) -> Fault | None:
    return Fault(2, error=TransientPolicyError("reset", 0.0)) if attempt == 0 else None


CASES: dict[str, tuple[Budget, dict[str, object], int]] = {
    "plain": (Budget(generated=300, critical_path=200, clones=2), {}, 2),
    "one at a time": (Budget(generated=300), {}, 1),
    "scarce": (Budget(generated=len(delegating("T")) + 14, answer_reserve=3), {}, 2),
    "failing once": (Budget(generated=400), {"faults": once}, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cancel", [False, True])
def test_small_trees_hold_in_every_interleaving(case, cancel):
    """Root and two clones, at a stride of 50 tokens an await; with `cancel`, a bystander cancels the first clone."""
    budget, options, concurrency = CASES[case]
    roots: list[Growth] = []
    statuses: set[tuple[Status, ...]] = set()

    def observe() -> None:
        for root in roots:
            check_growth(root, {})

    async def main() -> None:
        roots.clear()
        policy = ScriptedPolicy(delegating, stride=50, **options)  # type: ignore[arg-type]
        runtime = Runtime(policy, PlainFormat(), concurrency=concurrency, watch=roots.append)
        trees: list[Tree] = []

        async def bystander() -> None:
            while not (roots and roots[0].clones):
                await anyio.sleep(0.001)
                if trees:
                    return
            roots[0].clones[0].cancel()

        async def grow() -> None:
            trees.append(await runtime.run(TASK, budget, 1))

        async with anyio.create_task_group() as group:
            group.start_soon(grow)
            if cancel:
                group.start_soon(bystander)
        check_tree(trees[0], Setup(budget, Means(policy)))
        check_quiet([policy])
        statuses.add(tuple(branch.status for branch in trees[0].branches))

    # With a cancellation at any point there are too many to see all; the first of them differ at the end of the run.
    count, everything = explore(main, observe, max_runs=500)
    assert everything or (cancel and count == 500)
    assert statuses


@tool(cost=2, timeout=1.0)
async def short(n: int) -> int:
    """Gives way once."""
    await anyio.lowlevel.checkpoint()
    return n


@tool(parallel=False)
async def single(n: int) -> int:
    """Gives way once, beside no other of its kind."""
    await anyio.lowlevel.checkpoint()
    return n


NAMES = ("short", "single", "single")
CALLS = "".join(f'<tool_call>{{"name":"{name}","arguments":{{"n":{n}}}}}</tool_call>' for n, name in enumerate(NAMES))


@pytest.mark.parametrize("clone", [False, True])
@pytest.mark.parametrize("budget", [Budget(tool_calls=4), Budget(tool_calls=3, tool_seconds=9.0), Budget(tool_calls=4, seconds=0.0)])
def test_tools_hold_in_every_interleaving(budget: Budget, clone: bool):
    """Three calls, two of which may not run side by side, under limits that allow all or all but one, and one cut at once."""
    roots: list[Growth] = []
    spawned = f"<tool_call>{render_call(['a'])}</tool_call>" * clone

    def program(context: str) -> str:
        return f"{CALLS}{spawned}\0" if context.startswith("T") and "go" in context and "<" not in context else "Answer: 1\0"

    def observe() -> None:
        for root in roots:
            check_growth(root, {})

    async def main() -> None:
        roots.clear()
        policy = ScriptedPolicy(program, stride=1000)
        runtime = Runtime(policy, PlainFormat(), tools=[short, single], watch=roots.append)
        tree = await runtime.run(TASK, budget, 1)
        check_tree(tree, Setup(budget, Means(policy, tools=Tools([short, single]))))
        check_quiet([policy])
        if budget.seconds is None:
            assert [call.result.text for call in tree.root.turns[0].calls][:2] == ["0", "1"]
            assert tree.usage.tool_calls == budget.tool_calls and tree.answer == "1" and tree.usage.clones == clone

    count, everything = explore(main, observe, max_runs=150)
    assert everything or count == 150


LIMITS = Budget(generated=6, prefilled=5, critical_path=5, clones=3, turns=2, branch_generated=4, answer_reserve=1)


@dataclass
class Account:
    """The model: what happened in one branch, written down. Everything else is added up from it."""

    limit: dict[str, int | None]
    spent: list[tuple[int, int, int]] = field(default_factory=list)
    """Settled samples: generated, prefilled, turns."""
    grants: list[tuple[int, int]] = field(default_factory=list)
    forks: list[tuple[bool, list[tuple[bool, Account]]]] = field(default_factory=list)
    """Each fork, whether it is open, and its clones, whether they are open."""

    def expected(self) -> dict[str, tuple[int, int]]:
        """Spent and reserved in every currency."""
        own = sum(g for g, _, _ in self.spent)
        held = sum(g for g, _ in self.grants)
        clones = [clone for _, clones in self.forks for clone in clones]
        closed = [account.expected() for is_open, account in clones if not is_open]
        waiting = [account.limit for is_open, account in clones if is_open]
        path = longest = 0
        for is_open, made in self.forks:  # of those that are closed, the longest is spent; what a longer one may still take is held
            done = max((account.expected()["critical_path"][0] for alive, account in made if not alive), default=0)
            path += done
            longest += max(account.limit["critical_path"] or 0 for _, account in made) - done if is_open else 0
        return {
            "generated": (own + sum(c["generated"][0] for c in closed), held + sum(w["generated"] or 0 for w in waiting)),
            "prefilled": (
                sum(p for _, p, _ in self.spent) + sum(c["prefilled"][0] for c in closed),
                sum(p for _, p in self.grants) + sum(w["prefilled"] or 0 for w in waiting),
            ),
            "clones": (sum(1 + c["clones"][0] for c in closed), sum(1 + (w["clones"] or 0) for w in waiting)),
            "critical_path": (own + path, held + longest),
            "branch_generated": (own, held),
            "turns": (sum(t for _, _, t in self.spent), len(self.grants)),
        }

    def signature(self) -> object:
        return (
            tuple(self.limit.values()),
            tuple(sorted(self.spent)),
            tuple(sorted(self.grants)),
            tuple((is_open, tuple((alive, account.signature()) for alive, account in made)) for is_open, made in self.forks),
        )


class World:
    """Real ledgers and the model side by side; `moves` are the operations that can come next, by name."""

    def __init__(self) -> None:
        root = Ledger.for_root(LIMITS)
        self.root = Account({c: root.limit(c) for c in CURRENCIES})
        self.branches: list[tuple[Ledger, Account]] = [(root, self.root)]
        self.grants: list[tuple[Grant, Account, tuple[int, int]]] = []
        self.forks: list[tuple[Fork, Account, int]] = []

    def moves(self) -> dict[str, Callable[[], None]]:
        moves: dict[str, Callable[[], None]] = {}
        for number, (ledger, account) in enumerate(self.branches):
            if self._busy(account):
                continue
            for generated in (1, 3):
                moves[f"reserve {generated} in {number}"] = lambda a=(ledger, account, generated): self._reserve(*a)
            if len(self.branches) < 4:
                for wants in ([None], [None, 1], [0, None]):
                    moves[f"fork {wants} in {number}"] = lambda a=(ledger, account, wants): self._fork(*a)
        for number, (grant, account, amounts) in enumerate(self.grants):
            for used, turns in ((amounts[0], 1), (0, 1), (amounts[0] - 1, 0)):
                moves[f"settle {used} {turns} of {number}"] = lambda a=(number, used, turns): self._settle(*a)
            moves[f"drop {number}"] = lambda a=number: self._settle(a, None, 0)
            del grant, account
        for number, (_, account, at) in enumerate(self.forks):
            made = account.forks[at][1]
            for i, (is_open, clone) in enumerate(made):
                if is_open and not clone.grants and not self._busy(clone):
                    moves[f"close {i} of {number}"] = lambda a=(number, i): self._close(*a)
            if not any(clone.grants or self._busy(clone) for is_open, clone in made if is_open):
                moves[f"leave {number}"] = lambda a=number: self._leave(a)
        return moves

    def _busy(self, account: Account) -> bool:
        """A branch whose clones run does nothing itself; a closed one neither."""
        closed = any(clone is account and not is_open for a in self._all() for _, made in a.forks for is_open, clone in made)
        return closed or any(is_open for is_open, _ in account.forks)

    def _all(self) -> list[Account]:
        return [account for _, account in self.branches]

    def _reserve(self, ledger: Ledger, account: Account, generated: int) -> None:
        try:
            grant = ledger.reserve(generated, 1)
        except BudgetExhausted:
            wanted = {"generated": generated, "critical_path": generated, "branch_generated": generated, "prefilled": 1, "turns": 1}
            has = account.expected()
            short = [c for c, amount in wanted.items() if sum(has[c]) + amount > (account.limit[c] if account.limit[c] is not None else 99)]
            assert short, "refused although there was enough"
            return
        account.grants.append((generated, 1))
        self.grants.append((grant, account, (generated, 1)))

    def _settle(self, number: int, used: int | None, turns: int) -> None:
        grant, account, amounts = self.grants.pop(number)
        if used is None:
            grant.__exit__(None, None, None)
        else:
            grant.settle(used, 1, turns)
            account.spent.append((used, 1, turns))
        account.grants.remove(amounts)

    def _fork(self, ledger: Ledger, account: Account, wants: list[int | None]) -> None:
        try:
            fork = ledger.fork(wants)
        except BudgetExhausted:
            limit = account.limit["clones"]
            assert limit is not None and sum(account.expected()["clones"]) + len(wants) > limit
            return
        made = [(True, Account({c: clone.limit(c) for c in CURRENCIES})) for clone in fork.ledgers]
        account.forks.append((True, made))
        self.forks.append((fork, account, len(account.forks) - 1))
        self.branches += [(clone, a) for clone, (_, a) in zip(fork.ledgers, made, strict=True)]

    def _close(self, number: int, i: int) -> None:
        fork, account, at = self.forks[number]
        fork.close(fork.ledgers[i])
        account.forks[at][1][i] = (False, account.forks[at][1][i][1])

    def _leave(self, number: int) -> None:
        fork, account, at = self.forks.pop(number)
        fork.__exit__(None, None, None)
        account.forks[at] = (False, [(False, clone) for _, clone in account.forks[at][1]])

    def check(self) -> None:
        self.branches[0][0].check()
        for ledger, account in self.branches:
            for currency, (spent, held) in account.expected().items():
                limit = ledger.limit(currency)
                closed = not ledger._open
                assert ledger.spent(currency) == spent, currency
                assert closed or ledger.reserved(currency) == held, currency
                assert limit is None or spent + held <= limit, currency


def test_every_short_sequence_of_operations_keeps_the_books():
    """Breadth first over all sequences of up to six operations; states that the model cannot tell apart are one."""
    seen: set[object] = set()
    frontier: list[list[str]] = [[]]
    for _ in range(6):
        following = []
        for path in frontier:
            for name in _at(path).moves():
                world = _at(path)
                world.moves()[name]()
                world.check()
                signature = world.root.signature()
                if signature not in seen:
                    seen.add(signature)
                    following.append([*path, name])
        frontier = following
    assert len(seen) > 4000, len(seen)


def _at(path: list[str]) -> World:
    world = World()
    for name in path:
        world.moves()[name]()
    return world
