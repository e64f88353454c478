"""Questions about long videos: the root reads an index of segments, and clones see the segments that it names.

A segment's key is s1, s2, ... in the order of time; it stands for a part of one file. With `show="video"` the root sees all segments as
well, which is what a method without clones needs. The reward is exact match, or what a video reward model makes of the stated answer.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from ramet.agents.tree import Message, Segment, Task
from ramet.data import Row
from ramet.env.instructions import DIRECT, WATCH
from ramet.env.questions import Questions, normalised
from ramet.env.settings import DataSettings, hashes, words
from ramet.errors import ConfigError, TaskError
from ramet.rewards.video.questions import VideoQuestion, question_of

if TYPE_CHECKING:
    from ramet.policy.engines.vision import Look
    from ramet.rewards.video.discriminative import VideoAnswer
    from ramet.rewards.video.judge import NormalizedRewardModel

MOST_SEGMENTS = 512
TOKEN = "RAMET_REWARD_TOKEN"
"""The environment variable that holds the bearer token of a reward server."""


@dataclass(frozen=True)
class LongVideoEnvironment(Questions):
    """Questions of rows `id, video, question, answer, choices?`, as `ramet reward build-pairs` reads them.

    seconds  of a segment
    show     what the root sees: the index, or the segments too
    metric   what `grade` gives unless asked for the other: exact match of the stated answer, or the reward model's probability
    reward   gives an answer to a question about a video a probability in [0, 1]; None where there is no reward model. It is shown the
             part that a row names as its evidence, else the whole video
    videos   the folder of the videos; None: each file's own
    """

    seconds: float = 10.0
    show: Literal["index", "video"] = "index"
    metric: Literal["em", "reward"] = "em"
    reward: Callable[[VideoAnswer], float] | None = None
    videos: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric == "reward" and self.reward is None:
            raise ConfigError("env.metric is reward, and env.reward_model names none")

    def question(self, row: Row, split: str, where: str) -> str:
        """The question and its part of which video: the same question about another one is another."""
        asked = self._asked(row, split, where)
        return f"{_looks(asked.video.file)} {asked.video.start:g} {asked.video.end} {normalised(asked.question)}"

    def content(self, row: Row, split: str, where: str) -> Hashable:
        return self.question(row, split, where), normalised(self._asked(row, split, where).answer)

    def _asked(self, row: Row, split: str, where: str) -> VideoQuestion:
        return question_of(row, self.fields, self.videos or Path(self.source(split)).parent, where)

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        question = self._asked(row, split, where)
        segments = self.segments(question.video)
        index = "\n".join(f"{key}: {s.start - question.video.start:g}-{_end(s) - question.video.start:g} s" for key, s in segments.items())
        choices = f"\nChoices: {', '.join(question.choices)}" if question.choices else ""
        text = f"Segments of a video:\n{index}\n\nQuestion: {question.question}{choices}"
        shown = tuple(segments.values()) if self.show == "video" else ()
        return Task(
            task_id, (Message("user", text, shown),), dict(segments), question, {"size": len(segments), "question": question.question}
        )

    def segments(self, video: Segment) -> dict[str, Segment]:
        """The parts of a video by key, the last perhaps shorter."""
        from ramet.media.frames import video_seconds

        end = video_seconds(Path(video.file)) if video.end is None else video.end
        count = max(math.ceil((end - video.start) / self.seconds - 0.05), 1)  # no second segment of a twentieth and less
        if count > MOST_SEGMENTS or not end > video.start:
            raise TaskError(f"{video.file} makes {count} segments of {self.seconds:g} s; at most {MOST_SEGMENTS}, choose env.seconds")
        edges = [video.start + self.seconds * n for n in range(count)] + [end]
        return {f"s{n + 1}": Segment(video.file, edges[n], edges[n + 1]) for n in range(count)}

    @property
    def metrics(self) -> tuple[str, ...]:
        both = ("em", "reward") if self.reward is not None else ("em",)
        return both if self.metric == "em" else both[::-1]

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        question = _question(task)
        if answer is None:
            return 0.0
        if (metric or self.metric) == "em":
            return float(question.right(f"Answer: {answer}"))
        from ramet.rewards.video.discriminative import VideoAnswer

        assert self.reward is not None
        return self.reward(VideoAnswer(question.shown, question.question, f"Answer: {answer}"))

    def canonical(self, answer: str) -> str:
        return " ".join(answer.lower().split())

    def size(self, task: Task) -> int:
        """Segments."""
        return int(task.meta["size"])


class LongVideoSettings(DataSettings):
    """Questions about long videos, of which clones watch segments."""

    kind: Literal["longvideo"] = "longvideo"
    """Which environment."""
    metric: Literal["em", "reward"] = "em"
    """What a score is: exact match, or what the reward model says."""
    videos: str = ""
    """The folder of the videos; without one, that of the rows."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds of a segment."""
    root_sees: Literal["index", "video"] = "index"
    """What the root sees: the index of segments, or the segments too."""
    frames: Annotated[int, Field(ge=1)] = 16
    """Frames that a model sees of a segment, at most."""
    pixels: Annotated[int, Field(ge=28 * 28)] = 128 * 28 * 28
    """Pixels that it sees of a frame, at most."""
    reward_model: str = ""
    """The directory of a VideoDRM or of a model that judges, or the address of `ramet reward serve`."""
    reward_patience: Annotated[float, Field(ge=0)] = 300.0
    """Seconds for which a reward server that is away is waited for."""

    paths: ClassVar[tuple[str, ...]] = ("data", "train", "ood", "videos", "reward_model")

    def files(self) -> dict[str, str]:
        if not self.reward_model:
            return super().files()
        model = Path(self.reward_model)
        return super().files() | hashes({f"reward_model/{name}": model / name for name in ("model.safetensors", "video_drm.json")})

    def look(self) -> Look:
        from ramet.policy.engines.vision import Look

        return Look(frames=self.frames, most=self.pixels)

    def unjudged(self) -> Self:
        return self.model_copy(update={"metric": "em", "reward_model": ""})

    def instruction(self, spawn: bool) -> str:
        return WATCH if spawn else DIRECT

    def build(self, count: Callable[[str], int] = words) -> LongVideoEnvironment:
        videos = Path(self.videos) if self.videos else None
        token = os.environ.get(TOKEN, "")
        reward = reward_of(self.reward_model, videos, token, self.look(), self.reward_patience) if self.reward_model else None
        return LongVideoEnvironment(
            self.sources, self.fields, self.kind, self.allow_overlap, self.seconds, self.root_sees, self.metric, reward, videos
        )


