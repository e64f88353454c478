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
    """The first error inside nested exception groups; an interrupt before all others."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [first_error(e) for e in error.exceptions]
    return next((e for e in inner if isinstance(e, KeyboardInterrupt)), inner[0])
