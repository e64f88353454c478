"""Multimodal rotary positions (M-RoPE): the position of each token of a prompt with videos, in time, height and width.

The rule is that of the Qwen2.5-VL Technical Report (Bai et al. 2025, arXiv 2502.13923, section 2.1) as first released in transformers 4.49:

    text   the same position on all three axes, increasing by one per token; after a video, from the largest position on any axis plus 1
    video  starting at s: time s + floor(step * seconds * tokens_per_second), height s + row, width s + column of the merged grid

Qwen2-VL (arXiv 2409.12191) numbers a video's temporal steps 0, 1, 2, ...; Qwen3-VL treats each step as a separate image. Releases of
transformers differ from this rule and from one another: some truncate `seconds` to an integer, and some continue the text after a video
from the end of its height and width. Positions are therefore computed here and passed to every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ramet.errors import ConfigError

RULE = 1
"""Version of the rule, recorded in checkpoints. Version 0 was whatever the installed release of transformers computed."""


@dataclass(frozen=True)
class VideoPatches:
    """A video as the vision encoder takes it.

    rows     patches [t h w, values per patch]
    grid     numbers of patches (t, h, w) in time, height and width
    seconds  time between two temporal steps, in seconds
    """

    rows: Tensor
    grid: tuple[int, int, int]
    seconds: float


@dataclass(frozen=True)
class Layout:
    """The positions of a sequence of T tokens with videos.

    places     indices of the video placeholders, ascending
    positions  positions [3, T] in time, height and width
    after      difference between the position and the index of any later text token
    """

    places: Tensor
    positions: Tensor
    after: int


def layout(config: Any, ids: Sequence[int], videos: Sequence[VideoPatches]) -> Layout:
    """The layout of a sequence for a model with the given `config`.

    The first placeholders in `ids` stand for the videos, in order; any further ones were sampled by the model and count as text.
    Raises `ConfigError` where there are too few, or where other tokens stand among those of a video.
    """
    blocks = [block for video in videos for block in _blocks(config, video)]
    sizes = [block.shape[1] for block in blocks]
    marked = (torch.tensor(ids, dtype=torch.long) == config.video_token_id).nonzero()[:, 0]
    if len(marked) < sum(sizes):
        raise ConfigError(f"the prompt has {len(marked)} video tokens, but its videos need {sum(sizes)}")
    places = marked[: sum(sizes)]
    positions = torch.empty(3, len(ids), dtype=torch.long)
    index = following = 0  # the index of the next token, and its position
    for block, run in zip(blocks, places.split(sizes), strict=True):
        start, stop = int(run[0]), int(run[-1]) + 1
        if stop - start != len(run):
            raise ConfigError(f"other tokens stand among the {len(run)} video tokens of a video (tokens {start} to {stop} of the prompt)")
        positions[:, index:start] = following + torch.arange(start - index)
        positions[:, start:stop] = following + start - index + block
        index, following = stop, int(positions[:, start:stop].max()) + 1
    positions[:, index:] = following + torch.arange(len(ids) - index)
    return Layout(places, positions, following - index)


def _blocks(config: Any, video: VideoPatches) -> list[Tensor]:
    """Positions [3, n] of each contiguous run of a video's placeholders, counted from 0. Qwen3-VL has one run per temporal step."""
    steps, *sides = video.grid
    rows, columns = (torch.arange(side // config.vision_config.spatial_merge_size) for side in sides)
    times = [torch.arange(steps)]
    if config.model_type == "qwen2_5_vl":  # in float32, as published: just below an integer, the last bit decides
        times = [(times[0] * torch.tensor(video.seconds, dtype=torch.float32) * config.vision_config.tokens_per_second).long()]
    elif config.model_type == "qwen3_vl":
        times = [torch.zeros(1, dtype=torch.long)] * steps
    return [torch.stack(torch.meshgrid(time, rows, columns, indexing="ij")).flatten(1) for time in times]
