"""A video reward model as other trainers want it: TRL's reward function, and a reward between 0 and 1 for environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramet.errors import RewardError, TaskError
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.rewards.video.judge import VideoRewardModel
from ramet.rewards.video.pairs import video_of_row

COLUMNS = ("question", "video", "start", "end")
ANSWERS = ("text", "output_text")
"""Types of the parts of a message that are its answer; thoughts, calls and pictures are none."""


def as_reward_fn(model: VideoRewardModel, videos: Path, default: float | None = None) -> Callable[..., list[float]]:
    """TRL's `(completions, **columns) -> list[float]`, over the columns `question` and `video` (a path below `videos`, or None).

    The columns `start` and `end`, where there are any, are the seconds of the video that are shown.

    A completion is text, or a list of messages of which the last of the assistant is the answer: its text, or its parts that are text;
    nothing is an empty answer. What has no score, such as an answer that is too long, a video or a rating that cannot be read, or a
    completion without an answer, raises `RewardError` (`TaskError` for a video), or is `default` where one is given.
    """

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        for name in ("question", "video"):
            if name not in columns:
                raise RewardError(f"the reward needs the column {name!r}; the data set has {', '.join(sorted(columns))}")
        rows = _rows(completions, columns)
        try:
            return _finite(model, [_item(row, videos) for row in rows])
        except (RewardError, TaskError):
            if default is None:
                raise
        scores = []
        for row in rows:
            try:
                scores += _finite(model, [_item(row, videos)])
            except (RewardError, TaskError):
                scores.append(default)
        return scores

    reward.__name__ = model.name.lower().replace(" ", "_")
    return reward


def _rows(completions: Sequence[Any], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    used = {"completion": completions} | {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
    for name, values in used.items():
        if len(values) != len(completions):
            raise RewardError(f"the column {name!r} has {len(values)} rows, there are {len(completions)} completions")
    return [
        dict(zip(used, values, strict=True)) | {"where": f"completion {n}"} for n, values in enumerate(zip(*used.values(), strict=True), 1)
    ]


def _item(row: dict[str, Any], videos: Path) -> VideoAnswer:
    question, where = row["question"], row["where"]
    if not isinstance(question, str):
        raise RewardError(f"{where}: its question is {str(question)[:40]!r}, no text")
    shown: dict[str, Any] = {name: row[name] for name in ("video", "start", "end") if name in row}
    video = None if row["video"] is None else video_of_row(shown, {}, videos, where)
    return VideoAnswer(video, question, _answer(row["completion"], where))


def _finite(model: VideoRewardModel, items: Sequence[VideoAnswer]) -> list[float]:
    scores = model.score(items)
    if not all(map(math.isfinite, scores)):
        raise RewardError(f"{model.name} gives scores that are no numbers")
    return scores


def _answer(completion: Any, where: str) -> str:
    """Text, or that of the assistant's last message."""
    if isinstance(completion, str):
        return completion
    messages = completion if isinstance(completion, list) else [completion]
    if not all(isinstance(message, dict) for message in messages):
        raise RewardError(f"{where} is neither text nor a list of messages")
    said = [message.get("content") for message in messages if message.get("role", "assistant") == "assistant"]
    if not said:
        raise RewardError(f"{where} has no message of the assistant")
    content = "" if said[-1] is None else said[-1]
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RewardError(f"{where}: the content of its answer is neither text nor a list of parts")
    texts = [part if isinstance(part, str) else part.get("text") for part in parts if isinstance(part, str) or _is_answer(part, where)]
    if not all(isinstance(text, str) for text in texts):
        raise RewardError(f"{where} has a part of text without text")
    return "".join(texts)


def _is_answer(part: Any, where: str) -> bool:
    if not isinstance(part, dict):
        raise RewardError(f"{where} has a part that is neither text nor an object with a type")
    return part.get("type", "text") in ANSWERS
