"""What must hold in every run of the runtime, counted from outside and compared with what it claims.

`check_growth` compares a growing tree's ledgers with the tokens that stand in its branches, `check_tree` a
finished one with the tokens that the engine emitted and with its budget. Neither uses the ledger's
own arithmetic for what it expects.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from ramet.agents.budget import CURRENCIES, POOLED, Budget
from ramet.agents.growth import Growth, seed_of
from ramet.agents.protocol import parse_call
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.tree import Branch, Status, StopReason, Tree, Turn
from ramet.errors import InvariantViolation


def require(holds: bool, what: str) -> None:
    """Raise `Violation` with `what` unless it holds."""
    if not holds:
        raise InvariantViolation(what)


def _prefilled(turns: Sequence[Turn]) -> int:
    return sum(turn.prefilled + turn.discarded_prefilled for turn in turns)


def check_growth(growth: Growth, seen: dict[str, tuple[object, ...]]) -> None:
    """Check a growing branch and those under it: in every currency the ledger agrees with the branches, and limits hold.

    `seen` keeps each branch's state at the last check; what has not changed since is not counted again, and while nothing moves in
    the ledgers no branch is looked at, or a chain would cost its depth at every step.
    """
    moves = (growth.ledger.moves,)
    if seen.get("") == moves:
        return
    seen[""] = moves
    pending = [growth]
    while pending:
        branch = pending.pop()
        turns, clones = branch.turns, branch.clones
        pending += clones
        state = (len(turns), turns and turns[-1], len(clones), branch.discarded, branch.ended, branch.ledger.amounts())
        if seen.get(branch.id) != state:
            seen[branch.id] = state
            _check_branch(branch)


def _check_branch(growth: Growth) -> None:
    ledger, turns = growth.ledger, growth.turns
    own = sum(len(turn.sampled) + turn.discarded for turn in turns) + growth.discarded
    closed = [clone for turn in turns for clone in turn.clones]
    below = [branch for clone in closed for branch in clone.walk()]
    path = sum(len(turn.sampled) + turn.discarded + max((clone.critical_path() for clone in turn.clones), default=0) for turn in turns)
    spent = {
        "generated": own + sum(branch.generated for branch in below),
        "prefilled": _prefilled(turns) + growth.discarded_prefilled + sum(_prefilled(branch.turns) for branch in below),
        "clones": len(below),
        "critical_path": path + growth.discarded,
        "branch_generated": own,
        "tool_calls": _calls(turns) + sum(_calls(branch.turns) for branch in below),
        "tool_milliseconds": _milliseconds(turns) + sum(_milliseconds(branch.turns) for branch in below),
        "turns": sum(_counts(turn) for turn in turns),
    }
    for currency in CURRENCIES:
        has, held, limit = ledger.spent(currency), ledger.reserved(currency), ledger.limit(currency)
        require(has == spent[currency], f"{growth.id}: {has} {currency} on the ledger, {spent[currency]} in the branches")
        require(held >= 0, f"{growth.id}: {held} {currency} reserved")
        require(limit is None or has + held <= limit, f"{growth.id}: {has} spent and {held} reserved of {limit} {currency}")
    if growth.ended is not None:
        require(not growth.clones, f"{growth.id} ended before its clones")
    shares = {name: sum(clone.ledger.share(name) or 0 for clone in growth.clones) for name in POOLED}
    for name, amount in shares.items():
        if ledger.limit(name) is not None:
            require(ledger.reserved(name) >= amount, f"{growth.id}: {ledger.reserved(name)} {name} reserved for shares of {amount}")


def _counts(turn: Turn) -> bool:
    """Is it one of the `turns` of a budget? What a program writes for free, or starts without a call, is none."""
    return turn.stop is not StopReason.FAILED and not turn.free and not turn.started


def _calls(turns: Sequence[Turn]) -> int:
    return sum(call.cost for turn in turns for call in turn.calls)


def _milliseconds(turns: Sequence[Turn]) -> int:
    return sum(round(1000 * call.seconds) for turn in turns for call in turn.calls)


def check_tree(tree: Tree, budget: Budget, policy: ScriptedPolicy, punctual: bool = True, resumed: bool = False) -> None:
    """A finished tree: its budget, its tokens beside the engine's, and one result a clone.

    A `resumed` tree may hold tokens that an earlier engine emitted, and pass its limits by what was cut then; one that is
    not `punctual` shared its thread with something slow, and may pass its deadline.
    """
    usage = tree.usage
    turns = [turn for branch in tree.branches for turn in branch.turns] if resumed else []
    cut = {"prefilled": sum(turn.discarded_prefilled for turn in turns), "clones": 0}
    lost = sum(turn.discarded for turn in turns)
    for name in ("generated", "prefilled", "critical_path", "clones"):
        limit = getattr(budget, name)
        require(limit is None or getattr(usage, name) <= limit + cut.get(name, lost), f"{getattr(usage, name)} {name} of {limit}")
    if budget.seconds is not None and punctual:
        require(usage.seconds <= budget.seconds + 1e-6, f"{usage.seconds} seconds of {budget.seconds}")
    context = min(filter(None, (budget.context, policy.context)), default=None)
    for branch in tree.branches:
        own = [turn for turn in branch.turns if _counts(turn)]
        require(budget.depth is None or branch.depth <= budget.depth, f"{branch.id} is too deep")
        require(budget.turns is None or len(own) <= budget.turns, f"{branch.id} has {len(own)} turns")
        most = budget.branch_generated
        require(most is None or branch.generated <= most + lost, f"{branch.id}: {branch.generated} tokens")
        require(context is None or not own or len(branch.ids) <= context, f"{branch.id}: a context of {len(branch.ids)}")
        require(
            branch.answer is None or branch.status in (Status.ANSWERED, Status.OUT_OF_BUDGET),
            f"{branch.id}: {branch.status} with an answer",
        )
        for number, turn in enumerate(branch.turns):
            within = budget.width is None or turn.started or len(turn.clones) <= budget.width
            require(within, f"{branch.id} started {len(turn.clones)} at once")
            made = policy.emitted.get((f"{tree.task_id}/{tree.seed}", seed_of(tree.seed, branch.id, number)), [])
            has = len(turn.sampled) - turn.written + turn.discarded
            require(sum(made) == has or (resumed and sum(made) < has), f"{branch.id} turn {number}: {made} emitted, {has} recorded")
            _check_results(branch, turn)
    require(usage.generated == sum(b.generated for b in tree.branches), "usage is not the sum of the branches")
    ids = [branch.id for branch in tree.branches]
    require(len(ids) == len(set(ids)), "two branches have one name")


def _check_results(branch: Branch, turn: Turn) -> None:
    """Every clone's result is a line of its parent's next message, in order, unless the parent ended or had no room."""
    results = PlainFormat().text(turn.appended)
    if not turn.clones or not results.startswith("<1: "):
        return
    lines = re.findall(r"^<?(\d+): (.*)$", results.rstrip(">"), re.MULTILINE)
    objectives = len(parse_call(PlainFormat().parse(turn.sampled).calls[0]).objectives)
    numbers = [int(number) for number, _ in lines]
    require(numbers == list(range(1, objectives + 1)), f"{branch.id}: {len(lines)} results for {objectives} objectives")
    for clone, (_, line) in zip(turn.clones, lines, strict=False):
        cut = "…" in line or "cut ..." in line
        stated = clone.answer if clone.status is Status.ANSWERED else f"({clone.status.value}"
        require(cut or str(stated) in line, f"{branch.id}: {clone.id} ended as {stated!r} and its parent read {line!r}")


def check_quiet(policy: ScriptedPolicy) -> None:
    """Only the task that calls this is still running."""
    require(policy.running == 0, f"{policy.running} requests outlive their trees")
    left = asyncio.all_tasks() - {asyncio.current_task()}
    require(not left, f"{len(left)} tasks outlive the run")
