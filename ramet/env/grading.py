"""How a tree of an environment is graded: by the environment's answer key, by its own reward, or by a function of the user."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from ramet.agents.tree import Task, Tree
from ramet.env.environment import Environment
from ramet.errors import ConfigError
from ramet.imports import load_object

if TYPE_CHECKING:
    from ramet.policy.training.reward import RewardFunction


def reward_function(env: Environment, path: str = "") -> RewardFunction:
    """The reward function at the import path `path`; without one, the environment's `reward`, or else its grade of the tree's answer.

    Raises `ConfigError` for a path that names no function of a task and a tree.
    """
    if path:
        function = load_object(path, "reward.function")
        check_signature(function, f"reward.function: {path}")
        return function  # type: ignore[no-any-return]
    own: RewardFunction | None = getattr(env, "reward", None)
    if own is not None:
        return own

    def by_answer(task: Task, tree: Tree) -> float:
        return env.grade(task, tree.answer)

    return by_answer


def check_signature(function: object, what: str) -> None:
    """Raise `ConfigError`, in a line that begins with `what`, for what cannot be called with a task and a tree."""
    if not callable(function):
        raise ConfigError(f"{what} is of type {type(function).__name__}, not a function of a task and a tree")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: nothing is known
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ConfigError(f"{what} takes {signature}, not (task, tree)") from None
