"""The settings of an environment: what it is called, what it takes, and how it is built.

Each environment keeps its own class of these beside itself; `ramet.env.registry` finds them. To add an environment, add a file here with
an `Environment` and a subclass of `EnvSettings` whose `kind` is a literal of its own.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from ramet.env.environment import Environment
from ramet.env.instructions import COT, DELEGATE_PARTS
from ramet.errors import ConfigError
from ramet.schema import Section


def words(text: str) -> int:
    """Tokens of an English text, roughly; for when no tokenizer is at hand."""
    return len(text) // 4


class EnvSettings(Section):
    """The section `[env]`: a kind, and the options of that kind."""

    kind: str
    """Which environment."""

    language: ClassVar[bool] = True
    """Does it ask questions in words, so that a method has to say how they are to be answered?"""
    multihop: ClassVar[bool] = False
    """Are there documents?"""
    paths: ClassVar[tuple[str, ...]] = ()
    """Options that may name a file or a folder."""

    @abstractmethod
    def build(self, count: Callable[[str], int] = words) -> Environment:
        """The environment; `count` gives the tokens of a text."""

    def instruction(self, spawn: bool) -> str:
        """What a model that decides by itself is told at the end of a question, with the tool (`spawn`) or without."""
        return DELEGATE_PARTS if spawn else COT

    @property
    def measurable(self) -> bool:
        """Is there anything to be measured on?"""
        return True

    def check_measurable(self) -> None:
        """Raises `ConfigError` if there is nothing to be measured on."""
        if not self.measurable:
            raise ConfigError("env.data names no file or data set: give --data")

    def files(self) -> dict[str, str]:
        """SHA-256 of the local files that tasks are made of: a journal of other rows is not this job's."""
        return {}

    def look(self) -> Any:
        """How a model that sees looks at videos: a `ramet.policy.engines.vision.Look`."""
        from ramet.policy.engines.vision import Look

        return Look()

    def unjudged(self) -> Self:
        """The same tasks, graded without a reward model: it is not loaded to look at the data."""
        return self

    def absolute(self) -> Self:
        """With whole paths, for a process that stands in another folder."""
        given = {name: Path(value) for name in self.paths if (value := getattr(self, name))}
        return self.model_copy(update={name: str(path.resolve()) for name, path in given.items() if path.exists()})


class DataSettings(EnvSettings):
    """Of environments over a data set."""

    data: str = ""
    """File (.jsonl, .json, .parquet) or hub id of what is measured."""
    train: str = ""
    """File or hub id of what is trained on."""
    ood: str = ""
    """File or hub id of what is measured out of distribution."""
    fields: dict[str, str] = Field(default={})
    """Which column holds what, where a data set calls it otherwise, such as { question = "problem" }."""
    allow_overlap: bool = False
    """Questions may be both trained on and measured."""

    paths: ClassVar[tuple[str, ...]] = ("data", "train", "ood")

    @property
    def measurable(self) -> bool:
        return bool(self.data or self.ood)

    @property
    def sources(self) -> dict[str, str]:
        """Where the rows of each split are."""
        return {"iid": self.data, "train": self.train, "ood": self.ood}

    def files(self) -> dict[str, str]:
        return hashes({name: Path(value) for name in ("data", "train", "ood") if (value := getattr(self, name))})


def hashes(paths: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of those that are files."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.is_file()}
