"""The settings of an environment: its kind, its options, and how it is built.

The settings class of each environment that ramet brings is in the same file as the environment, and `ramet.env.registry` finds it: a
subclass of `EnvSettings` whose `kind` is a literal of its own. For those of other packages see `ramet.env.outside`.
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
    """A rough number of tokens in an English text, for use without a tokenizer."""
    return len(text) // 4


class EnvSettings(Section):
    """The section `[env]`: a kind, and the options of that kind."""

    kind: str
    """Which environment."""

    multihop: ClassVar[bool] = False
    """Whether tasks have documents."""
    waits: ClassVar[bool] = False
    """Whether grading may wait for a server or for a large model, within limits of its own."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Options that may name a file or a folder."""

    @abstractmethod
    def build(self, count: Callable[[str], int] = words) -> Environment:
        """The environment; `count` counts the tokens of a text."""

    def instruction(self, spawn: bool) -> str:
        """The instruction at the end of a question for a model that decides by itself, with the tool (`spawn`) or without."""
        return DELEGATE_PARTS if spawn else COT

    @property
    def language(self) -> bool:
        """Whether questions are in words, so that each method has to add an instruction on how to answer."""
        return True

    @property
    def measurable(self) -> bool:
        """Whether there are tasks to measure on."""
        return True

    @property
    def code(self) -> tuple[str, ...]:
        """The import paths of code that is not ramet's own, which a run depends on."""
        return ()

    def check_measurable(self) -> None:
        """Raise `ConfigError` if there are no tasks to measure on."""
        if not self.measurable:
            raise ConfigError("env.data names no file or data set: give --data")

    def files(self) -> dict[str, str]:
        """The SHA-256 of the local files that tasks are made of, by option, so that a journal of other rows is not resumed."""
        return {}

    def video_settings(self) -> Any:
        """How a vision-language model samples videos: a `ramet.policy.engines.vision.VideoSettings`."""
        from ramet.policy.engines.vision import VideoSettings

        return VideoSettings()

    def without_reward_model(self) -> Self:
        """Settings of the same tasks graded without a reward model, for commands that only read the data."""
        return self

    def absolute(self) -> Self:
        """A copy with absolute paths, for a process with another working directory."""
        paths = {name: Path(value) for name in self.paths if (value := getattr(self, name))}
        return self.model_copy(update={name: str(path.resolve()) for name, path in paths.items() if path.exists()})


class DataSettings(EnvSettings):
    """The settings of an environment over a data set."""

    data: str = ""
    """File (.jsonl, .json, .parquet) or hub id of the rows to measure on."""
    train: str = ""
    """File or hub id of the training rows."""
    ood: str = ""
    """File or hub id of the out-of-distribution rows to measure on."""
    fields: dict[str, str] = Field(default={})
    """The columns of fields that the data set names differently, such as { question = "problem" }."""
    allow_overlap: bool = False
    """Allow questions that are both trained on and measured."""

    paths: ClassVar[tuple[str, ...]] = ("data", "train", "ood")

    @property
    def measurable(self) -> bool:
        """Whether `data` or `ood` is set."""
        return bool(self.data or self.ood)

    @property
    def sources(self) -> dict[str, str]:
        """The file or hub id of each split's rows; empty if there is none."""
        return {"iid": self.data, "train": self.train, "ood": self.ood}

    def files(self) -> dict[str, str]:
        """The SHA-256 of `data`, `train` and `ood`, where they are local files."""
        return hashes({name: Path(value) for name in ("data", "train", "ood") if (value := getattr(self, name))})


def hashes(paths: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of each path that is a file, in hexadecimal."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.is_file()}
