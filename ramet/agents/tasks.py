"""Task groups whose error is the error, and a limiter for very many waiting tasks.

anyio wraps what a task group's tasks raise into an exception group. Here the first error comes out by
itself, with the group as its cause, so that callers can catch it by its class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from ramet.errors import ConfigError


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """`anyio.create_task_group()`, raising the first error plainly."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors


class Slots:
    """At most `count` holders at a time, first come first served.

    As `anyio.CapacityLimiter`, which keeps an exception with its frames for each task that waits: with a
    hundred thousand clones waiting, that is most of their memory and of the collector's time.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self, count: int):
        if count < 1:
            raise ConfigError(f"at least 1 may go on at a time, not {count}: with none, all would wait for ever")
        self._free = count
        self._waiting: OrderedDict[anyio.Event, None] = OrderedDict()

    async def acquire(self) -> None:
        """Take a slot, waiting for one if none is free."""
        if self._free:
            self._free -= 1
            return
        turn = anyio.Event()
        self._waiting[turn] = None
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self.release()  # it was handed over as the wait was cancelled
            else:
                del self._waiting[turn]
            raise

    def release(self) -> None:
        """Give a slot back: to whoever waits longest, else to all."""
        if self._waiting:
            self._waiting.popitem(last=False)[0].set()
        else:
            self._free += 1


def first_error(error: BaseException) -> BaseException:
    """The first error inside nested exception groups: an interrupt before all others, a cancellation after them.

    A cancelled sibling must not hide the error that is the cause.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [first_error(e) for e in error.exceptions]
    return min(inner, key=_rank)


def _rank(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 0
    # asyncio.CancelledError and trio.Cancelled, without importing trio.
    return 2 if type(error).__name__ in ("CancelledError", "Cancelled") else 1
