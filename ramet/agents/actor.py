"""The loop of one branch. The root and its clones run the same code.

    reserve -> sample -> spend and refund -> read the newest turn -> answer, or spawn clones, or report a malformed call

A branch ends with a status and never with an exception of its own: what its policy could not do becomes a typed result for the
parent. Cancellation passes through, once what the cancelled sample had generated is recorded and charged. When the budget is used
up, the branch is told so once and may state an answer from its reserve. A branch that ends without an answer because failed attempts
used up its budget has failed: it ends with the last of their errors.
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
    """A branch while it grows. It can be read at any time; `freeze` makes the record."""

    id: str
    prompt: tuple[int, ...]
    ledger: Ledger
    objective: str = ""
    media: tuple[Segment, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    clones: list[Growth] = field(default_factory=list)
    """Clones of the call that is running; once it ends, they are part of its turn."""
    discarded: int = 0
    """Tokens that failed attempts at the next turn have generated so far."""
    discarded_prefilled: int = 0
    """Prompt tokens that they have computed."""
    lost: int = 0
    """Tokens that failed attempts have cost this branch and its clones, over all turns."""
    fault: str = ""
    """The error of the last failed attempt."""
    status: Status | None = None
    answer: str | None = None
    reason: str = ""
    started: float = 0.0
    ended: float | None = None
    scope: anyio.CancelScope | None = None
    """The branch's own cancel scope, in trees that are watched: nothing else can cancel a single branch."""

    def cancel(self) -> None:
        """End this branch and its clones. Its parent receives a typed result and goes on."""
        if self.scope is not None:
            self.scope.cancel()

    def freeze(self, otherwise: Status, now: float) -> Branch:
        """The record of this branch at time `now`, its clones already frozen. A branch that has not ended gets the status `otherwise`."""
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
    """What all branches of one tree share. For the options, see `Runtime`; `group` names the tree in its sample requests."""

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
    always_show_budget: bool = True

    @property
    def context(self) -> int | None:
        """Tokens that one branch's context may hold: the smaller of the budget's and the policy's limits; None without either."""
        limits = [limit for limit in (self.budget.context, self.policy.context) if limit is not None]
        return min(limits) if limits else None

    def may_spawn(self, depth: int) -> bool:
        """Whether a branch at this depth is offered the tool."""
        limits = self.budget
        return (limits.depth is None or depth < limits.depth) and limits.clones != 0 and limits.width != 0

    def growth(
        self, name: str, prompt: Sequence[int], ledger: Ledger, objective: str = "", now: float = 0.0, media: tuple[Segment, ...] = ()
    ) -> Growth:
        """A new branch called `name`, with no turns yet."""
        return Growth(name, tuple(prompt), ledger, objective, media, started=now, scope=anyio.CancelScope() if self.watched else None)

    def notice(self, ledger: Ledger) -> str:
        """The message that asks a branch to answer from its reserve."""
        return "\n".join(filter(None, [OUT_OF_BUDGET_NOTICE, self.left(ledger, final=True)]))

    def left(self, ledger: Ledger, final: bool = False) -> str:
        """The line that states what the branch may still spend, its reserve included if `final`; empty if nothing is limited."""
        return left_line(ledger.sampleable(final), ledger.left("clones"))

    def prompt(self, messages: Sequence[Message], ledger: Ledger, tools: bool) -> list[int]:
        """A branch's prompt ids. The last message ends with what is left, for branches without the tool only by `always_show_budget`."""
        *before, last = messages
        left = self.left(ledger) if tools or self.always_show_budget else ""
        content = "\n".join(filter(None, [last.content, left]))
        return self.chat.render([*before, replace(last, content=content)], tools)


