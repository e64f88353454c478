"""What environments over a data set have in common: which rows make which tasks, and in what order.

The tasks to train on, to tune on and to measure differ in content. A tenth of the training questions, chosen by content, is kept for
tuning and never trained on. A question that occurs both in the training rows and in measured rows is an error unless it is explicitly
allowed; a row that occurs several times in a measured file is measured once.
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
"""One in this many training questions is kept for tuning."""
_SOURCES = {"train": "train", "tune": "train", "tune_ood": "train", "iid": "iid", "ood": "ood"}
_OPTIONS = {"train": "env.train", "iid": "env.data", "ood": "env.ood"}
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"})


def normalised(text: str) -> str:
    """A form that is equal for texts that look alike.

    It ignores Unicode form, HTML entities, case, spaces, invisible characters, the shape of dashes and quotes, and closing punctuation.
    """
    plain = unicodedata.normalize("NFKC", html.unescape(text)).translate(_PLAIN)
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    return " ".join(plain.casefold().split()).rstrip(" .?!")


def _shuffled(text: str) -> tuple[int, str]:
    """A sort key that puts texts in an order that looks random and depends only on the texts."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")), text


@dataclass(frozen=True)
class Place:
    """A row and its place in its source, `index` counted from 0; `question` is equal for rows that ask the same."""

    source: str
    index: int
    row: Row
    question: str

    @property
    def where(self) -> str:
        """The place as error messages name it."""
        return _where(self.source, self.index)


def _where(source: str, index: int) -> str:
    return f"{source}, row {index + 1}"


@dataclass(frozen=True)
class Questions(ABC):
    """Tasks made from the rows of a data set.

    sources        the file or hub id of the rows of "train", "iid" and "ood"; a split without a source does not exist. The rows of "tune"
                   and "tune_ood" are among the training rows
    fields         the field map, see `ramet.data`
    name           the name in results
    allow_overlap  allow questions that are both trained on and measured

    Raises `ConfigError` if the field map names a field that is not read.
    """

    sources: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    name: str = "questions"
    allow_overlap: bool = False
    columns: ClassVar[tuple[str, ...]] = ()
    """The fields that the field map may name; empty: any."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.fields if self.columns and name not in self.columns]
        if unknown:
            raise ConfigError(f"env.fields names {unknown[0]!r}, which {self.name} does not read; it reads {', '.join(self.columns)}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the splits "iid" and "ood" that have a source."""
        return tuple(split for split in ("iid", "ood") if self.sources.get(split))

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` different tasks of a split, or all of them if there are fewer. Training tasks repeat, epoch after epoch.

        The order is a permutation by the seed, so that a smaller `count` gives the first tasks of a larger one. Raises `ConfigError` for a
        split that does not exist, and for questions that are both trained on and measured.
        """
        if part(split) == "train":
            return self.training(0, count, seed)
        places = self._places(split)
        order = random.Random(f"{self.name}/{split}/{seed}").sample(range(len(places)), len(places))
        return [self._task(places[chosen], split) for chosen in order[:count]]

    def training(self, first: int, count: int, seed: int) -> list[Task]:
        """`count` training tasks from number `first` on, in an endless series of epochs over all rows, each epoch in its own order.

        Every row is used once before any is used again.
        """
        places = self._places("train")
        tasks: list[Task] = []
        while len(tasks) < count:
            epoch, start = divmod(first + len(tasks), len(places))
            order = random.Random(f"{self.name}/train/{seed}/{epoch}").sample(range(len(places)), len(places))
            chosen = order[start : start + count - len(tasks)]
            tasks += [self._task(places[index], "train", f"-{epoch}" * bool(epoch)) for index in chosen]
        return tasks

    def row_counts(self, split: str) -> dict[str, int]:
        """The numbers of `rows` of a measured split, of `duplicates` among them, and of questions that are `trained_on` too.

        Raises the errors of `tasks`.
        """
        self._places(split)
        once = self._once[split]
        trained = {place.question for place in self._rows.get("train", ())}
        rows = len(self._rows[split])
        return {"rows": rows, "duplicates": rows - len(once), "trained_on": sum(place.question in trained for place in once)}

    def source(self, split: str) -> str:
        """The file or hub id of a split's rows. Raises `ConfigError` for a split without one."""
        part(split)
        name = _SOURCES[split]
        if not self.sources.get(name):
            also = f", and one in {TUNING} of its questions is for tuning" if split != name else ""
            raise ConfigError(f"{_OPTIONS[name]} names no file or data set{also}")
        return self.sources[name]

    def _task(self, place: Place, split: str, suffix: str = "") -> Task:
        return self.task(place.row, f"{self.name}-{split}-{place.index}{suffix}", place.where, split)

    def _places(self, split: str) -> list[Place]:
        """The rows from which the tasks of a split are made. Raises `TaskError` if there are none."""
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
                f"{source} has too few questions that are not measured to keep one in {TUNING} for tuning; name more rows in env.train"
            )
        return places

    @cached_property
    def _rows(self) -> dict[str, list[Place]]:
        """The rows to use for "train", "iid" and "ood"."""
        places: dict[str, list[Place]] = {}
        for name in ("train", *self.splits):
            if source := self.sources.get(name):
                rows = [(index, row) for index, row in enumerate(load_rows(source)) if self.wanted(row, name, _where(source, index))]
                places[name] = [Place(source, index, row, self.question(row, name, _where(source, index))) for index, row in rows]
        return places

    @cached_property
    def _tuning(self) -> set[str]:
        """The training questions that are kept for tuning: the same ones whatever the seed."""
        measured = {place.question for split in self.splits for place in self._rows[split]}
        questions = {place.question for place in self._rows["train"]}
        return set(sorted(questions - measured, key=_shuffled)[: len(questions) // TUNING])

    @cached_property
    def _once(self) -> dict[str, list[Place]]:
        """The rows of each measured split without those that have the same content as an earlier one."""
        unique: dict[str, list[Place]] = {}
        for split in self.splits:
            times = Counter(place.question for place in self._rows[split])
            once: dict[Hashable, Place] = {}
            for place in self._rows[split]:
                once.setdefault(self.content(place.row, split, place.where) if times[place.question] > 1 else place.index, place)
            unique[split] = list(once.values())
        return unique

    def _refuse_overlap(self) -> None:
        """Raise `ConfigError` if a question is both trained on and measured."""
        trained = {place.question: place for place in reversed(self._rows.get("train", ()))}
        for split in self.splits:
            shared = [place for place in self._rows[split] if place.question in trained]
            if shared:
                first, other = shared[0], trained[shared[0].question]
                raise ConfigError(
                    f"{len(shared)} of the {len(self._rows[split])} rows of {first.source} ask the same as rows of {other.source}, such as "
                    f"row {first.index + 1} and row {other.index + 1} there: they would be both trained on and measured; remove them from "
                    "one of the two, or set env.allow_overlap=true"
                )

    def wanted(self, row: Row, split: str, where: str) -> bool:
        """Whether to use the row for `split`: "train", "iid" or "ood"."""
        return True

    @abstractmethod
    def question(self, row: Row, split: str, where: str) -> str:
        """What a row asks. If it is equal for two rows, one must not be trained on when the other is measured. Raises `TaskError`."""

    @abstractmethod
    def content(self, row: Row, split: str, where: str) -> Hashable:
        """The content of a row. It is equal for rows that make the same task, which is measured once. Raises `TaskError`."""

    @abstractmethod
    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        """The task of one row. Raises `TaskError`, with `where`, if something is missing or malformed."""
