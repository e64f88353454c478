"""How a process is stopped.

Drained: the first SIGTERM inside `draining()` asks for it, and a long job, which asks `requested()` before it starts the next
piece of work (a tree to measure, an update), raises `Drained` once nothing is running. What waits for a backend to recover is
not waited for (`pause`). The second SIGTERM interrupts.

Interrupted: by Ctrl-C, or by a SIGTERM elsewhere, if `handle_signals()` was called. What runs in `run` is cancelled, once, so that
its cleaning up is not interrupted in its turn by a Ctrl-C that is held down; other code gets a `KeyboardInterrupt`, once. After
`PATIENCE` seconds the next signal ends the process where it stands, which loses nothing that was kept before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio

from ramet.errors import RametError

PATIENCE = 3.0

_Result = TypeVar("_Result")
_requested = False
_signal: int | None = None
_since = 0.0
_main: asyncio.Task[Any] | None = None
_last_words: Callable[[], object] = bool


class Drained(RametError):
    """What was running is finished and nothing new was started."""

    exit_code = 143

    def __init__(self) -> None:
        super().__init__("stopped on SIGTERM after what was running; run the same command again to resume")

    def __reduce__(self) -> tuple[type[Drained], tuple[()]]:
        return type(self), ()


def requested() -> bool:
    """Has this process been asked to start nothing new?"""
    return _requested


def status() -> int | None:
    """The exit status of a process that was interrupted, 128 and the signal's number; None if it was not."""
    return None if _signal is None else 128 + _signal


def handle_signals(last_words: Callable[[], object]) -> None:
    """Take SIGINT and SIGTERM from now on, as the module says. A SIGINT that is ignored, as in the background of a shell, stays so.

    `last_words` is called before the process ends where it stands.
    """
    global _signal, _last_words
    _signal, _last_words = None, last_words
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number: int, frame: Any) -> None:
    """The handler."""
    global _signal, _since
    if _signal is not None:
        if time.monotonic() - _since > PATIENCE:
            _last_words()
            os._exit(128 + _signal)
        return
    _signal, _since = number, time.monotonic()
    if _main is None:
        raise KeyboardInterrupt
    _main.get_loop().call_soon_threadsafe(_main.cancel)


def run(main: Callable[..., Awaitable[_Result]], *arguments: Any, backend_options: dict[str, Any] | None = None) -> _Result:
    """`anyio.run` on asyncio, such that a signal cancels `main` and is then raised as `KeyboardInterrupt`. Main thread only."""

    async def watched() -> _Result:
        global _main
        _main = asyncio.current_task()
        try:
            return await main(*arguments)
        finally:
            _main = None

    try:
        return anyio.run(watched, backend_options=backend_options)
    except BaseException as error:
        if _signal is not None and not isinstance(error, RametError):
            raise KeyboardInterrupt from error
        raise


async def pause(seconds: float) -> None:
    """Wait before trying again what failed. Raises `Drained`, within a second, where nothing new is to be started."""
    until = anyio.current_time() + seconds
    while not _requested and (left := until - anyio.current_time()) > 0:
        await anyio.sleep(min(left, 1.0))
    if _requested:
        raise Drained


@contextmanager
def draining(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first SIGTERM only makes `requested()` true; `tell` gets a line about it. Main thread only."""
    global _requested
    _requested = False
    before: Any = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        global _requested
        if _requested:
            interrupt(number, frame)
        else:
            _requested = True
            tell("SIGTERM: finishing what is running; once more stops at once")

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _requested = False
