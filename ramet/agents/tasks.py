"""Task groups that raise a plain error, and a limiter for very many waiting tasks.

anyio wraps the errors of a task group's tasks in an exception group. Here the first error is raised by itself, with the group as its
cause, so that callers can catch it by its class.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import TaskGroup

from ramet.errors import ConfigError


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """`anyio.create_task_group()` that raises the `first_error` instead of an exception group."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors


def cancelled_from_outside() -> bool:
    """Whether the running task is being cancelled, by a scope or by asyncio itself.

    If it is not, a cancellation that is raised in it comes from something that it waited for.
    """
    if anyio.current_effective_deadline() == -math.inf:
        return True
    with suppress(RuntimeError):  # of trio, which has nothing but scopes
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return False


MAX_LEVELS = 2000
"""Levels of clones under a root, whatever its budget allows."""
_SCOPES = 6
"""Cancel scopes that one level of clones may open, and more: of its task groups, of a task in each, of a branch that is watched."""


def nest(levels: int) -> None:
    """Make room for so many levels of task groups.

    anyio cancels nested scopes by recursion, and where Python's limit ends it, the tasks below are never cancelled.
    """
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + _SCOPES * levels))


class Slots:
    """A semaphore with `count` slots, first come first served. Raises `ConfigError` if `count` is below 1.

    It replaces `anyio.CapacityLimiter`, which keeps an exception with its frames for each waiting task: with a hundred thousand clones
    waiting, that would be most of their memory and of the garbage collector's time.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self, count: int):
        if count < 1:
            raise ConfigError(f"a limit of {count} would let nothing run; give at least 1")
        self._free = count
        self._waiting: OrderedDict[anyio.Event, None] = OrderedDict()

    async def acquire(self) -> None:
        """Take a slot, waiting until one is free."""
        if self._free:
            self._free -= 1
            return
        turn = anyio.Event()
        self._waiting[turn] = None
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self.release()  # the slot was handed over just as the wait was cancelled
            else:
                del self._waiting[turn]
            raise

    def release(self) -> None:
        """Give a slot back, to the task that has waited longest if any is waiting."""
        if self._waiting:
            self._waiting.popitem(last=False)[0].set()
        else:
            self._free += 1


def first_error(error: BaseException) -> BaseException:
    """The first error inside nested exception groups; an interrupt goes before all others and a cancellation after them.

    The cancellation of a sibling thus does not hide the error that caused it.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [first_error(e) for e in error.exceptions]
    return min(inner, key=_rank)


def _rank(error: BaseException) -> int:
    """The precedence of an error, 0 the highest."""
    if isinstance(error, KeyboardInterrupt):
        return 0
    # Cancellations, of asyncio as of trio, are no `Exception`.
    return 1 if isinstance(error, Exception | SystemExit) else 2
