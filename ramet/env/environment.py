"""The interface of an environment: its tasks, how a task is put to the model, and how an answer is graded.

`tasks(split, count, seed)` is a pure function of its arguments, so that its split, seed and index identify a task. `grade` scores a
stated answer (None: no answer) in [0, 1]. A grade that raises or is not finite stops the run; it never becomes a zero.
"""

from __future__ import annotations

from typing import Protocol

from ramet.agents.tree import Task


class Environment(Protocol):
    """Tasks with their grading. To add one, see `ramet.env.settings`."""

    @property
    def name(self) -> str:
        """The name in results."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the splits "iid" and "ood" that there are tasks for."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics by which an answer can be graded; `grade` uses the first by default."""

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split: "train", "iid", "ood", "tune" or "tune_ood" (see `ramet.env.splits`).

        The same arguments give the same tasks. Tasks to measure or tune on differ in content from one another and from all training
        tasks. Raises `ConfigError` for an unknown split, and if there are fewer tasks than `count`.
        """

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """The score of an answer in [0, 1]; None is no answer. Raises `TaskError` for a task without a usable reference."""

    def canonical(self, answer: str) -> str:
        """A form that is equal for equivalent answers, by which votes are counted."""

    def size(self, task: Task) -> int:
        """The difficulty of a task in the environment's own unit (operands, hops); reports group by it."""
