"""What environments over a data set have in common: which rows make which tasks, and in what order.

What is trained on, tuned on and measured differs in content. A tenth of the training rows, chosen by their content, is kept for tuning and
never trained on. A question that is both in the training file and in one that is measured is an error, unless it is allowed; a row that
is in a measured file more than once is measured once.
"""

from __future__ import annotations

import html
import random
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from ramet.agents.tree import Task
from ramet.data import Row, load_rows
from ramet.env.splits import part
from ramet.errors import ConfigError, TaskError

TUNING = 10
"""One of so many questions of the training rows is for tuning."""
_SOURCES = {"train": "train", "tune": "train", "tune_ood": "train", "iid": "iid", "ood": "ood"}
_OPTIONS = {"train": "env.train", "iid": "env.data", "ood": "env.ood"}
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"})


def normalised(text: str) -> str:
    """The same for texts that differ in nothing but Unicode form, HTML entities, case, dashes, spaces, and signs that are not seen.

    The form of quotes and closing punctuation do not count either.
    """
    plain = unicodedata.normalize("NFKC", html.unescape(text)).translate(_PLAIN)
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    return " ".join(plain.casefold().split()).rstrip(" .?!")


def _shuffled(text: str) -> tuple[int, str]:
    return zlib.crc32(text.encode("utf-8", "surrogatepass")), text


@dataclass(frozen=True)
class Place:
    """A row in its source, by its number from 0 on; `question` is the same for rows that ask the same."""

    source: str
    index: int
    row: Row
    question: str

    @property
    def where(self) -> str:
        return _where(self.source, self.index)


def _where(source: str, index: int) -> str:
    return f"{source}, row {index + 1}"