def seed_of(seed: int, branch: str, turn: int) -> int:
    """The seed of one sample, from the tree's seed and the sample's place in the tree."""
    digest = hashlib.blake2b(f"{seed}/{branch}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


async def run_branch(setting: Setting, growth: Growth) -> None:
    """Grow one branch to its end, setting its status and answer. Only cancellation from outside, and bugs, are raised."""
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
    """Set how the branch ended."""
    growth.status, growth.answer, growth.reason = status, answer, reason


async def _grow(setting: Setting, growth: Growth) -> None:
    """Sample turns and append results until the branch ends."""
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
            # The results do not fit the context, but the request to answer without them may.
            appended = _notice(setting, ledger, length, closed=True)
            if appended is None:
                _end(growth, Status.OUT_OF_BUDGET, reason="context")
                return
            final = True
        length += _append(growth, appended)


def _room(setting: Setting, ledger: Ledger, length: int, final: bool) -> tuple[int, str]:
    """How many tokens the next sample may have, and the limit that sets this number."""
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
    """Tokens of context that a branch keeps for the request to answer and for the answer."""
    reserve = setting.budget.answer_reserve
    return reserve + len(setting.chat.after_turn(setting.notice(ledger), closed=False)) if reserve else 0


def _notice(setting: Setting, ledger: Ledger, length: int, closed: bool) -> list[int] | None:
    """The ids that ask a branch to answer from its reserve; None if it has no reserve, no turn or no context left for that."""
    if not setting.budget.answer_reserve or ledger.sampleable(final=True) == 0 or ledger.left("turns") == 0:
        return None
    ids = setting.chat.after_turn(setting.notice(ledger), closed)
    return None if setting.context is not None and length + len(ids) >= setting.context else ids


def _append(growth: Growth, ids: list[int]) -> int:
    """Append ids that were not sampled, to the newest turn or, if there is none yet, to the prompt. Returns how many."""
    if growth.turns:
        growth.turns[-1] = replace(growth.turns[-1], appended=(*growth.turns[-1].appended, *ids))
    else:
        growth.prompt += tuple(ids)
    return len(ids)


def _tool_message(setting: Setting, ledger: Ledger, results: list[CloneResult], unknown: list[str], length: int) -> list[int] | None:
    """The results as ids, shortened evenly until they fit the context; None if even the shortest form does not fit."""
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
    """Sample one turn, retrying transient failures. All that is generated is charged, whether it is kept or not.

    Raises the last error once the attempts, or the tokens that they may spend, are used up.
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
            max_tokens = room if left is None else min(room, left)
            if failures >= setting.attempts or max_tokens <= 0:
                raise
            await drain.pause(_pause(error, failures, seed))
            request = replace(request, max_tokens=max_tokens)
    _record(growth, sample)
    return sample


async def _attempt(setting: Setting, growth: Growth, request: SampleRequest) -> Sample:
    """One attempt at a sample. Its tokens are reserved first, and settled however it ends."""
    await setting.slots.acquire()
    try:
        policy, partial = setting.policy, Partial()
        with growth.ledger.reserve(request.max_tokens, len(request.prompt)) as grant:
            try:
                sample = await policy.sample(request, partial)
            except anyio.get_cancelled_exc_class():
                prefilled = _settle(growth, grant, request, len(partial.ids), partial.prefilled)
                ids, logprobs, updates = tuple(partial.ids), tuple(partial.logprobs), tuple(partial.updates)
                version = policy.version if partial.version is None else partial.version
                _record(growth, Sample(ids, logprobs, StopReason.CANCELLED, prefilled, partial.cached, version, updates))
                raise
            except PolicyError as error:
                _discard(growth, grant, request, len(partial.ids), partial.prefilled, error)
                if len(partial.ids) > request.max_tokens and isinstance(error, TransientPolicyError):
                    raise PolicyError(f"{_overrun(len(partial.ids), request)}, then failed: {error}") from error
                raise
            if len(sample.ids) > request.max_tokens:
                overrun = PolicyError(_overrun(len(sample.ids), request))
                _discard(growth, grant, request, len(sample.ids), sample.prefilled, overrun)
                raise overrun
            return replace(sample, prefilled=_settle(growth, grant, request, len(sample.ids), sample.prefilled))
    finally:
        setting.slots.release()


def _overrun(generated: int, request: SampleRequest) -> str:
    """The error message for a backend that generated more than it was granted."""
    return f"the backend generated {generated} tokens for a grant of {request.max_tokens}: it does not keep to max_tokens"


def _settle(growth: Growth, grant: Grant, request: SampleRequest, generated: int, prefilled: int, turns: int = 1) -> int:
    """Charge what an attempt has used, including what it generated past its grant.

    Returns the prompt tokens that it computed, at most the length of the prompt.
    """
    granted, prefilled = min(generated, request.max_tokens), min(prefilled, len(request.prompt))
    grant.settle(granted, prefilled, turns)
    growth.ledger.charge(generated - granted, 0)
    return prefilled


def _discard(growth: Growth, grant: Grant, request: SampleRequest, generated: int, prefilled: int, error: PolicyError) -> None:
    """Charge an attempt that produced no turn."""
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
    """Seconds to wait before the next attempt; none after a failure that is replayed from a journal.

    The backoff is 0.1, 0.2, 0.4, ... up to 10 seconds, or longer if the server asks for it, plus jitter of up to twice the backoff.
    The jitter is drawn from the request's seed, so that requests that failed together are not retried together.
    """
    if error.past:
        return 0.0
    backoff = min(0.1 * 2.0 ** (failures - 1), 10.0)
    return max(backoff, error.retry_after or 0.0) + random.Random(f"{seed}/{failures}").uniform(0.0, 2 * backoff)


def _record(growth: Growth, sample: Sample) -> None:
    """Add a sample to the branch as its newest turn, with what the failed attempts before it cost."""
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
    """The whole context of a branch so far."""
    if not growth.turns:
        return growth.prompt
    ids = list(growth.prompt)
    for turn in growth.turns:
        ids += turn.sampled
        ids += turn.appended
    return tuple(ids)


async def _spawn(setting: Setting, growth: Growth, requests: list[Objective]) -> tuple[list[CloneResult], list[str]]:
    """Run the clones of one call. Returns their results in call order, and the context keys that do not exist."""
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
    # Afterwards the parent reads its own context again, and results that may be just as long.
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
