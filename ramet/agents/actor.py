"""The loop of one branch. Root and clone run the same code.

    reserve -> sample -> spend and refund -> read the newest turn -> answer, or spawn, or be told what is wrong

A branch ends with a status and never with an exception that belongs to it: what its policy could not
do becomes a typed result for the parent. Cancellation passes through, after what the cancelled sample
had generated is recorded and charged. When the budget is used up, the branch is told so once and
may state an answer from its reserve. A branch that ends without an answer because failed attempts have used up its
budget has failed: it ends with the last of their errors.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import anyio

from ramet.agents import drain
from ramet.agents.budget import Budget, Grant, Ledger
from ramet.agents.chat import ChatFormat
from ramet.agents.context import ContextStore, clone_prompt
from ramet.agents.protocol import (
    OUT_OF_BUDGET_NOTICE,
    CloneResult,
    Objective,
    extract_answer,
    left_line,
    parse_call,
    render_results,
)
from ramet.agents.sampling import Partial, Policy, Sample, SampleRequest, Sampling
from ramet.agents.tasks import Slots, task_group
from ramet.agents.tree import Branch, Message, Segment, Status, StopReason, Turn
from ramet.errors import BudgetExhausted, CallError, Interrupted, PolicyError, RefusedRequest, TransientPolicyError


@dataclass(slots=True)
class Growth:
    """A branch while it grows; `freeze` makes the record. Readable at any time by whoever watches."""

    id: str
    prompt: tuple[int, ...]
    ledger: Ledger
    objective: str = ""
    media: tuple[Segment, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    clones: list[Growth] = field(default_factory=list)
    """Clones of the call that runs now; afterwards they are part of its turn."""
    discarded: int = 0
    discarded_prefilled: int = 0
    """What failed attempts at the next turn have cost so far."""
    lost: int = 0
    """Tokens that failed attempts have cost this branch and its clones, over all turns."""
    fault: str = ""
    """What the last of them failed with."""
    status: Status | None = None
    answer: str | None = None
    reason: str = ""
    started: float = 0.0
    ended: float | None = None
    scope: anyio.CancelScope | None = None
    """Its own, in trees that are watched: nobody else could cancel one branch."""

    def cancel(self) -> None:
        """End this branch and its clones; its parent, told by a typed result, goes on."""
        if self.scope is not None:
            self.scope.cancel()

    def freeze(self, otherwise: Status, now: float) -> Branch:
        """The record of this branch, whose clones have been frozen. One that has not ended gets the status `otherwise`."""
        turns = list(self.turns)
        if self.discarded or self.discarded_prefilled:
            turns.append(Turn((), (), StopReason.FAILED, discarded=self.discarded, discarded_prefilled=self.discarded_prefilled))
        return Branch(
            id=self.id,
            prompt=self.prompt,
            turns=tuple(turns),
            status=self.status or otherwise,
            answer=self.answer,
            reason=self.reason,
            objective=self.objective,
            seconds=(now if self.ended is None else self.ended) - self.started,
            media=self.media,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What all branches of one tree share."""

    policy: Policy
    chat: ChatFormat
    budget: Budget
    store: ContextStore
    sampling: Sampling
    slots: Slots
    seed: int
    group: str
    max_turn_tokens: int
    result_characters: int
    attempts: int
    clone_system: str
    watched: bool = False
    tell_all: bool = True

    @property
    def context(self) -> int | None:
        known = [limit for limit in (self.budget.context, self.policy.context) if limit is not None]
        return min(known) if known else None

    def may_spawn(self, depth: int) -> bool:
        """Is the tool offered to a branch at this depth?"""
        limits = self.budget
        return (limits.depth is None or depth < limits.depth) and limits.clones != 0 and limits.width != 0

    def growth(
        self, name: str, prompt: Sequence[int], ledger: Ledger, objective: str = "", now: float = 0.0, media: tuple[Segment, ...] = ()
    ) -> Growth:
        """A branch that is to grow."""
        return Growth(name, tuple(prompt), ledger, objective, media, started=now, scope=anyio.CancelScope() if self.watched else None)

    def notice(self, ledger: Ledger) -> str:
        return "\n".join(filter(None, [OUT_OF_BUDGET_NOTICE, self.left(ledger, final=True)]))

    def left(self, ledger: Ledger, final: bool = False) -> str:
        return left_line(ledger.sampleable(final), ledger.left("clones"))

    def prompt(self, messages: Sequence[Message], ledger: Ledger, tools: bool) -> list[int]:
        """A branch's prompt ids; the last message says what is left, to branches without the tool only if all are told."""
        *before, last = messages
        left = self.left(ledger) if tools or self.tell_all else ""
        content = "\n".join(filter(None, [last.content, left]))
        return self.chat.render([*before, replace(last, content=content)], tools)


