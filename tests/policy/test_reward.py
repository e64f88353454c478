"""Rewards are anybody's code: what they return is checked, and one that hangs, raises or exits ends in one line that names the task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest

from ramet.agents.tree import Task, Tree
from ramet.env.environment import answered
from ramet.env.grading import reward_function
from ramet.errors import ConfigError, RewardError, TaskError
from ramet.policy.training.reward import Judge, Reward, RewardConfig, compute_reward, to_reward

TASK = Task("t7", (), reference="3")
TREE = answered(TASK, "3")


def reward(function: Callable[..., Any], seconds: float = 30.0, **options: Any) -> Reward:
    return compute_reward(function, TASK, TREE, timeout=seconds, **options)


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1)])
def test_a_number_is_the_score_and_the_reward(value: Any) -> None:
    async def later(task: Task, tree: Tree) -> Any:
        await asyncio.sleep(0)
        return value

    for function in (later, lambda task, tree: value, lambda task, tree: later(task, tree)):
        earned = reward(function)
        assert earned == Reward(1.0, {}, 1.0) and type(earned.reward) is float


def test_a_reward_is_by_default_the_score_less_the_penalties() -> None:
    assert Reward(1.0, {"words": 0.25, "calls": 0.25}).reward == 0.5
    assert Reward(0.5).reward == 0.5 and Reward(1.0, {}, 0.25).reward == 0.25


def test_named_parts_are_weighted_and_kept() -> None:
    parts = {"right": 1.0, "brief": 0.5}
    assert reward(lambda task, tree: parts) == Reward(1.5, {}, 1.5, parts)
    assert reward(lambda task, tree: parts, weights={"brief": 0.1}) == Reward(1.05, {}, 1.05, parts)
    with pytest.raises(RewardError, match=r"of task t7 has the parts right, brief, and reward\.weights names short"):
        reward(lambda task, tree: parts, weights={"short": 1.0})


def leave(task: Task, tree: Tree) -> float:
    raise SystemExit(3)


async def leave_later(task: Task, tree: Tree) -> float:
    raise SystemExit(3)


@pytest.mark.parametrize("seconds", [30.0, float("inf")])
@pytest.mark.parametrize("function", [leave, leave_later])
def test_a_reward_that_exits_ends_no_process_and_no_event_loop(function: Callable[..., Any], seconds: float) -> None:
    with pytest.raises(RewardError, match=r"the reward of task t7 raised .*; fix the reward function"):
        reward(function, seconds)

    async def well(task: Task, tree: Tree) -> float:
        return 1.0

    assert reward(well).score == 1.0


def test_a_reward_that_hangs_is_one_line_and_holds_up_nothing() -> None:
    release = threading.Event()

    async def hang_later(task: Task, tree: Tree) -> float:
        await asyncio.Event().wait()
        return 1.0

    async def block(task: Task, tree: Tree) -> float:
        release.wait()
        return 1.0

    try:
        for function in (lambda task, tree: float(release.wait()), hang_later, block):
            with pytest.raises(RewardError, match=r"of task t7 took longer than 0.01 seconds \(reward.timeout\); .*run again to resume"):
                reward(function, 0.01)
    finally:
        release.set()


def test_the_packages_own_errors_pass_and_others_are_named() -> None:
    def refuse(task: Task, tree: Tree) -> float:
        raise TaskError("no usable reference")

    with pytest.raises(TaskError, match=r"^no usable reference$"):
        reward(refuse)
    with pytest.raises(RewardError, match="raised TimeoutError: the judge is slow"):
        reward(lambda task, tree: (_ for _ in ()).throw(TimeoutError("the judge is slow")))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("wait", [True, False])
def test_rewards_run_beside_one_another_up_to_the_limit(backend: str, wait: bool) -> None:
    """Three must be under way before any returns; a fourth never is."""
    running, most, met = 0, 0, threading.Barrier(3)

    def together(task: Task, tree: Tree) -> float:
        nonlocal running, most
        with threading.Lock():
            running += 1
            most = max(most, running)
        met.wait(30)
        running -= 1
        return 1.0

    async def later(task: Task, tree: Tree) -> float:
        return await asyncio.to_thread(together, task, tree)

    async def main() -> list[Reward]:
        judge = Judge(later if wait else together, RewardConfig(concurrency=3))
        futures = [judge.submit(TASK, TREE) for _ in range(8)]
        return [await judge(TASK, TREE), *(future.result() for future in futures)]

    assert [earned.score for earned in anyio.run(main, backend=backend)] == [1.0] * 9
    assert most == 3


def test_what_is_no_reward_is_said_with_the_task() -> None:
    class Strange:
        def __repr__(self) -> str:
            raise ValueError

    for value in (Strange(), [1.0], "1", None, {"a": "1"}, {1: 1.0}, Reward(1.0, {"a": "1"}), Reward("1"), Reward(1.0, parts=3)):  # type: ignore[arg-type,dict-item]
        with pytest.raises(RewardError, match=r"t7.*; fix the reward function"):
            to_reward(value, TASK)


def test_a_function_of_ones_own_takes_a_task_and_a_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "own_reward.py").write_text("def good(task, tree): return 0.5\ndef short(task): return 1\nnumber = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reward(reward_function(None, "own_reward:good")).score == 0.5  # type: ignore[arg-type]
    for path, said in (
        ("own_reward:short", r"reward.function: own_reward:short takes \(task\), not \(task, tree\)"),
        ("own_reward:number", "reward.function: own_reward:number is of type int, not a function of a task and a tree"),
        ("own_reward:god", "reward.function: own_reward has no god; did you mean good"),
        ("no_such_module:f", "reward.function: there is no module 'no_such_module'"),
        ("own_reward", "reward.function: 'own_reward' is not of the form"),
    ):
        with pytest.raises(ConfigError, match=said):
            reward_function(None, path)  # type: ignore[arg-type]
