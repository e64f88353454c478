"""The loop of one branch. The root and its clones run the same code.

    reserve -> sample -> spend and refund -> read the newest turn -> answer, or make calls, or report malformed ones

A branch ends with a status and never with an exception of its own: what its policy could not do becomes a typed result for the
parent. Cancellation passes through, once what the cancelled sample had generated is recorded and charged. When the budget is used
up, the branch is told so once and may state an answer from its reserve. A branch that ends without an answer because failed attempts
used up its budget has failed: it ends with the last of their errors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from ramet.agents.answers import extract_answer
from ramet.agents.attempts import fits, notice_ids, room_left, sample_turn
from ramet.agents.dispatch import make_calls, reply_ids
from ramet.agents.events import BranchEnded, BranchStarted
from ramet.agents.growth import Growth, Setting
from ramet.agents.tree import Status, StopReason
from ramet.errors import AnswerError, BudgetExhausted, PolicyError, RefusedRequest


async def run_branch(setting: Setting, growth: Growth, steer: Callable[[], Awaitable[None]] | None = None) -> None:
    """Grow one branch to its end: by its policy, or as `steer` has it. Sets status and answer.

    Raises only cancellation from outside, and bugs.
    """
    growth.started = anyio.current_time()
    _tell_started(setting, growth)
    try:
        if growth.scope is None:
            await (grow(setting, growth) if steer is None else steer())
        else:
            with growth.scope as scope:
                await (grow(setting, growth) if steer is None else steer())
            if scope.cancelled_caught:
                growth.end(Status.CANCELLED)
    except RefusedRequest as error:
        growth.end(Status.REFUSED, reason=str(error))
    except PolicyError as error:
        growth.end(Status.FAILED, reason=str(error))
    except BudgetExhausted as error:
        growth.end(Status.OUT_OF_BUDGET, reason=error.currency)
    finally:
        growth.ended = anyio.current_time()
        if growth.status is Status.OUT_OF_BUDGET and growth.answer is None and growth.fault:
            growth.end(Status.FAILED, reason=f"{growth.fault} (failed attempts used up the budget: {growth.lost} tokens)")
        _tell_ended(setting, growth)


def _tell_started(setting: Setting, growth: Growth) -> None:
    """Tell whoever watches that a branch has begun."""
    if setting.emit is not None:
        setting.emit(BranchStarted(growth.id, growth.objective, growth.role, len(growth.prompt)))


def _tell_ended(setting: Setting, growth: Growth) -> None:
    """Tell whoever watches that a branch has ended."""
    if setting.emit is not None:
        spent = {name: growth.ledger.spent(name) for name in ("generated", "prefilled", "clones", "tool_calls")}
        setting.emit(BranchEnded(growth.id, growth.status or Status.CANCELLED, growth.answer, growth.reason, spent))


async def grow(setting: Setting, growth: Growth) -> None:
    """Sample turns and make their calls until the branch has ended. Its context must stand at the opening of a turn."""
    chat, ledger = setting.chat, growth.ledger
    length = len(growth.ids)
    final = False
    why = ""
    while True:
        room, limit = room_left(setting, ledger, length, final)
        why = why if final else limit
        if room <= 0:
            appended = notice_ids(setting, ledger, length, closed=False)
            if final or appended is None:
                growth.end(Status.OUT_OF_BUDGET, reason=why)
                return
            length += growth.append(appended)
            final = True
            continue
        sample = await sample_turn(setting, growth, room, final)
        length += len(sample.ids)
        if sample.stop is StopReason.LENGTH and not final:
            appended = notice_ids(setting, ledger, length, closed=False)
            if appended is not None:
                length += growth.append(appended)
                final = True
                continue
        parsed = chat.parse(sample.ids)
        if final or sample.stop is StopReason.LENGTH:
            answer, wrong = stated_answer(growth, parsed.text, finished=sample.stop is StopReason.END)
            growth.end(Status.OUT_OF_BUDGET, answer, "; ".join(filter(None, [why, wrong])))
            return
        if not parsed.calls and not parsed.error:
            answer, wrong = stated_answer(growth, parsed.text, finished=True)
            appended = _once_more(setting, growth, wrong, length) if wrong else None
            if appended is None:
                growth.end(Status.EMPTY if answer is None else Status.ANSWERED, answer, wrong)
                return
            length += growth.append(appended)
            continue
        if ledger.left("turns") == 0:
            growth.end(Status.OUT_OF_BUDGET, reason="turns")
            return
        replies = await make_calls(setting, growth, parsed, run_branch)
        appended = reply_ids(setting, growth, replies, length)
        if appended is None:
            # The results do not fit the context, but the request to answer without them may.
            appended = notice_ids(setting, ledger, length, closed=True)
            if appended is None:
                growth.end(Status.OUT_OF_BUDGET, reason="context")
                return
            final = True
        length += growth.append(appended)


def stated_answer(growth: Growth, text: str, finished: bool) -> tuple[str | None, str]:
    """The answer that a turn states, and what is wrong with it if it has to be of a type. Sets the branch's value."""
    if growth.expects is None:
        return extract_answer(text, finished), ""
    try:
        growth.value, answer = growth.expects.read(text, finished)
    except AnswerError as error:
        return None, str(error) if finished else ""  # of a turn that is cut, nothing else can be expected
    return answer, ""


def _once_more(setting: Setting, growth: Growth, wrong: str, length: int) -> list[int] | None:
    """The ids that send an answer back with what is wrong with it; None if no further turn is possible."""
    if growth.ledger.left("turns") == 0:
        return None
    text = "\n".join(filter(None, [f"({wrong}; answer again)", setting.left(growth.ledger)]))
    ids = setting.chat.after_turn(text, closed=True)
    return ids if fits(setting, growth.ledger, length, ids) else None
