"""Clips drawn here and a small random model of them, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ramet.media.clips import make_questions
from ramet.policy.engines.vision import VideoSettings
from ramet.recipes.nano.vision import write_vision_model
from ramet.rewards.video.answerers import PHRASES
from ramet.rewards.video.discriminative import DRMSettings, VideoDRM
from ramet.rewards.video.questions import VideoQuestion, load_questions

SETTINGS = DRMSettings(video=VideoSettings(max_frames=4, max_pixels=56 * 56))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 90 clips and their questions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("clips")
    make_questions(folder, 90, 7)
    return folder


@pytest.fixture(scope="session")
def questions(clips: Path) -> list[VideoQuestion]:
    return load_questions(str(clips / "questions.jsonl"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, questions: Any) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_vision_model(folder, [q.question for q in questions] + [p.format("red") for p in PHRASES], 0)
    return folder


@pytest.fixture
def drm(base: Path) -> VideoDRM:
    return VideoDRM.from_base(base, SETTINGS)
