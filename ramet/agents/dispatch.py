"""Making the calls of one turn: clones are spawned, tools run beside them, and the branch is told what came of it.

Every call is answered, in call order, by clones' results or by a typed tool result. Tools that allow it run in parallel with
one another and with clones; the others one after another, in order. What a turn's calls may spend is reserved before any of
them runs: the tools' first, and of what is left then the clones have their shares.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import anyio

from ramet.agents.attempts import fits
from ramet.agents.budget import CallGrant, Fork
from ramet.agents.calls import ParsedTurn
from ramet.agents.context import clone_prompt
from ramet.agents.events import CallEnded, CallMade
from ramet.agents.growth import Growth, Setting
from ramet.agents.protocol import SPAWN, CloneResult, Objective, Reply, SpawnClone, ToolUse, parse_calls, render_replies
from ramet.agents.tasks import nest, task_group
from ramet.agents.tools import BranchView, Tool, ToolRequest
from ramet.agents.tree import Branch, Message, Status, StopReason, ToolCall, ToolResult, ToolStatus, Turn
from ramet.agents.typed import AnswerType
from ramet.errors import BudgetExhausted, CallError, RametError, first_line

RunBranch = Callable[[Setting, Growth], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Shares:
    """How clones share what is left, where a program says so.

    keep            generated tokens that stay with their parent; None: its answer reserve
    answer_reserve  tokens of its share that each clone keeps for stating an answer; None: as the budget has it
    """

    keep: int | None = None
    answer_reserve: int | None = None

    def setting(self, setting: Setting) -> Setting:
        """The setting of the clones."""
        if self.answer_reserve is None:
            return setting
        return replace(setting, budget=setting.budget.model_copy(update={"answer_reserve": self.answer_reserve}))


@dataclass(frozen=True, slots=True)
class Replies:
    """What a turn's calls gave, in call order, and the keys in them that name no document."""

    replies: Sequence[Reply]
    unknown: Sequence[str] = ()


async def make_calls(setting: Setting, growth: Growth, parsed: ParsedTurn, run: RunBranch) -> Replies:
    """Make the calls of the branch's newest turn, whose text has been read."""
    held = setting.tools.held(growth.depth)
    if parsed.error:
        calls: list[SpawnClone | ToolUse | CallError] = [CallError(parsed.error)]
    else:
        calls = parse_calls(parsed.calls, setting.may_spawn(growth.depth), held)
    if not held and isinstance(calls[0], CallError):
        return Replies([Reply(SPAWN, (CloneResult(Status.REFUSED, reason=str(calls[0])),))])
    return await run_calls(setting, growth, calls, run)


async def run_calls(
    setting: Setting, growth: Growth, calls: Sequence[SpawnClone | ToolUse | CallError], run: RunBranch, shares: Shares = Shares()
) -> Replies:
    """Make calls that have been read."""
    replies: dict[int, Reply] = {}
    unknown: list[str] = []
    spawn: tuple[int, list[Objective]] | None = None
    uses: list[tuple[int, ToolUse]] = []
    for number, call in enumerate(calls):
        error: Exception | None = call if isinstance(call, CallError) else None
        if isinstance(call, SpawnClone):
            try:
                requests, unknown = call.requests(setting.store)
                check_roles(setting, requests)
            except CallError as wrong:
                error = wrong
        if error is None and not isinstance(call, CallError) and (why := await _disapproved(setting, growth, call)):
            error = CallError(why)
        if error is not None:
            replies[number] = _refused(growth, number, call, str(error))
        elif isinstance(call, SpawnClone):
            spawn = (number, requests)
        elif isinstance(call, ToolUse):
            uses.append((number, call))

    async def spawned() -> None:
        if spawn is not None:
            number, requests = spawn
            replies[number] = Reply(SPAWN, tuple(await spawn_clones(setting, growth, requests, run, shares)))

    if not uses:
        await spawned()
    else:
        await _beside(setting, growth, uses, replies, spawned)
    return Replies([replies[number] for number in range(len(calls))], unknown)


def _refused(growth: Growth, number: int, call: SpawnClone | ToolUse | CallError, why: str) -> Reply:
    """The reply to a call that is not made; one of a tool is on record."""
    if isinstance(call, SpawnClone):
        return Reply(SPAWN, (CloneResult(Status.REFUSED, reason=why),))
    if isinstance(call, CallError):
        return Reply("call", text=ToolResult(ToolStatus.INVALID, why).block())
    result = ToolResult(ToolStatus.REFUSED, why)
    growth.record(ToolCall(call.name, call.arguments, result, number))
    return Reply(call.name, text=result.block())


