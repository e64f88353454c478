"""Functions that may never end, in threads that nobody waits for."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import anyio
import anyio.lowlevel
from anyio import from_thread, to_thread

_Value = TypeVar("_Value")


async def in_thread(function: Callable[[], _Value], name: str) -> _Value:
    """What `function` returns or raises in a thread of its own. Cancelled, it leaves the thread behind.

    Unlike a thread of `anyio.to_thread`, one that is left behind holds up neither others that wait for their turn (of which there are as
    many as there) nor the end of the process.
    """
    done, outcome = anyio.Event(), Future[_Value]()
    token, context = anyio.lowlevel.current_token(), contextvars.copy_context()

    def work() -> None:
        try:
            outcome.set_result(context.run(function))
        except BaseException as error:
            outcome.set_exception(error)
        with suppress(RuntimeError):  # the event loop has ended
            from_thread.run_sync(done.set, token=token)

    async with to_thread.current_default_thread_limiter():
        threading.Thread(target=work, name=name, daemon=True).start()
        await done.wait()
    return outcome.result()
