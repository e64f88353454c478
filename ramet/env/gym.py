"""The procedural tasks of reasoning-gym, by name, that have one right answer.

Some of its tasks bring a verifier of their own, and several of those evaluate the answer as code. An answer is text that a model
wrote, so these tasks are refused; the others are graded by comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ramet.agents.actor import seed_of
from ramet.agents.tree import Message, Task
from ramet.errors import ConfigError, first_line


@dataclass(frozen=True)
class GymEnvironment:
    """Tasks called `task` in reasoning-gym, with the options `options` of its generator."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "gym"
    splits = ("iid",)
    metrics = ("accuracy",)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        try:
            import reasoning_gym
        except ImportError:
            raise ConfigError("these tasks need reasoning-gym: pip install 'ramet[data]'") from None
        own = seed_of(seed, f"gym/{self.task}/{split}", 0) % 2**31
        try:
            made = reasoning_gym.create_dataset(self.task, size=count, seed=own, **self.options)
            by_itself = type(made).score_answer is not reasoning_gym.dataset.ProceduralDataset.score_answer
        except Exception as error:  # an unknown name, an option that its generator does not take
            raise ConfigError(f"reasoning-gym does not make {self.task!r}: {first_line(error)}") from error
        if by_itself:
            raise ConfigError(f"{self.task} is graded by a verifier of its own, which may run answers as code; choose another task")
        return [
            Task(f"{self.task}-{split}-{seed}-{n}", (Message("user", entry["question"]),), {}, str(entry["answer"]))
            for n, entry in enumerate(made)
        ]

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return float(answer is not None and self.canonical(answer) == self.canonical(str(task.reference)))

    def canonical(self, answer: str) -> str:
        return " ".join(answer.split()).casefold()

    def size(self, task: Task) -> int:
        return 0
