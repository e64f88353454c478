"""What a tree earns: a reward function is anybody's code, so it is called within limits, and what it returns is checked.

A reward function takes a task and a finished tree and returns a number, named parts of one, or a `Reward`. It may be `async`:
then it runs on an asyncio event loop that all such functions of the process share, so a client may be kept between calls.
Any other function runs in a thread of its own. Each call has a time limit, and several trees are rewarded at the same time.
A reward that raises, hangs, or returns something else is a `RewardError` that names the task, never a zero.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import anyio
import anyio.from_thread
import anyio.lowlevel
from pydantic import Field

from ramet.agents.journal import Journal, fingerprint
from ramet.agents.tree import Task, Tree
from ramet.errors import CheckpointError, RametError, RewardError, first_line
from ramet.schema import Section

_USUAL: Any = object()


@dataclass(frozen=True, slots=True)
class Reward:
    """What a tree earned.

    score      how good its answer is; for the environments that ramet brings, in [0, 1]
    penalties  what is subtracted, by name
    reward     what is learned from; by default the score less the penalties
    parts      the parts of the score by name, before they are weighted
    """

    score: float
    penalties: Mapping[str, float] = field(default_factory=dict)
    reward: float = _USUAL
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reward is _USUAL:
            numbers = [self.score, *self.penalties.values()]
            usual = self.score - sum(self.penalties.values()) if all(isinstance(n, Real) for n in numbers) else math.nan
            object.__setattr__(self, "reward", usual)


Verdict = float | Mapping[str, float] | Reward
"""What a reward function may return: a number, named numbers of which the weighted sum counts, or all of a `Reward`."""
RewardFunction = Callable[[Task, Tree], Verdict | Awaitable[Verdict]]
"""Grades a finished tree of a task."""


class RewardConfig(Section):
    """How trees are rewarded. What is subtracted for their cost is in `[penalty]`."""

    function: str = ""
    """A function of your own, package.module:name, in place of the environment's grading."""
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default={})
    """For a reward of named parts: their weights, such as { right = 1.0, brief = 0.1 }; 1 for those that are not named."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that the reward of one tree may take; inf: any number of them."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Trees that are rewarded at the same time; 1 for a function that cannot run in several threads."""


def to_reward(value: Any, task: Task, weights: Mapping[str, float] | None = None) -> Reward:
    """What a reward function returned, as a `Reward` of finite numbers. Raises `RewardError` for anything else."""
    if isinstance(value, Reward):
        score, given = _number(value.score, "score", task), value
        penalties, parts = _numbers(given.penalties, "penalty", task), _numbers(given.parts, "part", task)
        return Reward(score, penalties, _number(given.reward, "reward", task), parts)
    if not isinstance(value, Mapping):
        return Reward(_number(value, "reward", task, "a number, a dict of named numbers or a Reward"))
    parts = _numbers(value, "part", task)
    strange = sorted(set(weights or ()) - parts.keys())
    if strange or not parts:
        returned = f"the reward of task {task.id} has {'the parts ' + ', '.join(parts) if parts else 'no parts'}"
        raise RewardError(f"{returned}{f', and reward.weights names {strange[0]}' if strange else ''}; fix one of them")
    return Reward(_number(sum((weights or {}).get(name, 1.0) * part for name, part in parts.items()), "reward", task), {}, parts=parts)


def _numbers(values: Any, what: str, task: Task) -> dict[str, float]:
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise RewardError(f"the {what}s of the reward of task {task.id} are not a dict of named numbers; fix the reward function")
    return {name: _number(value, f"{what} {name} of the reward", task) for name, value in values.items()}


def _number(value: Any, what: str, task: Task, wanted: str = "a number") -> float:
    if not isinstance(value, Real):
        raise RewardError(f"the {what} of task {task.id} is {_shown(value)}, not {wanted}; fix the reward function")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"the {what} of task {task.id} is {number!r}, which is not a finite number; fix the reward function")
    return number


def _shown(value: Any) -> str:
    kind = f"of type {type(value).__name__}"
    return repr(value) if value is None else f"the text {value[:40]!r}" if isinstance(value, str) else kind


