"""Task groups whose error is the error.

anyio wraps what a task group's tasks raise into an exception group. Here the first error comes out by
itself, with the group as its cause, so that callers can catch it by its class.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """`anyio.create_task_group()`, raising the first error plainly."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors


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
