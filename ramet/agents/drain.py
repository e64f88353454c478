"""Stop after what is running: the first SIGTERM drains, the second stops at once.

A long job asks `requested()` before it starts the next piece of work (a tree to measure, an update) and raises
`Drained` once nothing is running. What waits for a backend to recover is not waited for (`pause`). Only inside
`draining()` does SIGTERM mean this; elsewhere it interrupts.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from ramet.errors import RametError

_requested = False
_interrupted = False


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


def interrupted() -> bool:
    """Was it a SIGTERM that interrupted this process, and not Ctrl-C?"""
    return _interrupted


def interrupt(number: int, frame: Any) -> None:
    """The handler of a SIGTERM that stops at once."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


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
        _requested = True
        tell("SIGTERM: finishing what is running; once more stops at once")

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _requested = False
