"""Multimodal rotary positions: where each token of a prompt with videos stands, in time, height and width.

Qwen2.5-VL's as it was published (Qwen2.5-VL Technical Report, arXiv 2502.13923; its first code in transformers 4.49):

    text     the same number on all three axes, one more for each token; after a video it starts at the largest number of any axis, plus 1
    a video  which starts at s: time s + floor(step * seconds * tokens_per_second), height s + row, width s + column of the merged grid

Qwen2-VL numbers a video's steps of time 0, 1, 2; Qwen3-VL takes each step for a picture of its own. Releases of transformers disagree with
this and with one another (some cut `seconds` to a whole number, some start the text after a video where height and width end), so
every model here is given its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramet.errors import ConfigError

RULE = 1
"""Counts the rules that there have been; checkpoints record it. 0: whatever the installed release of transformers did."""


@dataclass(frozen=True)
class VideoPatches:
    """What a processor makes of a clip: rows of patches [t h w, ...], the grid (t, h, w), seconds between two steps of time."""

    rows: Tensor
    grid: tuple[int, int, int]
    seconds: float


@dataclass(frozen=True)
class Layout:
    """A sequence with videos, before it meets a model.

    places     where its placeholders stand, in order
    positions  (3, T) of its tokens, in time, height and width
    after      what is added to a later token's place to give its position
    """

    places: Tensor
    positions: Tensor
    after: int


def layout(config: Any, ids: Sequence[int], videos: Sequence[VideoPatches]) -> Layout:
    """Of the ids of a sequence for a model of `config`: its first placeholders stand for the videos, others were sampled and are text.

    Raises `ConfigError` where there are too few, or where other tokens stand among a video's.
    """
    blocks = [block for video in videos for block in _blocks(config, video)]
    sizes = [block.shape[1] for block in blocks]
    marked = (torch.tensor(ids, dtype=torch.long) == config.video_token_id).nonzero()[:, 0]
    if len(marked) < sum(sizes):
        raise ConfigError(f"the prompt has {len(marked)} video tokens, its videos have {sum(sizes)}")
    places = marked[: sum(sizes)]
    positions = torch.empty(3, len(ids), dtype=torch.long)
    at = following = 0  # the place of the next token, and its position
    for block, run in zip(blocks, places.split(sizes), strict=True):
        start, stop = int(run[0]), int(run[-1]) + 1
        if stop - start != len(run):
            raise ConfigError(f"other tokens stand among the {len(run)} of a video (at {start} to {stop} of the prompt)")
        positions[:, at:start] = following + torch.arange(start - at)
        positions[:, start:stop] = following + start - at + block
        at, following = stop, int(positions[:, start:stop].max()) + 1
    positions[:, at:] = following + torch.arange(len(ids) - at)
    return Layout(places, positions, following - at)


def _blocks(config: Any, video: VideoPatches) -> list[Tensor]:
    """Positions (3, n) of each run of a video's placeholders, from 0 on."""
    steps, *sides = video.grid
    rows, columns = (torch.arange(side // config.vision_config.spatial_merge_size) for side in sides)
    times = [torch.arange(steps)]
    if config.model_type == "qwen2_5_vl":  # in float32, as published: at the edge of a whole number the last bit decides
        times = [(times[0] * torch.tensor(video.seconds, dtype=torch.float32) * config.vision_config.tokens_per_second).long()]
    elif config.model_type == "qwen3_vl":
        times = [torch.zeros(1, dtype=torch.long)] * steps
    return [torch.stack(torch.meshgrid(time, rows, columns, indexing="ij")).flatten(1) for time in times]
