"""Sampling one turn of a branch: reserved, retried, settled on every way out.

Whatever a backend generated is charged, kept or not, and no token past a grant is.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Self

import anyio

from ramet.agents import drain
from ramet.agents.budget import Grant, Ledger
from ramet.agents.events import TokensSampled, TurnSampled
from ramet.agents.growth import Growth, Setting, seed_of
from ramet.agents.sampling import Middleware, Partial, Policy, PolicyWrapper, Sample, SampleFunction, SampleRequest, attempts_of
from ramet.agents.tree import OVERRUN, StopReason, Turn
from ramet.errors import Interrupted, PolicyError, RametError, TransientPolicyError, first_line


def room_left(setting: Setting, ledger: Ledger, length: int, final: bool) -> tuple[int, str]:
    """How many tokens the next sample may have, and the limit that sets this number."""
    room, limit = setting.max_turn_tokens, "max_turn_tokens"
    budget = ledger.sampleable(final)
    if budget is not None and budget <= room:
        room, limit = budget, ledger.tightest()
    if setting.context is not None:
        context = setting.context - length - (0 if final else ending(setting, ledger))
        if context <= room:
            whose = "budget" if setting.context == setting.budget.context else "model"
            room, limit = context, f"the {whose}'s context of {setting.context} tokens"
    return room, limit


def ending(setting: Setting, ledger: Ledger) -> int:
    """Tokens of context that a branch keeps for the request to answer and for the answer."""
    reserve = setting.budget.answer_reserve
    return reserve + len(setting.chat.after_turn(setting.notice(ledger), closed=False)) if reserve else 0


def fits(setting: Setting, ledger: Ledger, length: int, ids: Sequence[int]) -> bool:
    """Whether ids can be appended to a context of `length` tokens, so that it can still be sampled and asked for its answer."""
    return setting.context is None or length + len(ids) + ending(setting, ledger) < setting.context


def notice_ids(setting: Setting, ledger: Ledger, length: int, closed: bool) -> list[int] | None:
    """The ids that ask a branch to answer from its reserve; None if it has no reserve, no turn or no context left for that."""
    if not setting.budget.answer_reserve or ledger.sampleable(final=True) == 0 or ledger.left("turns") == 0:
        return None
    ids = setting.chat.after_turn(setting.notice(ledger), closed)
    return None if setting.context is not None and length + len(ids) >= setting.context else ids


async def sample_turn(setting: Setting, growth: Growth, room: int, final: bool) -> Sample:
    """Sample one turn, retrying transient failures. All that is generated is charged, whether it is kept or not.

    Raises the last error once the attempts, or the tokens that they may spend, are used up.
    """
    seed = seed_of(setting.seed, growth.id, len(growth.turns))
    request = SampleRequest(
        growth.ids, room, setting.chat.stop_ids, seed, setting.sampling, setting.group, growth.media, growth.id, setting.role
    )
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
            if failures >= (setting.attempts or attempts_of(setting.policy)) or max_tokens <= 0:
                raise
            await drain.pause(_pause(error, failures, seed))
            request = replace(request, max_tokens=max_tokens)
    _record(growth, sample)
    if setting.emit is not None:
        setting.emit(TurnSampled(growth.id, setting.chat.text(sample.ids), sample.stop, growth.ledger.remaining()))
    return sample


class _Begun(PolicyWrapper):
    """`policy`, whose sample begins with `ids`, which it did not choose: they are part of what it is granted, and none of what it reads."""

    def __init__(self, policy: Policy, ids: Sequence[int]):
        super().__init__(policy)
        self._ids = tuple(ids)

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """The ids and what the policy goes on with. What an attempt that fails generated is without them."""
        ids = self._ids[: request.max_tokens]
        zeros = (0.0,) * len(ids)
        if len(ids) == request.max_tokens:
            return Sample(ids, zeros, StopReason.LENGTH, prefilled=len(request.prompt), version=self.version)
        inner = Partial()
        try:
            rest = replace(request, prompt=request.prompt + ids, max_tokens=request.max_tokens - len(ids))
            sample = await self._policy.sample(rest, inner)
        except PolicyError:
            ids, zeros = (), ()
            raise
        finally:
            partial.ids += [*ids, *inner.ids]
            partial.logprobs += [*zeros, *inner.logprobs]
            partial.prefilled, partial.cached = min(inner.prefilled, len(request.prompt)), inner.cached
            partial.version, partial.updates = inner.version, [place + len(ids) for place in inner.updates]
        return replace(
            sample,
            ids=ids + sample.ids,
            logprobs=zeros + sample.logprobs,
            prefilled=min(sample.prefilled, len(request.prompt)),
            updates=tuple(place + len(ids) for place in sample.updates),
        )


class _Seen(list[int]):
    """Ids that tell whoever watches as they come."""

    def __init__(self, setting: Setting, growth: Growth):
        super().__init__()
        self._setting, self._growth = setting, growth

    def _tell(self, ids: Sequence[int]) -> None:
        emit, chat = self._setting.emit, self._setting.chat
        if emit is not None and ids:
            emit(TokensSampled(self._growth.id, tuple(ids), chat.text(ids)))

    def append(self, index: int) -> None:
        super().append(index)
        self._tell([index])

    def extend(self, ids: Iterable[int]) -> None:
        before = len(self)
        super().extend(ids)
        self._tell(self[before:])

    def __iadd__(self, ids: Iterable[int]) -> Self:  # type: ignore[override, misc]
        self.extend(ids)
        return self


def _partial(setting: Setting, growth: Growth) -> Partial:
    return Partial() if setting.emit is None else Partial(ids=_Seen(setting, growth))


async def _attempt(setting: Setting, growth: Growth, request: SampleRequest) -> Sample:
    """One attempt at a sample. Its tokens are reserved first, and settled however it ends."""
    await setting.slots.acquire()
    try:
        policy, partial, sample_from = setting.policy, _partial(setting, growth), _through(setting, growth, request)
        with growth.ledger.reserve(request.max_tokens, len(request.prompt)) as grant:
            try:
                sample = await sample_from(request, partial)
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


def _through(setting: Setting, growth: Growth, request: SampleRequest) -> SampleFunction:
    """What samples a request: the policy, which goes on with what a program has begun, behind the user's middleware."""
    policy = _Begun(setting.policy, growth.begun).sample if growth.begun else setting.policy.sample
    if not setting.middleware:
        return policy

    async def innermost(changed: SampleRequest, partial: Partial) -> Sample:
        if changed.prompt != request.prompt or changed.media != request.media:
            raise PolicyError("middleware changed a prompt: what is trained on is what was sampled; change the task or the tools instead")
        return await policy(changed, partial)

    sample: SampleFunction = innermost
    for layer in reversed(setting.middleware):
        sample = _layer(layer, sample)
    return sample


def _layer(middleware: Middleware, sample: SampleFunction) -> SampleFunction:
    async def layer(request: SampleRequest, partial: Partial) -> Sample:
        try:
            return await middleware(request, partial, sample)
        except (RametError, anyio.get_cancelled_exc_class()):
            raise
        except Exception as error:
            name = getattr(middleware, "__name__", type(middleware).__name__)
            raise PolicyError(f"the middleware {name} raised {type(error).__name__}: {first_line(error)}") from error

    return layer


def _overrun(generated: int, request: SampleRequest) -> str:
    return f"the backend generated {generated} tokens for a grant of {request.max_tokens}: it {OVERRUN}"


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
            written=min(len(growth.begun), len(sample.ids)),
        )
    )
    growth.begun = ()
    growth.discarded = growth.discarded_prefilled = 0
