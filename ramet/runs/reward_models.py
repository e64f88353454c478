"""Reward models by name, and the options of the commands that use them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from ramet.agents.journal import fingerprint
from ramet.errors import CheckpointError, ConfigError
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.models.load import auto_device
from ramet.rewards.video.answerers import Guesser, ModelAnswerer, RecordedAnswers
from ramet.rewards.video.build import Answerer
from ramet.rewards.video.discriminative import SETTINGS, VideoDRM
from ramet.rewards.video.fakes import fake_judge
from ramet.rewards.video.generative import GRM_SETTINGS, GRMSettings, VideoGRM, saved_settings
from ramet.rewards.video.pairs import PreferencePair, PreferencePairs, faults, load_pairs
from ramet.rewards.video.questions import VideoQuestion, load_questions
from ramet.runs.commands import claim_folder
from ramet.storage import read_text

logger = logging.getLogger(__name__)

FAULTS = 5


class RewardRun(BaseModel):
    """The configuration of a run folder of `ramet reward`."""

    command: str
    settings: dict[str, Any]
    seed: int


def claim(folder: Path, command: str, settings: Mapping[str, Any], seed: int) -> None:
    """Make `folder` the run folder of this command with these settings; see `claim_folder`."""
    claim_folder(folder, RewardRun(command=command, settings=_without_none(settings), seed=seed))


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """For TOML, which has no null."""
    kept = {}
    for name, value in settings.items():
        if value is not None:
            kept[name] = _without_none(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
    return kept


@dataclass(frozen=True)
class Source:
    """Rows of pairs or questions.

    path    a file, or a data set
    fields  where a row has what, by name
    videos  the folder of their videos; None: the file's own
    """

    path: str
    fields: dict[str, str] = field(default_factory=dict)
    videos: Path | None = None

    @property
    def root(self) -> Path:
        """The folder of the videos."""
        return self.videos or Path(self.path).parent

    def pairs(self) -> PreferencePairs:
        """The rows as pairs."""
        return load_pairs(self.path, self.fields, self.root)

    def questions(self) -> list[VideoQuestion]:
        """The rows as questions."""
        return load_questions(self.path, self.fields, self.root)

    def identity(self, rows: str) -> dict[str, Any]:
        """The identity of the source, whose rows are called `rows`: pairs or questions."""
        return {rows: file_id(self.path), "fields": self.fields, "videos": str(self.videos or "")}


@dataclass(frozen=True)
class Overrides:
    """The options of a command for how a model watches and samples. What they leave out is as the model was trained, or the default.

    video     of `VideoSettings`: `max_frames`, `fps`, `max_pixels`
    sampling  of `GRMSettings`: `temperature`, `max_tokens`
    """

    video: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def over(self, settings: GRMSettings) -> GRMSettings:
        """`settings` with these options."""
        return replace(settings, video=replace(settings.video, **self.video), **self.sampling)

    def of(self, path: Path) -> GRMSettings:
        """The settings, with these options, of the vision-language model in a directory."""
        return self.over(saved_settings(path) or GRMSettings())

    def identity(self) -> dict[str, Any]:
        """The identity of the overrides."""
        return {"seen": dict(self.video), "settings": dict(self.sampling)}


def open_reward(name: str, overrides: Overrides, needs: str = "", pairs: Sequence[PreferencePair] = ()) -> Any:
    """A VideoDRM or a model that judges, from a directory; or a fake one, such as `fake:oracle`.

    `needs` is "judge" where pairs are to be judged, "score" where answers are to be scored.
    """
    reward: Any
    if name.startswith("fake:"):
        if name == "fake:oracle" and not pairs:
            raise ConfigError("fake:oracle knows the better answer of a benchmark's pairs only; use it with `ramet reward bench`")
        better = {f"{pair.id}/{n}": pair.chosen for pair in pairs for n in range(len(pair.rejected))}
        reward = fake_judge(name.removeprefix("fake:"), better)
    elif ((path := find(name)) / SETTINGS).exists():
        reward = VideoDRM.load(path, auto_device())
        reward = reward.with_video(**overrides.video) if overrides.video else reward
    elif (path / "config.json").exists():
        reward = load_grm(path, overrides.of(path))
    else:
        raise CheckpointError(f"{name!r} is no reward model: give the directory of a VideoDRM or a vision-language model, or fake:random")
    if needs and not hasattr(reward, needs):
        raise ConfigError(f"{name} " + ("scores answers and judges no pairs" if needs == "judge" else "judges pairs and gives no scores"))
    return reward


def load_grm(path: Path, settings: GRMSettings) -> VideoGRM:
    """The VideoGRM in a directory: in bfloat16 on a GPU where there is one, else in float32 on the CPU."""
    device = auto_device()
    return VideoGRM.load(path, settings, device, torch.bfloat16 if device == "cuda" else torch.float32)


def open_answerer(name: str, overrides: Overrides) -> Answerer:
    """What answers questions: `guesser`, a file of answers, or the directory of a vision-language model."""
    if name == "guesser":
        return Guesser()
    if name.endswith((".jsonl", ".json", ".parquet")):
        return RecordedAnswers(name)
    path = find(name)
    return ModelAnswerer(load_grm(path, replace(overrides.of(path), temperature=0.8)), Path(name).name)


def model_id(name: str | None) -> str:
    """The identity of a model in a journal."""
    if not name or name.startswith("fake:"):
        return name or ""
    path = find(name)
    settings = "".join(read_text(path / file) for file in (SETTINGS, GRM_SETTINGS) if (path / file).exists())
    return fingerprint(weights_id(path), settings)


def answerer_id(name: str) -> str:
    """The identity of an answerer in a journal."""
    return name if name == "guesser" else file_id(name) if Path(name).is_file() else model_id(name)


def file_id(path: str) -> str:
    """The identity of a file, by its content, or of a data set, by its name."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if Path(path).is_file() else path


def print_faults(pairs: Sequence[PreferencePair]) -> None:
    """Print what is wrong with the pairs, at most `FAULTS` lines of it."""
    problems = faults(pairs)
    for problem in problems[:FAULTS]:
        logger.warning(problem)
    if len(problems) > FAULTS:
        logger.warning(f"and {len(problems) - FAULTS} more")
