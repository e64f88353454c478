"""The procedural tasks of reasoning-gym that have one right answer, by name.

Some of its tasks bring a verifier of their own, and several of those evaluate the answer as code. As an answer is text that a model
wrote, these tasks are refused; the others are graded by comparison. Also refused are tasks whose own reference, stated in the form in
which a model states its answer, would not be graded as right, such as grids of several lines (if that is so for single entries only,
they are left out), and tasks that differ from process to process (`UNREPEATABLE`).

Whether a prompt is for training, tuning or measuring depends only on its content (`ramet.env.splits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count as numbers
from itertools import islice
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ramet.agents.growth import seed_of
from ramet.agents.protocol import extract_answer
from ramet.agents.tree import Message, Task
from ramet.env.settings import EnvSettings, words
from ramet.env.splits import part, select_split
from ramet.errors import ConfigError, first_line, require

PATIENCE = 2_000
"""Prompts in a row without a new one for the split after which there are none left. Some generators take 50 ms per prompt."""
UNUSABLE = 20
"""Entries in a row that fail, or whose own reference is not graded as right, after which the task is refused."""
UNREPEATABLE = ("isomorphic_strings", "ransom_note")
"""Tasks whose generators depend on the order of a set of strings, and so on PYTHONHASHSEED: a resumed run would meet other tasks."""
_SIZE = 2**31 - 1


@dataclass(frozen=True)
class GymEnvironment:
    """The tasks called `task` in reasoning-gym; `options` are those of its generator."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "gym"
    splits = ("iid",)
    metrics = ("accuracy",)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split. Raises `ConfigError` for a task that is refused or runs out, or without reasoning-gym."""
        part(split, ("train", "tune", "iid"))
        entries = select_split(split, self._entries(seed_of(seed, f"gym/{self.task}/{split}", 0) % 2**31), PATIENCE)
        return [
            Task(f"{self.task}-{split}-{seed}-{n}", (Message("user", question),), {}, answer)
            for n, (question, answer) in enumerate(islice(entries, count))
        ]

    def _entries(self, seed: int) -> Iterator[tuple[str, tuple[str, str]]]:
        """Endlessly: (content, (question, answer))."""
        import reasoning_gym

        try:
            dataset = reasoning_gym.create_dataset(self.task, size=_SIZE, seed=seed, **self.options)
            verifies_itself = type(dataset).score_answer is not reasoning_gym.dataset.ProceduralDataset.score_answer
        except Exception as error:  # an unknown name, an option that its generator does not take
            raise ConfigError(f"reasoning-gym cannot generate {self.task!r}: {first_line(error)}") from error
        if verifies_itself:
            raise ConfigError(f"{self.task} is graded by a verifier of its own, which may run answers as code; choose another task")
        if self.task in UNREPEATABLE:
            raise ConfigError(f"the tasks of {self.task} differ from process to process, whatever the seed; choose another task")
        unusable = 0
        for number in numbers():
            try:
                entry = dataset[number]
                question, answer = entry["question"], str(entry["answer"])
                right = self._same(extract_answer(f"Answer: {answer}"), answer) and dataset.score_answer(answer, entry) == 1
                problem = "" if right else f"its reference {answer[:60]!r} would not be graded as right after `Answer:` on one line"
            except Exception as error:  # some generators fail for some numbers
                problem = first_line(error)
            unusable = unusable + 1 if problem else 0
            if unusable == UNUSABLE:
                raise ConfigError(f"{UNUSABLE} tasks of {self.task} in a row are unusable: {problem}; choose another or other env.options")
            if not problem:
                yield " ".join(question.split()), (question, answer)

    def _same(self, answer: str | None, reference: str) -> bool:
        return answer is not None and self.canonical(answer) == self.canonical(reference)

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """1.0 for the reference, ignoring case and white space; 0.0 for anything else."""
        return float(self._same(answer, str(task.reference)))

    def canonical(self, answer: str) -> str:
        """The answer without case and with single spaces."""
        return " ".join(answer.split()).casefold()

    def size(self, task: Task) -> int:
        """0: these tasks have no unit of difficulty."""
        return 0


class GymSettings(EnvSettings):
    """Procedural tasks of reasoning-gym."""

    kind: Literal["gym"] = "gym"
    """Which environment."""
    task: str = ""
    """The task's name in reasoning-gym, such as leg_counting."""
    options: dict[str, Any] = Field(default={})
    """Options of the task's generator."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.task:
            raise ValueError("task names no task of reasoning-gym, such as leg_counting")
        return self

    def build(self, count: Callable[[str], int] = words) -> GymEnvironment:
        """The environment; `count` is not used. Raises `ConfigError` if reasoning-gym is not installed."""
        require("reasoning_gym", "the environment gym")
        return GymEnvironment(self.task, self.options)
