"""Questions about long videos: the root reads an index of segments, and clones see the segments that it names.

The keys of the segments are s1, s2, ... in the order of time; each stands for a part of one file. With `show="video"` the root sees all
segments too, as methods without clones need. The score is exact match, or a video reward model's probability for the stated answer.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
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
    from ramet.policy.engines.vision import VideoSettings
    from ramet.rewards.video.discriminative import VideoAnswer
    from ramet.rewards.video.judge import NormalizedRewardModel

MAX_SEGMENTS = 512
"""Segments of one video at most."""
TOKEN = "RAMET_REWARD_TOKEN"
"""The environment variable that holds the bearer token of a reward server."""


@dataclass(frozen=True)
class LongVideoEnvironment(Questions):
    """Questions of rows `id, video, question, answer, choices?`, as `ramet reward build-pairs` reads them.

    seconds  length of a segment
    show     what the root sees: the index only, or the segments too
    metric   the default metric of `grade`: exact match of the stated answer ("em"), or the reward model's probability ("reward")
    judge    the probability in [0, 1] of an answer to a question about a video; None without a reward model. It is shown the part of the
             video that the row names as its evidence, or else the whole video
    videos   folder of the videos; None: the folder of the file with the rows

    Raises `ConfigError` if the metric is "reward" and there is no reward model.
    """

    seconds: float = 10.0
    show: Literal["index", "video"] = "index"
    metric: Literal["em", "reward"] = "em"
    judge: Callable[[VideoAnswer], float] | None = None
    videos: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric == "reward" and self.judge is None:
            raise ConfigError("env.metric is \"reward\" but env.reward_model is not set: name a reward model")

    def question(self, row: Row, split: str, where: str) -> str:
        """The question together with its part of the video: the same question about another video is another question."""
        question = self._video_question(row, split, where)
        return f"{_signature(question.video.file)} {question.video.start:g} {question.video.end} {normalised(question.question)}"

    def content(self, row: Row, split: str, where: str) -> Hashable:
        """The question with its part of the video, and the answer."""
        return self.question(row, split, where), normalised(self._video_question(row, split, where).answer)

    def _video_question(self, row: Row, split: str, where: str) -> VideoQuestion:
        return question_of(row, self.fields, self.videos or Path(self.source(split)).parent, where)

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        """The task of one row, whose documents are the segments of its video."""
        question = self._video_question(row, split, where)
        segments = self.segments(question.video)
        index = "\n".join(f"{key}: {s.start - question.video.start:g}-{_end(s) - question.video.start:g} s" for key, s in segments.items())
        choices = f"\nChoices: {', '.join(question.choices)}" if question.choices else ""
        text = f"Segments of a video:\n{index}\n\nQuestion: {question.question}{choices}"
        media = tuple(segments.values()) if self.show == "video" else ()
        return Task(
            task_id, (Message("user", text, media),), dict(segments), question, {"size": len(segments), "question": question.question}
        )

    def segments(self, video: Segment) -> dict[str, Segment]:
        """The segments of a video by key; the last may be shorter. Raises `TaskError` if there are more than `MAX_SEGMENTS`."""
        from ramet.media.frames import video_seconds

        end = video_seconds(Path(video.file)) if video.end is None else video.end
        count = max(math.ceil((end - video.start) / self.seconds - 0.05), 1)  # the last segment is at least a twentieth of a whole one
        if count > MAX_SEGMENTS or not end > video.start:
            raise TaskError(f"{video.file} makes {count} segments of {self.seconds:g} s; set env.seconds for at most {MAX_SEGMENTS}")
        edges = [video.start + self.seconds * n for n in range(count)] + [end]
        return {f"s{n + 1}": Segment(video.file, edges[n], edges[n + 1]) for n in range(count)}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The default metric first; "reward" only with a reward model."""
        both = ("em", "reward") if self.judge is not None else ("em",)
        return both if self.metric == "em" else both[::-1]

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """Exact match (0.0 or 1.0) or the reward model's probability; 0.0 without an answer."""
        question = _question(task)
        if answer is None:
            return 0.0
        if (metric or self.metric) == "em":
            return float(question.right(f"Answer: {answer}"))
        from ramet.rewards.video.discriminative import VideoAnswer

        assert self.judge is not None
        return self.judge(VideoAnswer(question.shown, question.question, f"Answer: {answer}"))

    def canonical(self, answer: str) -> str:
        """The answer in lower case with single spaces."""
        return " ".join(answer.lower().split())

    def size(self, task: Task) -> int:
        """The number of segments."""
        return int(task.meta["size"])


