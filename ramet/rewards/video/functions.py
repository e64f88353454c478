"""A video reward model as a reward function of TRL's trainers."""

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
"""Columns of the data set that the reward function reads."""
ANSWER_PARTS = ("text", "output_text")
"""Types of the content parts that make up the answer of a message. Reasoning, tool calls and images are not part of it."""


def as_reward_fn(model: VideoRewardModel, videos: Path, default: float | None = None) -> Callable[..., list[float]]:
    """A reward function with TRL's signature, `(completions, **columns) -> list[float]`, which gives the scores of `model`.

    videos   the folder of the videos
    default  the score of a completion that cannot be scored; None: raise

    It reads the columns `question` and `video` (a path below `videos`, or None), and optionally `start` and `end`, the part of the video
    in seconds. A completion is a text, or a list of messages, in which the assistant's last message is the answer: its text, or the parts
    of it that are text; a message without content is an empty answer. `RewardError` is raised for a missing column, and unless there is a
    `default`, for a completion that cannot be scored, such as one that is too long; `TaskError` for a video that cannot be read.
    """

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        for name in ("question", "video"):
            if name not in columns:
                raise RewardError(f"the reward function needs the column {name!r}; the data set has {', '.join(sorted(columns))}")
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
    """One row per completion. Raises `RewardError` for columns of different lengths."""
    used = {"completion": completions} | {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
    for name, values in used.items():
        if len(values) != len(completions):
            raise RewardError(f"the column {name!r} has {len(values)} rows for {len(completions)} completions")
    return [
        dict(zip(used, values, strict=True)) | {"where": f"completion {n}"} for n, values in enumerate(zip(*used.values(), strict=True), 1)
    ]


def _item(row: dict[str, Any], videos: Path) -> VideoAnswer:
    question, where = row["question"], row["where"]
    if not isinstance(question, str):
        raise RewardError(f"{where}: its question must be text (got {str(question)[:40]!r})")
    shown: dict[str, Any] = {name: row[name] for name in ("video", "start", "end") if name in row}
    video = None if row["video"] is None else video_of_row(shown, {}, videos, where)
    return VideoAnswer(video, question, _answer(row["completion"], where))


def _finite(model: VideoRewardModel, items: Sequence[VideoAnswer]) -> list[float]:
    """The scores of the items. Raises `RewardError` for one that is not finite."""
    scores = model.score(items)
    if not all(map(math.isfinite, scores)):
        raise RewardError(f"{model.name} gives scores that are not finite numbers")
    return scores


def _answer(completion: Any, where: str) -> str:
    """The answer of a completion; see `as_reward_fn`. Raises `RewardError` for a completion of another form."""
    if isinstance(completion, str):
        return completion
    messages = completion if isinstance(completion, list) else [completion]
    if not all(isinstance(message, dict) for message in messages):
        raise RewardError(f"{where} is neither text nor a list of messages")
    contents = [message.get("content") for message in messages if message.get("role", "assistant") == "assistant"]
    if not contents:
        raise RewardError(f"{where} has no message of the assistant")
    content = "" if contents[-1] is None else contents[-1]
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RewardError(f"{where}: the content of its answer is neither text nor a list of parts")
    texts = [part if isinstance(part, str) else part.get("text") for part in parts if isinstance(part, str) or _is_answer(part, where)]
    if not all(isinstance(text, str) for text in texts):
        raise RewardError(f"{where} has a text part without text")
    return "".join(texts)


def _is_answer(part: Any, where: str) -> bool:
    if not isinstance(part, dict):
        raise RewardError(f"{where} has a part that is neither text nor an object with a type")
    return part.get("type", "text") in ANSWER_PARTS