def check_roles(setting: Setting, requests: Sequence[Objective]) -> None:
    """Raise `CallError` if a request names a role that there is not."""
    unknown = {request.role for request in requests if request.role is not None} - setting.roles.keys()
    if unknown:
        there = f"there are {', '.join(setting.roles)}" if setting.roles else "there are none; leave it out"
        raise CallError(f"no role {', '.join(sorted(unknown))[:80]!r}; {there}")


async def _disapproved(setting: Setting, growth: Growth, call: SpawnClone | ToolUse) -> str:
    """Why a call may not be made; empty if it may."""
    name, arguments = (SPAWN, call.model_dump_json()) if isinstance(call, SpawnClone) else (call.name, call.arguments)
    if setting.emit is not None:
        setting.emit(CallMade(growth.id, name, arguments))
    if setting.approve is None:
        return ""
    try:
        return "" if await setting.approve(growth.id, name, arguments) else "not approved"
    except (RametError, anyio.get_cancelled_exc_class()):
        raise
    except Exception as error:
        return f"not approved: asking raised {type(error).__name__}: {first_line(error)}"


async def _beside(
    setting: Setting, growth: Growth, uses: Sequence[tuple[int, ToolUse]], replies: dict[int, Reply], spawned: Callable[[], Awaitable[None]]
) -> None:
    """Run the tools of a turn, beside the clones that `spawned` runs."""
    held = setting.tools.held(growth.depth)
    milliseconds = growth.ledger.left("tool_milliseconds")
    share = None if milliseconds is None else milliseconds // len(uses)
    with ExitStack() as open_grants:
        ready: list[tuple[int, ToolUse, CallGrant]] = []
        for number, use in uses:
            tool = held[use.name]
            longest = math.ceil(1000 * tool.timeout) if share is None else min(math.ceil(1000 * tool.timeout), share)
            try:
                if not longest:
                    raise BudgetExhausted("tool_seconds", tool.timeout, 0.0)
                ready.append((number, use, open_grants.enter_context(growth.ledger.reserve_call(tool.cost, longest))))
            except BudgetExhausted as error:
                replies[number] = _refused(growth, number, use, f"no {error.currency.replace('milliseconds', 'seconds')} left")

        async def one(number: int, use: ToolUse, grant: CallGrant) -> None:
            result = await _use(setting, growth, held[use.name], number, use, grant)
            replies[number] = Reply(use.name, text=result.block())

        async def in_order() -> None:
            for each in ready:
                if not held[each[1].name].parallel:
                    await one(*each)

        async with task_group() as group:
            for each in ready:
                if held[each[1].name].parallel:
                    group.start_soon(one, *each)
            group.start_soon(in_order)
            await spawned()


async def _use(setting: Setting, growth: Growth, tool: Tool, number: int, use: ToolUse, grant: CallGrant) -> ToolResult:
    """Run one call of a tool; it is charged and recorded on every way out."""
    request = ToolRequest(setting.group, growth.id, len(growth.turns) - 1, number, use.name, use.arguments)
    started = anyio.current_time()
    result, seconds = ToolResult(ToolStatus.CANCELLED, ""), None
    try:
        view = BranchView(growth.id, setting.store, growth.ledger)
        result, seconds = await setting.caller(tool, request, view, grant.seconds)
    finally:
        spent = grant.settle_call(anyio.current_time() - started if seconds is None else seconds)
        growth.record(ToolCall(use.name, use.arguments, result, number, tool.cost, spent))
        if setting.emit is not None:
            setting.emit(CallEnded(growth.id, use.name, result, spent))
    return result


