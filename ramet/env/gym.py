"""The procedural tasks of reasoning-gym, by name, that have one right answer.

Some of its tasks bring a verifier of their own, and several of those evaluate the answer as code. An answer is text that a model
wrote, so these tasks are refused; the others are graded by comparison. Refused as well are tasks whose reference, stated as a model states
its answer, would not be graded right, such as grids of several lines; an entry by which that is so now and then is left out. And tasks
that are not the same in every process (`UNREPEATABLE`).

A prompt says by its content alone whether it is for training, for tuning or to be measured (`ramet.env.splits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count as numbers
from itertools import islice
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ramet.agents.actor import seed_of
from ramet.agents.protocol import extract_answer
from ramet.agents.tree import Message, Task
from ramet.env.settings import EnvSettings, words
from ramet.env.splits import drawn, part
from ramet.errors import ConfigError, first_line, require

PATIENCE = 2_000
"""Prompts in a row that give none for a split, after which there are no more. Some generators take a twentieth of a second for one."""
UNUSABLE = 20
"""Entries in a row that cannot be made, or whose own reference is not graded right, after which the task is refused."""
UNREPEATABLE = ("isomorphic_strings", "ransom_note")
"""Their generators draw from the order of a set of strings, which PYTHONHASHSEED decides: a run that goes on would meet other tasks."""
_SIZE = 2**31 - 1


@dataclass(frozen=True)
class GymEnvironment:
    """Tasks called `task` in reasoning-gym, with the options `options` of its generator."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "gym"
    splits = ("iid",)
    metrics = ("accuracy",)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        part(split, ("train", "tune", "iid"))
        entries = drawn(split, self._entries(seed_of(seed, f"gym/{self.task}/{split}", 0) % 2**31), PATIENCE)
        return [
            Task(f"{self.task}-{split}-{seed}-{n}", (Message("user", question),), {}, answer)
            for n, (question, answer) in enumerate(islice(entries, count))
        ]

    def _entries(self, seed: int) -> Iterator[tuple[str, tuple[str, str]]]:
        """Endlessly: content, question and answer."""
        import reasoning_gym

        try:
            made = reasoning_gym.create_dataset(self.task, size=_SIZE, seed=seed, **self.options)
            by_itself = type(made).score_answer is not reasoning_gym.dataset.ProceduralDataset.score_answer
        except Exception as error:  # an unknown name, an option that its generator does not take
            raise ConfigError(f"reasoning-gym does not make {self.task!r}: {first_line(error)}") from error
        if by_itself:
            raise ConfigError(f"{self.task} is graded by a verifier of its own, which may run answers as code; choose another task")
        if self.task in UNREPEATABLE:
            raise ConfigError(f"the tasks of {self.task} differ from process to process, whatever the seed; choose another task")
        in_a_row = 0
        for number in numbers():
            try:
                entry = made[number]
                question, answer = entry["question"], str(entry["answer"])
                right = self._same(extract_answer(f"Answer: {answer}"), answer) and made.score_answer(answer, entry) == 1
                said = "" if right else f"its reference {answer[:60]!r} would not be graded right after `Answer:`, on one line"
            except Exception as error:  # some generators give up on some numbers
                said = first_line(error)
            in_a_row = in_a_row + 1 if said else 0
            if in_a_row == UNUSABLE:
                raise ConfigError(f"{UNUSABLE} tasks of {self.task} in a row are of no use: {said}; choose another or other env.options")
            if not said:
                yield " ".join(question.split()), (question, answer)

    def _same(self, answer: str | None, reference: str) -> bool:
        return answer is not None and self.canonical(answer) == self.canonical(reference)

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return float(self._same(answer, str(task.reference)))

    def canonical(self, answer: str) -> str:
        return " ".join(answer.split()).casefold()

    def size(self, task: Task) -> int:
        return 0


class GymSettings(EnvSettings):
    """Procedural tasks of reasoning-gym."""

    kind: Literal["gym"] = "gym"
    """Which environment."""
    task: str = ""
    """Its name in reasoning-gym, such as leg_counting."""
    options: dict[str, Any] = Field(default={})
    """Options of its generator."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.task:
            raise ValueError("task names no task of reasoning-gym, such as leg_counting")
        return self

    def build(self, count: Callable[[str], int] = words) -> GymEnvironment:
        require("reasoning_gym", "the environment gym")
        return GymEnvironment(self.task, self.options)
