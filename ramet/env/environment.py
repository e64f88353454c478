"""What an environment is: tasks, how a task reads to the model, and how an answer is graded.

`tasks(split, count, seed)` is a pure function of its arguments, so that a task is named by its split,
seed and index. `grade` gives a task's score in [0, 1] for a stated answer (None: no answer). A grade
that raises or is not finite stops the run; it never becomes a zero.
"""

from __future__ import annotations

from typing import Protocol

from ramet.agents.tree import Task


class Environment(Protocol):
    name: str

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of `split` ("train", "iid" or "ood"); the same arguments give the same tasks."""

    def grade(self, task: Task, answer: str | None) -> float:
        """Score in [0, 1]. Raises `TaskError` for a task without a reference."""

    def size(self, task: Task) -> int:
        """A task's difficulty in its own unit (operands, hops); reports group by it."""
