"""What environments over a data set have in common: which rows make which tasks, and in what order."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from ramet.agents.tree import Task
from ramet.data import Row, load_rows
from ramet.errors import ConfigError, TaskError

SPLITS = ("train", "iid", "ood")


@dataclass(frozen=True)
class Questions(ABC):
    """Tasks from rows.

    sources  where the rows of each split are; a split without one does not exist
    fields   the field map; see `ramet.data`
    """

    sources: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    name: str = "questions"

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of "iid" and "ood" that can be measured."""
        return tuple(split for split in SPLITS[1:] if self.sources.get(split))

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, all different; of "train" as many as asked for, row after row. Fewer rows than `count`: all of them.

        The order is a permutation by the seed, so that fewer tasks of one seed are the first of more.
        """
        source = self.sources.get(split)
        if not source:
            option = {"train": "env.train", "iid": "env.data", "ood": "env.ood"}.get(split)
            raise ConfigError(f"{option} names no file or data set" if option else f"no split {split!r}; there are {', '.join(SPLITS)}")
        rows = [(index, row) for index, row in enumerate(load_rows(source)) if self.wanted(row, split)]
        if not rows:
            raise TaskError(f"{source} has no row for the split {split!r} of {self.name}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        order: list[int] = []
        while not order or (split == "train" and len(order) < count):
            order += rng.sample(range(len(rows)), len(rows))
        made = []
        for place, chosen in enumerate(order[:count]):
            index, row = rows[chosen]
            lap = f"-{place // len(rows)}" if place >= len(rows) else ""
            made.append(self.task(row, f"{self.name}-{split}-{index}{lap}", f"{source}, row {index + 1}", split))
        return made

    def wanted(self, row: Row, split: str) -> bool:
        """Does the row belong to the split?"""
        return True

    @abstractmethod
    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        """The task of one row. Raises `TaskError` naming `where` for what is missing or broken."""