def compute_reward(
    function: RewardFunction, task: Task, tree: Tree, weights: Mapping[str, float] | None = None, timeout: float = math.inf
) -> Reward:
    """The reward of a tree, checked; waits at most `timeout` seconds for it.

    Raises `RewardError` if the function raises anything but a `RametError`, takes too long, or returns anything but finite numbers.
    """
    later: list[Future[Any]] = []
    if timeout == math.inf:
        value = _called(function, task, tree, later)
    else:
        # In a thread that nobody waits for: one that hangs holds up neither the run nor the end of the process.
        outcome: Future[Any] = Future()
        threading.Thread(target=_fulfil, args=(outcome, _called, function, task, tree, later), name="reward", daemon=True).start()
        if not wait([outcome], timeout).done:
            for coroutine in later:
                coroutine.cancel()
            raise RewardError(
                f"the reward of task {task.id} took longer than {timeout:g} seconds (reward.timeout); fix the reward function, "
                "or raise that limit, and run again to resume"
            )
        value = outcome.result()
    return to_reward(value, task, weights)


def _called(function: RewardFunction, task: Task, tree: Tree, later: list[Future[Any]]) -> Any:
    """What the function returns, or what it returns awaited; `later` then receives what can be cancelled."""
    try:
        value = function(task, tree)
        if inspect.isawaitable(value):
            later.append(asyncio.run_coroutine_threadsafe(_awaited(value), _loop()))
            return later[0].result()
        return value
    except RametError:
        raise
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise RewardError(f"the reward of task {task.id} raised {cause}; fix the reward function") from error


def _fulfil(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    """Give a future what the function returns or raises."""
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)


async def _awaited(value: Awaitable[Any]) -> Any:
    try:
        return await value
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop
        raise RuntimeError(f"{type(error).__name__}") from error


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all rewards that are `async`, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


class KeptRewards:
    """The rewards of one update in a file, so that a resumed run asks a judge for none of them again. May be used by several threads.

    What another reward function has computed is forgotten: `identity` tells them apart. A reward belongs to the tree that it was
    computed for, and to its place among the trees of the update.
    """

    def __init__(self, path: Path, identity: str) -> None:
        try:
            self._journal = Journal(path, identity)
        except CheckpointError:
            path.unlink()
            self._journal = Journal(path, identity)
        self._lock = threading.Lock()
        self._known = {(tuple(record["key"]), record["tree"]): record["reward"] for record in self._journal.records}

    def get(self, key: tuple[object, ...], tree: Tree) -> Reward | None:
        """The reward of a tree at its place, if it is known."""
        known = self._known.get((key, _digest(tree)))
        return None if known is None else Reward(**known)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()

    def put(self, key: tuple[object, ...], tree: Tree, reward: Reward) -> None:
        """Keep a reward. Raises `StorageError`."""
        with self._lock:
            self._journal.append({"key": key, "tree": _digest(tree), "reward": asdict(reward)}, keep=False)


def _digest(tree: Tree) -> str:
    return fingerprint(tree.task_id, [(branch.id, branch.ids, branch.answer, branch.status) for branch in tree.branches])


class Judge:
    """Rewards trees as they finish, `config.concurrency` at a time, in threads that end when nothing waits."""

    def __init__(self, function: RewardFunction, config: RewardConfig):
        self._function, self._config = function, config
        self._lock, self._threads = threading.Lock(), 0
        self._waiting: deque[tuple[Future[Reward], Task, Tree, KeptRewards | None, tuple[object, ...]]] = deque()

    def submit(self, task: Task, tree: Tree, kept: KeptRewards | None = None, key: tuple[object, ...] = ()) -> Future[Reward]:
        """The reward of a tree, as a future that raises what `compute_reward` does. It is looked for in `kept`, and put there."""
        future: Future[Reward] = Future()
        if kept is not None and (known := kept.get(key, tree)) is not None:
            future.set_result(known)
            return future
        with self._lock:
            self._waiting.append((future, task, tree, kept, key))
            if self._threads < self._config.concurrency:
                self._threads += 1
                threading.Thread(target=self._work, name="judge", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                future, *arguments = self._waiting.popleft()
            _fulfil(future, self._reward, *arguments)

    def _reward(self, task: Task, tree: Tree, kept: KeptRewards | None, key: tuple[object, ...]) -> Reward:
        reward = compute_reward(self._function, task, tree, self._config.weights, self._config.timeout)
        if kept is not None:
            kept.put(key, tree, reward)
        return reward

    async def __call__(self, task: Task, tree: Tree) -> Reward:
        """The same, awaited."""
        return await settled(self.submit(task, tree))


async def settled(future: Future[Reward]) -> Reward:
    """The result of a future, awaited on any event loop."""
    done, loop, here = anyio.Event(), anyio.lowlevel.current_token(), threading.get_ident()

    def tell(_: Future[Reward]) -> None:
        if threading.get_ident() == here:
            done.set()
            return
        with suppress(anyio.RunFinishedError):  # nobody waits any more
            anyio.from_thread.run_sync(done.set, token=loop)

    future.add_done_callback(tell)
    await done.wait()
    return future.result()
