"""A video reward model as other trainers want it: TRL's reward function, and a reward between 0 and 1 for environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ramet.agents.tree import Segment
from ramet.errors import RewardError
from ramet.rewards.video.discriminative import Item
from ramet.rewards.video.judge import Scores
from ramet.rewards.video.pairs import below


def as_reward_fn(model: Scores, videos: Path, default: float | None = None) -> Callable[..., list[float]]:
    """TRL's `(completions, **columns) -> list[float]`, over the columns `question` and `video` (a path below `videos`, or None).

    A completion is text, or a list of messages of which the last is the answer. What has no score, such as an answer that is too long or a
    rating that cannot be read, raises `RewardError`, or is `default` where one is given.
    """

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        for name in ("question", "video"):
            if name not in columns:
                raise RewardError(f"the reward needs the column {name!r}; the data set has {', '.join(sorted(columns))}")
        items = [
            Item(None if video is None else Segment(str(below(videos, video))), question, _text(completion))
            for completion, question, video in zip(completions, columns["question"], columns["video"], strict=True)
        ]
        try:
            return _finite(model, items)
        except RewardError:
            if default is None:
                raise
        scores = []
        for item in items:
            try:
                scores += _finite(model, [item])
            except RewardError:
                scores.append(default)
        return scores

    reward.__name__ = model.name.lower().replace(" ", "_")
    return reward


def _finite(model: Scores, items: Sequence[Item]) -> list[float]:
    scores = model.score(items)
    if not all(map(math.isfinite, scores)):
        raise RewardError(f"{model.name} gives scores that are no numbers")
    return scores


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