def _looks(file: str) -> str:
    """The same for copies of a video, in all likelihood: whole collections are not read for it."""
    path = Path(file)
    try:
        if path.is_dir():
            return " ".join(f"{frame.name} {frame.stat().st_size}" for frame in sorted(path.iterdir()))
        with path.open("rb") as opened:
            return f"{path.stat().st_size} {zlib.crc32(opened.read(2**16)):08x}"
    except OSError:
        return file  # whoever watches it will say so


def _end(segment: Segment) -> float:
    assert segment.end is not None
    return segment.end


def _question(task: Task) -> VideoQuestion:
    if not isinstance(task.reference, VideoQuestion):
        raise TaskError(f"task {task.id} is no question about a video")
    return task.reference


def reward_of(model: str, videos: Path | None, token: str, look: Look, patience: float = 300.0) -> Callable[[VideoAnswer], float]:
    """The reward of a VideoDRM or a VideoGRM in a directory, or of a server at an address, which is waited for up to
    `patience` seconds when it is away. A trained model watches as it was trained to; others as `look` says."""
    from ramet.media.frames import content_id
    from ramet.rewards.video.discriminative import SCORES, SETTINGS, VideoDRM
    from ramet.rewards.video.pairs import segments_of

    reward: NormalizedRewardModel
    if model.startswith(("http://", "https://")):
        from ramet.rewards.video.server import RemoteReward

        if videos is None:
            raise ConfigError("a reward server reads videos below a folder: set env.videos to yours of the same")
        reward = RemoteReward(model, token, videos, patience)
    elif (Path(model) / SETTINGS).exists():
        reward = VideoDRM.load(Path(model))
    else:
        from ramet.rewards.video.generative import GRMSettings, VideoGRM, saved_settings

        reward = VideoGRM.load(Path(model), saved_settings(Path(model)) or GRMSettings(look))
    known: dict[tuple[VideoAnswer, tuple[str, ...]], float] = {}

    def probability(item: VideoAnswer) -> float:
        key = (item, tuple(content_id(Path(part.file)) for part in segments_of(item.video)))
        if key not in known:
            while len(known) >= SCORES:
                del known[next(iter(known))]
            known[key] = reward.probabilities([item])[0]
        return known[key]

    return probability
