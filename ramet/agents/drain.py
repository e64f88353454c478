"""How a process is stopped: by draining or by an interrupt.

Draining: the first SIGTERM inside `draining()` requests it. A long command checks `requested()` before it starts the next piece of
work (a tree to evaluate, an update) and raises `Drained` once nothing is running. Waiting for a backend to recover is cut short
(`pause`). The second SIGTERM interrupts.

Interrupt: by Ctrl-C, or by a SIGTERM outside `draining()`, once `handle_signals()` was called. Code inside `run` is cancelled, once
only, so that holding down Ctrl-C does not interrupt its cleanup; other code gets one `KeyboardInterrupt`. After `PATIENCE` seconds,
the next signal ends the process at once; what was written to disk before is kept.
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

from ramet.errors import Drained, RametError

PATIENCE = 3.0
"""Seconds that the cleanup after an interrupt may take before another signal ends the process."""

_Result = TypeVar("_Result")
_requested = False
_signal: int | None = None
_since = 0.0
_main: asyncio.Task[Any] | None = None
_last_words: Callable[[], object] = bool


def requested() -> bool:
    """Whether this process has been asked to start nothing new."""
    return _requested


def status() -> int | None:
    """The exit status of an interrupted process, 128 plus the signal's number; None if it was not interrupted."""
    return None if _signal is None else 128 + _signal


def handle_signals(last_words: Callable[[], object]) -> None:
    """Handle SIGINT and SIGTERM from now on, as the module describes. An ignored SIGINT, as in a shell's background, stays ignored.

    `last_words` is called before a process that does not finish its cleanup is ended.
    """
    global _signal, _last_words
    _signal, _last_words = None, last_words
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number: int, frame: Any) -> None:
    """The handler of SIGINT and SIGTERM: cancels what `run` runs, or raises `KeyboardInterrupt`."""
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
    """`anyio.run` on asyncio in which a signal cancels `main` and is then raised as `KeyboardInterrupt`. Main thread only."""

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
    """Wait `seconds` before a retry. Raises `Drained`, within a second, if draining is requested."""
    until = anyio.current_time() + seconds
    while not _requested and (left := until - anyio.current_time()) > 0:
        await anyio.sleep(min(left, 1.0))
    if _requested:
        raise Drained


@contextmanager
def draining(notify: Callable[[str], None]) -> Iterator[None]:
    """A block in which the first SIGTERM only makes `requested()` true and calls `notify` with a line to show. Main thread only."""
    global _requested
    _requested = False
    before: Any = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        global _requested
        if _requested:
            interrupt(number, frame)
        else:
            _requested = True
            notify("SIGTERM: finishing what is running; send it again to stop at once")

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _requested = False