@dataclass(frozen=True)
class Questions(ABC):
    """Tasks from rows.

    sources        where the rows of "train", "iid" and "ood" are; a split without a source does not exist. Those of "tune" and "tune_ood"
                   are among the training rows
    fields         the field map; see `ramet.data`
    allow_overlap  questions may be both trained on and measured
    """

    sources: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    name: str = "questions"
    allow_overlap: bool = False
    columns: ClassVar[tuple[str, ...]] = ()
    """What the field map may name; empty: anything."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.fields if self.columns and name not in self.columns]
        if unknown:
            raise ConfigError(f"env.fields names {unknown[0]!r}, which {self.name} does not read; it reads {', '.join(self.columns)}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of "iid" and "ood" that can be measured."""
        return tuple(split for split in ("iid", "ood") if self.sources.get(split))

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, all different; of "train" as many as asked for, epoch after epoch. Fewer rows than `count`: all of them.

        The order is a permutation by the seed, so that fewer tasks of one seed are the first of more. Raises `ConfigError` for a split that
        there is not, and for questions that are both trained on and measured.
        """
        if part(split) == "train":
            return self.training(0, count, seed)
        places = self._places(split)
        order = random.Random(f"{self.name}/{split}/{seed}").sample(range(len(places)), len(places))
        return [self._task(places[chosen], split) for chosen in order[:count]]

    def training(self, first: int, count: int, seed: int) -> list[Task]:
        """`count` training tasks from number `first` on of an endless series: epoch after epoch of all rows, each in an order of its own.

        So every row is drawn before any is drawn again.
        """
        places = self._places("train")
        made: list[Task] = []
        while len(made) < count:
            epoch, start = divmod(first + len(made), len(places))
            order = random.Random(f"{self.name}/train/{seed}/{epoch}").sample(range(len(places)), len(places))
            made += [self._task(places[chosen], "train", f"-{epoch}" * bool(epoch)) for chosen in order[start : start + count - len(made)]]
        return made

    def found(self, split: str) -> dict[str, int]:
        """Of a measured split: its `rows`, how many of them are `duplicates` of others, and how many questions are `trained_on` too.

        Raises what `tasks` raises.
        """
        self._places(split)
        once = self._once[split]
        trained = {place.question for place in self._rows.get("train", ())}
        rows = len(self._rows[split])
        return {"rows": rows, "duplicates": rows - len(once), "trained_on": sum(place.question in trained for place in once)}

    def source(self, split: str) -> str:
        """Where the rows of a split are. Raises `ConfigError` for a split that has none."""
        part(split)
        name = _SOURCES[split]
        if not self.sources.get(name):
            also = f": one of {TUNING} of its questions is for tuning" if split != name else ""
            raise ConfigError(f"{_OPTIONS[name]} names no file or data set{also}")
        return self.sources[name]

    def _task(self, place: Place, split: str, lap: str = "") -> Task:
        return self.task(place.row, f"{self.name}-{split}-{place.index}{lap}", place.where, split)

    def _places(self, split: str) -> list[Place]:
        """The rows that the tasks of a split are made of. Raises `TaskError` if there are none."""
        source = self.source(split)
        rows = self._rows[_SOURCES[split]]
        if not rows:
            raise TaskError(f"{source} has no row for the split {split!r} of {self.name}")
        if not self.allow_overlap:
            self._refuse_overlap()
        if split == _SOURCES[split] != "train":
            return self._once[split]
        places = [place for place in rows if (place.question in self._tuning) == (split != "train")]
        if not places:
            raise TaskError(
                f"{source} has too few questions that are not measured to keep one of {TUNING} for tuning; name a larger env.train"
            )
        return places

    @cached_property
    def _rows(self) -> dict[str, list[Place]]:
        """The rows that are wanted, by what they are for."""
        found: dict[str, list[Place]] = {}
        for name in ("train", *self.splits):
            if source := self.sources.get(name):
                rows = [(index, row) for index, row in enumerate(load_rows(source)) if self.wanted(row, name, _where(source, index))]
                found[name] = [Place(source, index, row, self.question(row, name, _where(source, index))) for index, row in rows]
        return found

    @cached_property
    def _tuning(self) -> set[str]:
        """The questions of the training rows that are kept for tuning: a fixed share, whatever the seed."""
        measured = {place.question for split in self.splits for place in self._rows[split]}
        questions = {place.question for place in self._rows["train"]}
        return set(sorted(questions - measured, key=_shuffled)[: len(questions) // TUNING])

    @cached_property
    def _once(self) -> dict[str, list[Place]]:
        """Of each measured split the rows without those that say what an earlier one says."""
        kept: dict[str, list[Place]] = {}
        for split in self.splits:
            asked = Counter(place.question for place in self._rows[split])
            once: dict[Hashable, Place] = {}
            for place in self._rows[split]:
                once.setdefault(self.content(place.row, split, place.where) if asked[place.question] > 1 else place.index, place)
            kept[split] = list(once.values())
        return kept

    def _refuse_overlap(self) -> None:
        trained = {place.question: place for place in reversed(self._rows.get("train", ()))}
        for split in self.splits:
            shared = [place for place in self._rows[split] if place.question in trained]
            if shared:
                first, other = shared[0], trained[shared[0].question]
                raise ConfigError(
                    f"{len(shared)} of the {len(self._rows[split])} rows of {first.source} ask what {other.source} asks, such as row "
                    f"{first.index + 1} and row {other.index + 1} there: they would be trained on and measured; take them out of one of "
                    "the two, or set env.allow_overlap=true"
                )

    def wanted(self, row: Row, split: str, where: str) -> bool:
        """Does the row belong to "train", "iid" or "ood"?"""
        return True

    @abstractmethod
    def question(self, row: Row, split: str, where: str) -> str:
        """What a row asks: the same for rows of which, if one is trained on, the other is not to be measured. Raises `TaskError`."""

    @abstractmethod
    def content(self, row: Row, split: str, where: str) -> Hashable:
        """The same for rows that make the same task, for which one outcome is to count. Raises `TaskError`."""

    @abstractmethod
    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        """The task of one row. Raises `TaskError` naming `where` for what is missing or broken."""