async def spawn_clones(
    setting: Setting, growth: Growth, requests: Sequence[Objective], run: RunBranch, shares: Shares = Shares()
) -> list[CloneResult]:
    """Run the clones of one call. Returns their results in call order."""
    allowed = len(requests)
    reason = ""
    if setting.budget.width is not None and allowed > setting.budget.width:
        allowed, reason = setting.budget.width, f"at most {setting.budget.width} clones a call"
    clones = growth.ledger.left("clones")
    if clones is not None and allowed > clones:
        allowed, reason = clones, "no clones left"
    if allowed and not growth.ledger.can_fork(shares.keep):
        allowed, reason = 0, "no tokens left for clones"
    results = [CloneResult(Status.REFUSED, reason=reason)] * len(requests)
    if not allowed:
        return results
    plans = plans_of(shares.setting(setting), requests[:allowed])
    # Afterwards the parent reads its own context again, and results that may be just as long.
    prefilled = 2 * len(growth.ids)
    with growth.ledger.fork([plan.max_tokens for plan in plans], prefilled, shares.keep, shares.answer_reserve) as fork:
        frozen = await run_clones(growth, fork, plans, run)
    for i, branch in enumerate(frozen):
        results[i] = CloneResult(branch.status, branch.answer, branch.reason, branch.value)
    return results


@dataclass(frozen=True, slots=True)
class ClonePlan:
    """A clone that is about to start: its setting, what its prompt consists of, and what its parent asks of it."""

    setting: Setting
    messages: Sequence[Message]
    objective: str = ""
    expects: AnswerType | None = None
    max_tokens: int | None = None


def plans_of(setting: Setting, requests: Sequence[Objective], system: bool = True) -> list[ClonePlan]:
    """The clones that have these objectives; with `system`, their prompts begin by telling them that they are clones."""
    types = {id(request.expects): AnswerType(request.expects) for request in requests if request.expects is not None}
    settings = {role: setting if role is None else setting.of(role) for role in {request.role for request in requests}}
    plans = []
    for request in requests:
        own, media = settings[request.role], setting.store.media(request.context_keys)
        messages = [Message("user", clone_prompt(setting.store, request.objective, request.context_keys), media)]
        if system and own.clone_system:
            messages.insert(0, Message("system", own.clone_system))
        plans.append(ClonePlan(own, messages, request.objective, types.get(id(request.expects)), request.max_tokens))
    return plans


async def run_clones(growth: Growth, fork: Fork, plans: Sequence[ClonePlan], run: RunBranch, called: bool = True) -> tuple[Branch, ...]:
    """Run clones side by side on the newest ledgers of `fork`.

    They become part of the branch's newest turn, which `called` for them, or of one of their own (`Turn.started`), however this ends.
    """
    ledgers = fork.ledgers[-len(plans) :]
    first = sum(len(turn.clones) for turn in growth.turns)
    now = anyio.current_time()
    frozen: tuple[Branch, ...] = ()
    try:
        for i, (plan, ledger) in enumerate(zip(plans, ledgers, strict=True)):
            name = f"{growth.id}.{first + i}"
            media = tuple(segment for message in plan.messages for segment in message.media)
            prompt = plan.setting.prompt(plan.messages, ledger, name.count("."), plan.expects)
            growth.clones.append(plan.setting.growth(name, prompt, ledger, plan.objective, now, media, plan.expects))
        nest(growth.depth + 1)
        async with task_group() as group:
            for clone, plan in zip(growth.clones, plans, strict=True):
                group.start_soon(run, plan.setting, clone)
    finally:
        now = anyio.current_time()
        frozen = tuple(clone.freeze(Status.CANCELLED, now) for clone in growth.clones)
        growth.lost += sum(clone.lost for clone in growth.clones)
        growth.fault = next((clone.fault for clone in reversed(growth.clones) if clone.fault), growth.fault)
        growth.clones.clear()
        if frozen and not called:
            growth.turns.append(Turn((), (), StopReason.END, clones=frozen))
        else:
            growth.turns[-1] = replace(growth.turns[-1], clones=(*growth.turns[-1].clones, *frozen))
        for ledger in ledgers:
            fork.close(ledger)
    return frozen


def reply_ids(setting: Setting, growth: Growth, answered: Replies, length: int) -> list[int] | None:
    """The replies as ids, shortened evenly until they fit the context; None if even the shortest form does not fit.

    length  of the branch's context so far, in tokens
    """
    limit = setting.result_characters
    left = setting.left(growth.ledger)
    if answered.unknown:
        left = "\n".join(filter(None, [f"Unknown context keys: {', '.join(answered.unknown)[:200]}", left]))
    parts = sum(reply.parts for reply in answered.replies)
    closed = next(turn.stop for turn in reversed(growth.turns) if not turn.started) is StopReason.END
    while True:
        ids = setting.chat.after_calls(render_replies(answered.replies, left, limit), closed)
        if fits(setting, growth.ledger, length, ids):
            return ids
        if limit <= parts:
            return None
        limit = max(limit // 2, parts)
