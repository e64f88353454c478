"""A virtual clock and a seeded scheduler: one seed is one interleaving.

`simulate(main, seed)` runs `main` on an asyncio event loop of its own, in which

- time stands still while anything can run and then jumps to the next timer, so that an hour of simulated latency costs nothing;
- what runs next, of all that is ready, follows from the seed, the task's number and how often the task has been scheduled. Memory
  addresses and hash seeds play no part: the same seed is the same run in every process. Unlike a uniform draw among all that is
  ready, this is fair: nothing is overtaken by more than `PATIENCE` later callbacks, so that busy waiting (as asyncio and anyio do)
  is bounded;
- an observer is called after every step, to check invariants.

The loop has no input or output. If nothing can ever run again, that is a deadlock and raises an error.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, TypeVar

from ramet.agents import drain
from ramet.errors import SimulationError

T = TypeVar("T")
PATIENCE = 1000
"""Number of later callbacks that may run before an earlier one."""
_WORD = 2**64 - 1


class _Task(asyncio.Task[Any]):
    number = 0
    scheduled = 0


class SimulatedLoop(asyncio.SelectorEventLoop):
    """The event loop that the module describes. `steps` counts the callbacks that ran; at `limit` steps it raises `SimulationError`."""

    def __init__(self, seed: int, observe: Callable[[], None] | None = None, limit: int = 10_000_000):
        super().__init__()
        self.steps = 0
        self._seed, self._observe, self._limit = seed, observe, limit
        self._now = 0.0
        self._queue: list[tuple[int, int, events.Handle]] = []
        self._made = self._others = self._entered = 0
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` of virtual time pass while nothing runs, as a blocking call would."""
        self._now += seconds

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = _Task.__new__(_Task)
        self._made += 1
        task.number = self._made
        task.__init__(coro, loop=loop, **options)  # type: ignore[misc]
        return task

    def _call_soon(self, callback: Callable[..., Any], args: Any, context: Context | None) -> events.Handle:
        handle = events.Handle(callback, args, self, context)
        self._enter(handle)
        return handle

    def _enter(self, handle: events.Handle) -> None:
        """Queue a ready callback under a number that decides when it runs."""
        task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
        if isinstance(task, _Task):
            task.scheduled += 1
            turn = _mixed(self._seed, 2 * task.number, task.scheduled)
        else:
            self._others += 1
            turn = _mixed(self._seed, 2 * self._others + 1, 0)
        self._entered += 1
        heapq.heappush(self._queue, (self._entered + turn % PATIENCE, self._entered, handle))

    def _next(self) -> events.Handle:
        return heapq.heappop(self._queue)[2]

    def _run_once(self) -> None:
        timers = self._scheduled  # type: ignore[attr-defined]
        while timers and (timers[0]._cancelled or timers[0]._when <= self._now or not self._queue):
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                self._now = max(self._now, timer._when)
                self._enter(timer)
        if not self._queue:
            raise SimulationError(f"deadlock after {self.steps} steps: nothing is ready and no timer is set")
        handle = self._next()
        if handle._cancelled:
            return
        self.steps += 1
        handle._run()
        # An error raised here ends the run. Tasks are then cancelled on this loop, without the observer.
        if self.steps == self._limit:
            self._observe = None
            raise SimulationError(f"no end after {self._limit} steps")
        if self._observe is not None:
            observe, self._observe = self._observe, None
            observe()
            self._observe = observe


def _mixed(seed: int, a: int, b: int) -> int:
    """A 64-bit hash of three numbers."""
    x = (seed * 0x9E3779B97F4A7C15 + a * 0xBF58476D1CE4E5B9 + b * 0x94D049BB133111EB) & _WORD
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _WORD
    return x ^ x >> 31


class _ExploringLoop(SimulatedLoop):
    """Where several callbacks are ready, runs those that `choices` name, then always the first; `ready` records how many were."""

    def __init__(self, choices: list[int], observe: Callable[[], None] | None, limit: int):
        super().__init__(0, observe, limit)
        self.choices = choices
        self.ready: list[int] = []

    def _next(self) -> events.Handle:
        # A cancelled callback does nothing, so it is not a choice.
        self._queue = [item for item in self._queue if not item[2]._cancelled] or self._queue[:1]
        if len(self._queue) == 1:
            return self._queue.pop()[2]
        self._queue.sort()
        at = self.choices[len(self.ready)] if len(self.ready) < len(self.choices) else 0
        self.ready.append(len(self._queue))
        return self._queue.pop(at)[2]


def explore(main: Callable[[], Awaitable[object]], observe: Callable[[], None] | None = None, max_runs: int = 100_000) -> tuple[int, bool]:
    """Run `main` in every interleaving of its tasks, or in the first `max_runs`. Returns the number of runs, and whether that is all.

    The search is depth first over the choice at each step, and every run starts from the beginning; apart from the order in which
    its tasks run, `main` must do the same each time.
    """
    choices: list[int] = []
    for count in range(1, max_runs + 1):
        loops: list[_ExploringLoop] = []

        def factory(choices: list[int] = choices, loops: list[_ExploringLoop] = loops) -> _ExploringLoop:
            loops.append(_ExploringLoop(choices, observe, 100_000))
            return loops[0]

        drain.run(main, backend_options={"loop_factory": factory})
        ready = loops[0].ready
        path = (choices + [0] * len(ready))[: len(ready)]
        while path and path[-1] + 1 >= ready[len(path) - 1]:
            path.pop()
        if not path:
            return count, True
        choices = [*path[:-1], path[-1] + 1]
    return max_runs, False


def simulate(main: Callable[[], Awaitable[T]], seed: int, observe: Callable[[], None] | None = None, limit: int = 10_000_000) -> T:
    """Run `main` to its end in the interleaving that `seed` selects. What `main` or `observe` raises is raised.

    Raises `SimulationError` for a deadlock, or after `limit` steps.
    """
    return drain.run(main, backend_options={"loop_factory": lambda: SimulatedLoop(seed, observe, limit)})
