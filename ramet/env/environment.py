"""The interface of an environment: its tasks, how a task is put to the model, and how an answer is graded.

`tasks(split, count, seed)` is a pure function of its arguments, so that its split, seed and index identify a task. `grade` scores a
stated answer (None: no answer) in [0, 1]. A grade that raises or is not finite stops the run; it never becomes a zero.

An environment of another package may be a subclass of `Environment`, which has all but `tasks` and `grade`, or any class with
its members. With a method `reward(task, tree)`, as in `ramet.policy.training.reward`, it grades whole trees instead of answers.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from ramet.agents.tree import Branch, Status, Task, Tree, Usage
from ramet.policy.training.reward import RewardFunction, compute_reward


class Environment(Protocol):
    """Tasks with their grading. See `docs/your-own-environment.md`."""

    @property
    def name(self) -> str:
        """The name in results."""
        return type(self).__name__

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the splits "iid" and "ood" that there are tasks for."""
        return ("iid",)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics by which an answer can be graded; `grade` uses the first by default."""
        return ("score",)

    @abstractmethod
    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split: "train", "iid", "ood", "tune" or "tune_ood" (see `ramet.env.splits`).

        The same arguments give the same tasks. Tasks to measure or tune on differ in content from one another and from all training
        tasks. Raises `ConfigError` for an unknown split, and if there are fewer tasks than `count`.
        """

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """The score of an answer in [0, 1]; None is no answer. Raises `TaskError` for a task without a usable reference.

        An environment with a `reward` needs none of its own: this one rewards a tree of nothing but the answer.
        """
        reward: RewardFunction = getattr(self, "reward")  # noqa: B009
        return compute_reward(reward, task, answered(task, answer)).score

    def canonical(self, answer: str) -> str:
        """A form that is equal for equivalent answers, by which votes are counted."""
        return " ".join(answer.split()).casefold()

    def size(self, task: Task) -> int:
        """The difficulty of a task in the environment's own unit (operands, hops); reports group by it."""
        return 0


def answered(task: Task, answer: str | None) -> Tree:
    """A tree of nothing but an answer, or none, for grading an answer that no model gave."""
    status = Status.EMPTY if answer is None else Status.ANSWERED
    return Tree(task.id, Branch("0", (), (), status, answer), Usage())
