"""What must hold in every run of the runtime, counted from outside and compared with what it claims.

`check_growth` compares a growing tree's ledgers with the tokens that stand in its branches, `check_tree` a
finished one with the tokens that the engine emitted and with its budget. Neither uses the ledger's
own arithmetic for what it expects.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ramet.agents.budget import CURRENCIES, POOLED, Budget
from ramet.agents.context import ContextStore
from ramet.agents.events import BranchEnded, BranchStarted, CallEnded, CallMade, Event, TokensSampled, TreeEnded
from ramet.agents.growth import Growth, seed_of
from ramet.agents.protocol import MAX_CALLS, NO_SPAWNING, OUT_OF_BUDGET_NOTICE, SPAWN, Objective, SpawnClone, parse_call
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.tools import Tool, Tools
from ramet.agents.tree import Branch, Status, StopReason, ToolStatus, Tree, Turn
from ramet.errors import CallError, InvariantViolation


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


@dataclass(frozen=True, slots=True)
class Means:
    """What a branch works with, as its scenario has it."""

    policy: ScriptedPolicy
    chat: PlainFormat = field(default_factory=PlainFormat)
    tools: Tools = field(default_factory=Tools)
    trainable: bool = True

    def held(self, depth: int) -> Mapping[str, Tool]:
        """The tools of a branch at this depth."""
        nowhere = {"everywhere": (), "clones": (0,), "root": range(1, depth + 1)}[self.tools.at]
        return {} if depth in nowhere else {tool.name: tool for tool in self.tools.tools}


@dataclass(frozen=True, slots=True)
class Setup:
    """What the trees of a scenario grow in, known from outside.

    root      what the root works with, and clones without a role
    roles     what clones of a role work with; None: with what their parents do
    approved  whether a call is made, of the branch's id, the tool's name and the arguments
    """

    budget: Budget
    root: Means
    roles: Mapping[str, Means | None] = field(default_factory=dict)
    store: ContextStore = field(default_factory=lambda: ContextStore({}))
    approved: Callable[[str, str, str], bool] = lambda branch, name, arguments: True

    @property
    def policies(self) -> list[ScriptedPolicy]:
        """All policies in it."""
        return [self.root.policy, *(means.policy for means in self.roles.values() if means is not None)]


def check_tree(tree: Tree, setup: Setup, punctual: bool = True, resumed: bool = False) -> None:
    """A finished tree: its budget, its tokens beside the engine's, one result a clone and a call, and what is trained.

    A `resumed` tree may hold tokens that an earlier engine emitted, and pass its limits by what was cut then; one that is
    not `punctual` shared its thread with something slow, and may pass its deadline.
    """
    budget, usage = setup.budget, tree.usage
    turns = [turn for branch in tree.branches for turn in branch.turns]
    cut = {"prefilled": sum(turn.discarded_prefilled for turn in turns), "generated": sum(turn.discarded for turn in turns)}
    cut["critical_path"] = cut["generated"]
    for name in ("generated", "prefilled", "critical_path", "clones", "tool_calls", "tool_seconds"):
        limit, spent = getattr(budget, name), getattr(usage, name)
        require(limit is None or spent <= limit + 1e-9 + (cut.get(name, 0) if resumed else 0), f"{spent} {name} of {limit}")
    if budget.seconds is not None and punctual:
        require(usage.seconds <= budget.seconds + 1e-6, f"{usage.seconds} seconds of {budget.seconds}")
    require(usage.generated == sum(b.generated for b in tree.branches), "usage is not the sum of the branches")
    calls = [call for turn in turns for call in turn.calls]
    require(usage.tool_calls == sum(call.cost for call in calls), "usage has other tool_calls than the branches")
    require(abs(usage.tool_seconds - sum(call.seconds for call in calls)) < 1e-6, "usage has other tool_seconds than the branches")
    ids = [branch.id for branch in tree.branches]
    require(len(ids) == len(set(ids)), "two branches have one name")
    pending = [(tree.root, setup.root)]
    while pending:
        branch, means = pending.pop()
        for clone in branch.clones:
            own = means if clone.role == branch.role else setup.roles[clone.role]
            pending.append((clone, own or means))
        _check_finished(tree, branch, setup, means, resumed)


def _check_finished(tree: Tree, branch: Branch, setup: Setup, means: Means, resumed: bool) -> None:
    """One branch of a finished tree."""
    budget, policy = setup.budget, means.policy
    lost = sum(turn.discarded for turn in branch.turns) if resumed else 0
    context = min(filter(None, (budget.context, policy.context)), default=None)
    own = [turn for turn in branch.turns if _counts(turn)]
    require(budget.depth is None or branch.depth <= budget.depth, f"{branch.id} is too deep")
    require(budget.turns is None or len(own) <= budget.turns, f"{branch.id} has {len(own)} turns")
    most = budget.branch_generated
    require(most is None or branch.generated <= most + lost, f"{branch.id}: {branch.generated} tokens")
    last = branch.turns[-1] if branch.turns else None
    closing = last.free or last.written if last is not None and branch.status is Status.ANSWERED else 0
    length = len(branch.ids) - closing  # an answer that a program states needs no room
    require(context is None or not own or length <= context, f"{branch.id}: a context of {length}")
    answered = branch.status in (Status.ANSWERED, Status.OUT_OF_BUDGET)
    require(branch.answer is None or answered, f"{branch.id}: {branch.status} with an answer")
    require(branch.trainable == means.trainable, f"{branch.id}, {branch.role or 'of no role'}: trainable is {branch.trainable}")
    sampled: list[int] = []
    for number, turn in enumerate(branch.turns):
        within = budget.width is None or turn.started or len(turn.clones) <= budget.width
        require(within, f"{branch.id} started {len(turn.clones)} at once")
        key = f"{tree.task_id}/{tree.seed}", seed_of(tree.seed, branch.id, number)
        made, has = policy.emitted.get(key, []), len(turn.sampled) - turn.written + turn.discarded
        require(sum(made) == has or (resumed and sum(made) < has), f"{branch.id} turn {number}: {made} emitted, {has} recorded")
        if turn.stop is not StopReason.FAILED:
            sampled += policy.given.get(key, turn.sampled[turn.written :])
        _check_turn(branch, turn, setup, means)
    trained = [index for index, is_trained in zip(branch.ids, branch.mask, strict=True) if is_trained]
    require(trained == sampled, f"{branch.id}: {len(trained)} tokens to be trained, {len(sampled)} sampled")


@dataclass(frozen=True, slots=True)
class _Made:
    """The calls that a turn makes, read from outside.

    heads   what stands before the reply of each in the branch's context
    uses    those of tools, by their number: name and arguments
    spawns  the number of the call that starts clones, and the call; None without
    """

    heads: list[str]
    uses: dict[int, tuple[str, Any]]
    spawns: tuple[int, SpawnClone] | None


def _made(branch: Branch, turn: Turn, setup: Setup, means: Means) -> _Made:
    budget, held = setup.budget, means.held(branch.depth)
    may_spawn = (budget.depth is None or branch.depth < budget.depth) and budget.clones != 0 and budget.width != 0
    parsed = means.chat.parse(turn.appended[: turn.free] if turn.free else turn.sampled)
    uses: dict[int, tuple[str, Any]] = {}
    clones: dict[int, SpawnClone] = {}
    if parsed.error:
        return _Made(["call" if held else SPAWN], {}, None)
    for number, text in enumerate(parsed.calls[:MAX_CALLS]):
        try:
            data = json.loads(text)
        except ValueError:
            continue
        if isinstance(data, dict) and data.get("name") in held and isinstance(data.get("arguments", {}), dict) and len(data) <= 2:
            uses[number] = data["name"], data.get("arguments", {})
        elif may_spawn and isinstance(data, dict) and data.get("name") == SPAWN:
            try:
                clones[number] = parse_call(text)
            except CallError:
                continue
    if len(clones) > 1 or (not held and len(parsed.calls) > 1):
        clones = {}
    heads = [uses[n][0] if n in uses else SPAWN if n in clones or not held else "call" for n in range(len(parsed.calls) if held else 1)]
    return _Made(heads, uses, next(iter(clones.items()), None))


def _check_turn(branch: Branch, turn: Turn, setup: Setup, means: Means) -> None:
    """The calls of a turn: each on record, charged, and answered in order, unless the branch ended or had no room."""
    made = _made(branch, turn, setup, means)
    recorded = {call.number: call for call in turn.calls}
    require([call.number for call in turn.calls] == sorted(recorded), f"{branch.id} has calls {[call.number for call in turn.calls]}")
    for number, call in recorded.items():
        use = call.name, json.loads(call.arguments)
        require(made.uses.get(number) == use, f"{branch.id}: call {number} is {use} on record, {made.uses.get(number)} in the turn")
        tool, refused = means.tools.named[call.name], call.result.status is ToolStatus.REFUSED
        require(call.cost == (0 if refused else tool.cost), f"{branch.id}: {call.name} of cost {tool.cost} was charged {call.cost}")
        require(call.seconds <= tool.timeout + 0.001, f"{branch.id}: {call.name} took {call.seconds} of {tool.timeout} seconds")
        require(refused or setup.approved(branch.id, call.name, call.arguments), f"{branch.id}: {call.name} was not approved")
    requests = _requests(branch, made, setup)
    for clone, request in zip(turn.clones, requests, strict=False):
        require(clone.objective == request.objective, f"{clone.id} does {clone.objective!r}, not {request.objective!r}")
        role = branch.role if request.role is None else request.role
        require(clone.role == role, f"{clone.id} is {clone.role!r}, not {role!r}")
    within = turn.started or len(turn.clones) <= len(requests)
    require(within, f"{branch.id} started {len(turn.clones)} clones for {len(requests)} objectives")
    reply = means.chat.text(turn.appended[turn.free :])
    opening = "$<" if turn.stop is StopReason.LENGTH else "<"
    require(not reply or reply.startswith(opening), f"{branch.id}: a turn that ended by {turn.stop.value} is followed by {reply[:20]!r}")
    reply = reply.removeprefix(opening)
    if reply and not reply.startswith((OUT_OF_BUDGET_NOTICE, "told ")):
        require(recorded.keys() == made.uses.keys(), f"{branch.id}: calls {list(made.uses)} were made, {list(recorded)} are on record")
        _check_replies(branch, turn, made, reply, requests)


def _requests(branch: Branch, made: _Made, setup: Setup) -> list[Objective]:
    """The clones that a turn may start."""
    if made.spawns is None or not setup.approved(branch.id, SPAWN, made.spawns[1].model_dump_json()):
        return []
    try:
        requests, _ = made.spawns[1].requests(setup.store)
    except CallError:
        return []
    return requests if all(request.role is None or request.role in setup.roles for request in requests) else []


def _check_replies(branch: Branch, turn: Turn, made: _Made, reply: str, requests: Sequence[Objective]) -> None:
    """Every call has its block in the parent's next message, in order, and every clone's result is a line of its."""
    blocks, start = [reply], 0
    if len(made.heads) > 1:
        places = [start := f"\n{reply}".find(f"\n{head}: ", start) + 1 for head in made.heads]
        require(0 not in places and places[0] == 1, f"{branch.id}: calls {made.heads} were answered with {reply!r}")
        blocks = [f"\n{reply}"[a:b] for a, b in zip(places, [*places[1:], None], strict=True)]
    for call in turn.calls:
        block = blocks[call.number]
        cut = "…" in block or "cut ..." in block
        require(cut or call.result.block() in block, f"{branch.id}: {call.name} gave {call.result.block()!r} and the branch read {block!r}")
    programmed = any(turn.written or turn.free for turn in branch.turns)
    if made.spawns is None or (programmed and NO_SPAWNING in blocks[made.spawns[0]]):  # a program may let the model go on without clones
        require(made.spawns is None or not turn.clones, f"{branch.id} has clones and read that it can have none")
        return
    lines = re.findall(r"^(\d+): (.*)$", blocks[made.spawns[0]].rstrip(">"), re.MULTILINE)
    numbers = [int(number) for number, _ in lines]
    require(numbers == list(range(1, (len(requests) or 1) + 1)), f"{branch.id}: {len(lines)} results for {len(requests)} objectives")
    for clone, (_, line) in zip(turn.clones, lines, strict=False):
        cut = "…" in line or "cut ..." in line
        stated = clone.answer if clone.status is Status.ANSWERED else f"({clone.status.value}"
        require(cut or str(stated) in line, f"{branch.id}: {clone.id} ended as {stated!r} and its parent read {line!r}")


def check_events(events: Sequence[Event]) -> Tree:
    """What a reader of a tree's events was told is what became of the tree: every branch, every token and every call, once. The tree."""
    (last,) = [event for event in events if isinstance(event, TreeEnded)]
    require(last is events[-1], "a tree ends before its last event")
    started = [event.branch for event in events if isinstance(event, BranchStarted)]
    ended = [event for event in events if isinstance(event, BranchEnded)]
    require(len(set(started)) == len(started) and Counter(started) == Counter(event.branch for event in ended), f"{started} started")
    tokens: Counter[str] = Counter()
    for event in events:
        if isinstance(event, TokensSampled):
            tokens[event.branch] += len(event.ids)
    made = Counter((event.branch, event.name, event.arguments) for event in events if isinstance(event, CallMade))
    results = Counter((event.branch, event.name, event.result) for event in events if isinstance(event, CallEnded))
    statuses = {event.branch: (event.status, event.answer) for event in ended}
    for branch in last.tree.branches:
        began = branch.id in statuses
        require(began or not branch.turns, f"a reader was not told of {branch.id}")
        if began and branch.status is not Status.TIMED_OUT:
            require(statuses[branch.id] == (branch.status, branch.answer), f"{branch.id} ended otherwise than a reader was told")
        has = sum(len(turn.sampled) + turn.discarded for turn in branch.turns)
        written = sum(turn.written for turn in branch.turns)  # told where the model has gone on with it
        reported = tokens[branch.id]
        why = f"{branch.id} sampled {has} tokens, {written} of them written; a reader was told of {reported}"
        require(has - written <= reported <= has, why)
        calls = [call for turn in branch.turns for call in turn.calls]
        missing = Counter((branch.id, call.name, call.arguments) for call in calls) - made
        require(not missing, f"a reader was not told of {missing}")
        results.subtract((branch.id, call.name, call.result) for call in calls if call.result.status is not ToolStatus.REFUSED)
    require(not any(results.values()), f"calls ended otherwise than a reader was told: {results}")
    return last.tree


def check_quiet(policies: Sequence[ScriptedPolicy]) -> None:
    """Only the task that calls this is still running."""
    running = sum(policy.running for policy in policies)
    require(running == 0, f"{running} requests outlive their trees")
    left = asyncio.all_tasks() - {asyncio.current_task()}
    require(not left, f"{len(left)} tasks outlive the run")