def seed_of(seed: int, branch: str, turn: int) -> int:
    """The seed of one sample: a function of the tree's seed and the sample's place in the tree."""
    digest = hashlib.blake2b(f"{seed}/{branch}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


async def run_branch(setting: Setting, growth: Growth) -> None:
    """Grow one branch to its end. Sets status and answer; raises only cancellation from outside, and bugs."""
    growth.started = anyio.current_time()
    try:
        if growth.scope is None:
            await _grow(setting, growth)
        else:
            with growth.scope as scope:
                await _grow(setting, growth)
            if scope.cancelled_caught:
                _end(growth, Status.CANCELLED)
    except RefusedRequest as error:
        _end(growth, Status.REFUSED, reason=str(error))
    except PolicyError as error:
        _end(growth, Status.FAILED, reason=str(error))
    except BudgetExhausted as error:
        _end(growth, Status.OUT_OF_BUDGET, reason=error.currency)
    finally:
        growth.ended = anyio.current_time()
    if growth.status is Status.OUT_OF_BUDGET and growth.answer is None and growth.fault:
        _end(growth, Status.FAILED, reason=f"{growth.fault} (failed attempts used up the budget: {growth.lost} tokens)")


def _end(growth: Growth, status: Status, answer: str | None = None, reason: str = "") -> None:
    growth.status, growth.answer, growth.reason = status, answer, reason


async def _grow(setting: Setting, growth: Growth) -> None:
    chat, ledger = setting.chat, growth.ledger
    tools = setting.may_spawn(growth.id.count("."))
    length = len(growth.prompt)
    final = False
    why = ""
    while True:
        room, limit = _room(setting, ledger, length, final)
        why = why if final else limit
        if room <= 0:
            appended = _notice(setting, ledger, length, closed=False)
            if final or appended is None:
                _end(growth, Status.OUT_OF_BUDGET, reason=why)
                return
            length += _append(growth, appended)
            final = True
            continue
        sample = await _sample(setting, growth, room, final)
        length += len(sample.ids)
        if sample.stop is StopReason.LENGTH and not final:
            appended = _notice(setting, ledger, length, closed=False)
            if appended is not None:
                length += _append(growth, appended)
                final = True
                continue
        parsed = chat.parse(sample.ids)
        if final or sample.stop is StopReason.LENGTH:
            _end(growth, Status.OUT_OF_BUDGET, extract_answer(parsed.text, finished=sample.stop is StopReason.END), why)
            return
        if not parsed.calls and not parsed.error:
            answer = extract_answer(parsed.text)
            _end(growth, Status.EMPTY if answer is None else Status.ANSWERED, answer)
            return
        if ledger.left("turns") == 0:
            _end(growth, Status.OUT_OF_BUDGET, reason="turns")
            return
        try:
            if parsed.error:
                raise CallError(parsed.error)
            if not tools:
                raise CallError("spawn_clone is not available here; answer yourself")
            if len(parsed.calls) > 1:
                raise CallError("one call a turn: put all objectives into one call")
            call = parse_call(parsed.calls[0])
        except CallError as error:
            message = [CloneResult(Status.REFUSED, reason=str(error))]
            unknown: list[str] = []
        else:
            message, unknown = await _spawn(setting, growth, call.requests())
        appended = _tool_message(setting, ledger, message, unknown, length)
        if appended is None:
            # No room for the results; there is for being told to answer without them.
            appended = _notice(setting, ledger, length, closed=True)
            if appended is None:
                _end(growth, Status.OUT_OF_BUDGET, reason="context")
                return
            final = True
        length += _append(growth, appended)


def _room(setting: Setting, ledger: Ledger, length: int, final: bool) -> tuple[int, str]:
    """How many tokens the next sample may have, and which limit says so."""
    room, limit = setting.max_turn_tokens, "max_turn_tokens"
    budget = ledger.sampleable(final)
    if budget is not None and budget <= room:
        room, limit = budget, ledger.tightest()
    if setting.context is not None:
        context = setting.context - length - (0 if final else _ending(setting, ledger))
        if context <= room:
            whose = "budget" if setting.context == setting.budget.context else "model"
            room, limit = context, f"the {whose}'s context of {setting.context} tokens"
    return room, limit


def _ending(setting: Setting, ledger: Ledger) -> int:
    """Tokens of context that a branch keeps for being told to answer, and answering."""
    reserve = setting.budget.answer_reserve
    return reserve + len(setting.chat.after_turn(setting.notice(ledger), closed=False)) if reserve else 0


def _notice(setting: Setting, ledger: Ledger, length: int, closed: bool) -> list[int] | None:
    """The ids that tell a branch to answer from its reserve; None if it has none, or no turn or context for it."""
    if not setting.budget.answer_reserve or ledger.sampleable(final=True) == 0 or ledger.left("turns") == 0:
        return None
    ids = setting.chat.after_turn(setting.notice(ledger), closed)
    return None if setting.context is not None and length + len(ids) >= setting.context else ids


def _append(growth: Growth, ids: list[int]) -> int:
    """Append ids that were not sampled; to the newest turn, or to the prompt before there is one."""
    if growth.turns:
        growth.turns[-1] = replace(growth.turns[-1], appended=(*growth.turns[-1].appended, *ids))
    else:
        growth.prompt += tuple(ids)
    return len(ids)


def _tool_message(setting: Setting, ledger: Ledger, results: list[CloneResult], unknown: list[str], length: int) -> list[int] | None:
    """The results as ids, cut fairly until they fit the context; None if even the shortest form does not."""
    limit = setting.result_characters
    left = setting.left(ledger)
    if unknown:
        left = "\n".join(filter(None, [f"Unknown context keys: {', '.join(unknown)[:200]}", left]))
    while True:
        ids = setting.chat.after_turn(render_results(results, left, limit), closed=True)
        if setting.context is None or length + len(ids) + _ending(setting, ledger) < setting.context:
            return ids
        if limit <= len(results):
            return None
        limit = max(limit // 2, len(results))


async def _sample(setting: Setting, growth: Growth, room: int, final: bool) -> Sample:
    """Sample one turn, retrying transient failures. Whatever was generated is charged, kept or not.

    Raises the last error when the attempts, or what they may spend, are used up.
    """
    seed = seed_of(setting.seed, growth.id, len(growth.turns))
    request = SampleRequest(_ids(growth), room, setting.chat.stop_ids, seed, setting.sampling, setting.group, growth.media)
    failures = 0
    while True:
        try:
            sample = await _attempt(setting, growth, request)
            break
        except Interrupted:
            continue
        except TransientPolicyError as error:
            failures += 1
            left = growth.ledger.sampleable(final)
            most = room if left is None else min(room, left)
            if failures >= setting.attempts or most <= 0:
                raise
            await drain.pause(_pause(error, failures, seed))
            request = replace(request, max_tokens=most)
    _record(growth, sample)
    return sample


async def _attempt(setting: Setting, growth: Growth, request: SampleRequest) -> Sample:
    """One try at a sample: reserved, and settled on every way out."""
    await setting.slots.acquire()
    try:
        policy, partial = setting.policy, Partial()
        with growth.ledger.reserve(request.max_tokens, len(request.prompt)) as grant:
            try:
                sample = await policy.sample(request, partial)
            except anyio.get_cancelled_exc_class():
                read = _settle(growth, grant, request, len(partial.ids), partial.prefilled)
                ids, logprobs, updates = tuple(partial.ids), tuple(partial.logprobs), tuple(partial.updates)
                version = policy.version if partial.version is None else partial.version
                _record(growth, Sample(ids, logprobs, StopReason.CANCELLED, read, partial.cached, version, updates))
                raise
            except PolicyError as error:
                _discard(growth, grant, request, len(partial.ids), partial.prefilled, error)
                if len(partial.ids) > request.max_tokens and isinstance(error, TransientPolicyError):
                    raise PolicyError(f"{_overrun(len(partial.ids), request)}, then failed: {error}") from error
                raise
            if len(sample.ids) > request.max_tokens:
                broken = PolicyError(_overrun(len(sample.ids), request))
                _discard(growth, grant, request, len(sample.ids), sample.prefilled, broken)
                raise broken
            return replace(sample, prefilled=_settle(growth, grant, request, len(sample.ids), sample.prefilled))
    finally:
        setting.slots.release()


def _overrun(generated: int, request: SampleRequest) -> str:
    return f"the backend generated {generated} tokens for a grant of {request.max_tokens}: it does not keep to max_tokens"


def _settle(growth: Growth, grant: Grant, request: SampleRequest, generated: int, prefilled: int, turns: int = 1) -> int:
    """Charge what an attempt has used, what it generated past its grant included. The prompt tokens that it computed, of those it had."""
    granted, read = min(generated, request.max_tokens), min(prefilled, len(request.prompt))
    grant.settle(granted, read, turns)
    growth.ledger.charge(generated - granted, 0)
    return read


def _discard(growth: Growth, grant: Grant, request: SampleRequest, generated: int, prefilled: int, error: PolicyError) -> None:
    """Charge an attempt that gave no turn."""
    if isinstance(error, Interrupted):
        grant.settle(0, 0, turns=0)
        growth.ledger.charge(generated, prefilled, past=True)
    else:
        prefilled = _settle(growth, grant, request, generated, prefilled, turns=0)
        growth.lost += generated
        growth.fault = str(error)
    growth.discarded += generated
    growth.discarded_prefilled += prefilled


def _pause(error: TransientPolicyError, failures: int, seed: int) -> float:
    """Seconds before the next attempt: 0.1, 0.2, 0.4, ... up to 10, or longer if the server asks for it, and up to twice the former on top.

    What is added is drawn from the request's seed, so that requests that failed together do not come back together.
    """
    if error.past:
        return 0.0
    least = min(0.1 * 2.0 ** (failures - 1), 10.0)
    return max(least, error.retry_after or 0.0) + random.Random(f"{seed}/{failures}").uniform(0.0, 2 * least)


def _record(growth: Growth, sample: Sample) -> None:
    growth.turns.append(
        Turn(
            sample.ids,
            sample.logprobs,
            sample.stop,
            sample.version,
            sample.prefilled,
            sample.cached,
            growth.discarded,
            growth.discarded_prefilled,
            updates=sample.updates,
        )
    )
    growth.discarded = growth.discarded_prefilled = 0


def _ids(growth: Growth) -> tuple[int, ...]:
    if not growth.turns:
        return growth.prompt
    ids = list(growth.prompt)
    for turn in growth.turns:
        ids += turn.sampled
        ids += turn.appended
    return tuple(ids)


async def _spawn(setting: Setting, growth: Growth, requests: list[Objective]) -> tuple[list[CloneResult], list[str]]:
    """Run the clones of one call; their results in call order, and the keys that do not exist."""
    allowed = len(requests)
    reason = ""
    if setting.budget.width is not None and allowed > setting.budget.width:
        allowed, reason = setting.budget.width, f"at most {setting.budget.width} clones a call"
    clones = growth.ledger.left("clones")
    if clones is not None and allowed > clones:
        allowed, reason = clones, "no clones left"
    if allowed and not growth.ledger.can_fork():
        allowed, reason = 0, "no tokens left for clones"
    results = [CloneResult(Status.REFUSED, reason=reason)] * len(requests)
    unknown: dict[str, None] = {}
    if not allowed:
        return results, []
    # The parent reads its own context again afterwards, and results that may be as long.
    keep = 2 * len(_ids(growth))
    with growth.ledger.fork([request.max_tokens for request in requests[:allowed]], keep) as fork:
        number = sum(len(turn.clones) for turn in growth.turns)
        now = anyio.current_time()
        try:
            for i, (request, ledger) in enumerate(zip(requests, fork.ledgers, strict=False)):
                unknown.update(dict.fromkeys(setting.store.resolve(request.context_keys)[1]))
                name = f"{growth.id}.{number + i}"
                tools = setting.may_spawn(name.count("."))
                media = setting.store.media(request.context_keys)
                messages = [Message("user", clone_prompt(setting.store, request.objective, request.context_keys), media)]
                if setting.clone_system:
                    messages.insert(0, Message("system", setting.clone_system))
                prompt = setting.prompt(messages, ledger, tools)
                growth.clones.append(setting.growth(name, prompt, ledger, request.objective, now, media))
            async with task_group() as group:
                for clone in growth.clones:
                    group.start_soon(run_branch, setting, clone)
        finally:
            now = anyio.current_time()
            frozen = tuple(clone.freeze(Status.CANCELLED, now) for clone in growth.clones)
            growth.lost += sum(clone.lost for clone in growth.clones)
            growth.fault = next((clone.fault for clone in reversed(growth.clones) if clone.fault), growth.fault)
            growth.clones.clear()
            growth.turns[-1] = replace(growth.turns[-1], clones=frozen)
    for i, branch in enumerate(frozen):
        results[i] = CloneResult(branch.status, branch.answer, branch.reason)
    return results, list(unknown)
