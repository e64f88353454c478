"""What an environment is: tasks, how a task reads to the model, and how an answer is graded.

`tasks(split, count, seed)` is a pure function of its arguments, so that a task is named by its split,
seed and index. `grade` gives a task's score in [0, 1] for a stated answer (None: no answer). A grade
that raises or is not finite stops the run; it never becomes a zero.
"""

from __future__ import annotations

from typing import Protocol

from ramet.agents.tree import Task


class Environment(Protocol):
    """
    name     in results
    splits   those of "iid" and "ood" that can be measured
    metrics  what an answer can be graded by; `grade` without one uses the first
    """

    @property
    def name(self) -> str: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of `split` ("train"; "iid" or "ood"; "tune" or "tune_ood", see `ramet.env.splits`); the same arguments give
        the same tasks. Those that are measured or tuned on differ from one another in content, and from all that are trained on.
        Raises `ConfigError` for a split that there is not, and where there are not so many tasks."""

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """Score in [0, 1]. Raises `TaskError` for a task without a reference."""

    def canonical(self, answer: str) -> str:
        """The same for answers that say the same, for votes."""

    def size(self, task: Task) -> int:
        """A task's difficulty in its own unit (operands, hops); reports group by it."""