class LongVideoSettings(DataSettings):
    """Questions about long videos, of which clones watch segments."""

    kind: Literal["longvideo"] = "longvideo"
    """Which environment."""
    metric: Literal["em", "reward"] = "em"
    """The score: exact match, or the reward model's probability."""
    videos: str = ""
    """The folder of the videos; by default, that of the rows."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """The length of a segment in seconds."""
    root_sees: Literal["index", "video"] = "index"
    """What the root sees: the index of the segments only, or the segments too."""
    max_frames: Annotated[int, Field(ge=1)] = 16
    """The largest number of frames that a model sees of a segment."""
    max_pixels: Annotated[int, Field(ge=28 * 28)] = 128 * 28 * 28
    """The largest number of pixels that it sees of a frame."""
    reward_model: str = ""
    """The directory of a VideoDRM or of a model that judges, or the address of `ramet reward serve`."""
    reward_patience: Annotated[float, Field(ge=0)] = 300.0
    """Seconds to wait for a reward server that cannot be reached."""

    waits: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("data", "train", "ood", "videos", "reward_model")

    def files(self) -> dict[str, str]:
        """The SHA-256 of the local files of the rows and of the reward model."""
        if not self.reward_model:
            return super().files()
        model = Path(self.reward_model)
        return super().files() | hashes({f"reward_model/{name}": model / name for name in ("model.safetensors", "video_drm.json")})

    def video_settings(self) -> VideoSettings:
        """Frames and pixels as `frames` and `pixels` set them."""
        from ramet.policy.engines.vision import VideoSettings

        return VideoSettings(max_frames=self.max_frames, max_pixels=self.max_pixels)

    def without_reward_model(self) -> Self:
        """Settings of the same tasks graded by exact match."""
        return self.model_copy(update={"metric": "em", "reward_model": ""})

    def instruction(self, spawn: bool) -> str:
        """With the tool, how to have clones watch segments; without, to answer at once."""
        return WATCH if spawn else DIRECT

    def build(self, count: Callable[[str], int] = words) -> LongVideoEnvironment:
        """The environment with its reward model loaded; `count` is not used."""
        videos = Path(self.videos) if self.videos else None
        token = os.environ.get(TOKEN, "")
        reward = reward_of(self.reward_model, videos, token, self.video_settings(), self.reward_patience) if self.reward_model else None
        return LongVideoEnvironment(
            self.sources, self.fields, self.kind, self.allow_overlap, self.seconds, self.root_sees, self.metric, reward, videos
        )


def _signature(file: str) -> str:
    """A signature that copies of a video share, made without reading whole collections of videos."""
    path = Path(file)
    try:
        if path.is_dir():
            return " ".join(f"{frame.name} {frame.stat().st_size}" for frame in sorted(path.iterdir()))
        with path.open("rb") as video:
            return f"{path.stat().st_size} {zlib.crc32(video.read(2**16)):08x}"
    except OSError:
        return file  # reading its frames will report the error


def _end(segment: Segment) -> float:
    """The end of a segment of known length, in seconds."""
    assert segment.end is not None
    return segment.end


def _question(task: Task) -> VideoQuestion:
    """The question that a task was made of. Raises `TaskError` for a task of another environment."""
    if not isinstance(task.reference, VideoQuestion):
        raise TaskError(f"task {task.id} is not a question about a video")
    return task.reference


def reward_of(model: str, videos: Path | None, token: str, video: VideoSettings, patience: float = 300.0) -> Callable[[VideoAnswer], float]:
    """The reward function of a VideoDRM or a VideoGRM in a directory, or of a reward server at an address.

    For a server that cannot be reached, it waits up to `patience` seconds. A trained model watches videos as in its training; others as
    `look` says. Scores are cached.
    """
    from ramet.media.frames import content_id
    from ramet.rewards.video.discriminative import SCORES, SETTINGS, VideoDRM
    from ramet.rewards.video.pairs import segments_of

    reward: NormalizedRewardModel
    if model.startswith(("http://", "https://")):
        from ramet.rewards.video.server import RemoteReward

        if videos is None:
            raise ConfigError("a reward server reads videos from its own folder: set env.videos to the folder of the same videos here")
        reward = RemoteReward(model, token, videos, patience)
    elif (Path(model) / SETTINGS).exists():
        reward = VideoDRM.load(Path(model))
    else:
        from ramet.rewards.video.generative import GRMSettings, VideoGRM, saved_settings

        reward = VideoGRM.load(Path(model), saved_settings(Path(model)) or GRMSettings(video))
    cache: dict[tuple[VideoAnswer, tuple[str, ...]], float] = {}
    lock = threading.Lock()
    # A server takes several requests at a time; a model in this process, one.
    turn: AbstractContextManager[object] = nullcontext() if model.startswith(("http://", "https://")) else threading.Lock()

    def probability(item: VideoAnswer) -> float:
        key = (item, tuple(content_id(Path(part.file)) for part in segments_of(item.video)))
        with lock:
            score = cache.get(key)
        if score is None:
            with turn:
                score = reward.probabilities([item])[0]
            with lock:
                cache[key] = score
                while len(cache) > SCORES:
                    del cache[next(iter(cache))]
        return score

    return probability
