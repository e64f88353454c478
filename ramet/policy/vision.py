"""Video in a prompt: the placeholder ids that stand for a segment, and what a vision tower takes of it.

    reader = VideoReader(model.config, tokenizer, Look(frames=8))
    seen = reader(Segment("clip.mp4"))        # seen.ids go into the prompt, seen.video to the model

Qwen2-VL, Qwen2.5-VL and Qwen3-VL lay videos out differently; what follows their call works likewise.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ramet.agents.chat import TextEncoder
from ramet.agents.tree import Segment
from ramet.attention.vision import Video
from ramet.errors import CheckpointError
from ramet.rewards.video.frames import DEVIATION, MEAN, Frames, patches, read_frames

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Look:
    """How much of a segment a model sees.

    frames  of a segment, at most
    fps     frames a second; None: `frames` whatever the length
    least   pixels of a frame at least; smaller ones are enlarged
    most    pixels of a frame at most
    order   as they were filmed, or otherwise, to see whether a model minds
    """

    frames: int = 16
    fps: float | None = None
    least: int = 56 * 56
    most: int = 128 * 28 * 28
    order: Literal["filmed", "reversed", "shuffled"] = "filmed"

    def at(self, segment: Segment) -> Frames:
        """The segment's frames. Raises `TaskError` for what cannot be read."""
        found = read_frames(Path(segment.file), self.frames, segment.start, segment.end, fps=self.fps)
        order = list(range(len(found.times)))
        if self.order == "reversed":
            order.reverse()
        elif self.order == "shuffled":
            random.Random(f"{Path(segment.file).name}/{segment.start}").shuffle(order)
        return Frames(found.pixels[order], found.times, found.seconds)


@dataclass(frozen=True)
class Seen:
    """A segment as a model reads it: its ids in a prompt, and the rows and grid for the tower."""

    ids: tuple[int, ...]
    video: Video


class VideoReader:
    """Reads segments for one model, each once: the last ones are kept, up to `memory` bytes."""

    def __init__(self, config: Any, tokenizer: Any, look: Look, memory: int = 2**28):
        if getattr(config, "model_type", "") not in FAMILIES:
            raise CheckpointError(f"a model of type {getattr(config, 'model_type', '?')!r} takes no video here; {', '.join(FAMILIES)} do")
        self.look = look
        self._config, self._vision = config, config.vision_config
        self._encode = TextEncoder(tokenizer)
        self._memory, self._held = memory, 0
        self._cache: OrderedDict[Segment, Seen] = OrderedDict()

    def ids(self, segment: Segment) -> tuple[int, ...]:
        """The placeholder ids of a segment in a prompt."""
        return self(segment).ids

    def __call__(self, segment: Segment) -> Seen:
        seen = self._cache.get(segment)
        if seen is None:
            seen = self._read(segment)
            self._cache[segment] = seen
            self._held += seen.video.rows.nbytes
            while self._held > self._memory and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1].video.rows.nbytes
        self._cache.move_to_end(segment)
        return seen

    def _read(self, segment: Segment) -> Seen:
        vision, config, frames = self._vision, self._config, self.look.at(segment)
        newest = config.model_type == "qwen3_vl"
        half = (0.5, 0.5, 0.5)
        rows, grid = patches(
            frames.pixels,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            least=self.look.least,
            most=self.look.most,
            mean=half if newest else MEAN,
            deviation=half if newest else DEVIATION,
        )
        steps, step = grid[0], grid[1] * grid[2] // vision.spatial_merge_size**2
        start, end, pad = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id
        ids: list[int] = []
        if newest:  # each step of time by itself, after the second at which it stands
            for index in range(steps):
                times = frames.times[index * vision.temporal_patch_size :][: vision.temporal_patch_size]
                ids += [*self._encode(f"<{sum(times) / len(times):.1f} seconds>"), start, *[pad] * step, end]
        else:
            ids = [start, *[pad] * (steps * step), end]
        return Seen(tuple(ids), Video(rows, grid, frames.seconds * vision.temporal_patch_size))


@dataclass(frozen=True)
class Prompted:
    """A sequence of ids with the videos that its placeholders stand for, in order."""

    ids: Sequence[int]
    videos: tuple[Video, ...] = ()


def model_inputs(config: Any, sequences: Sequence[Prompted], pad: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """A batch (B, T) as the model's own call takes it, padded on one side."""
    longest = max(len(s.ids) for s in sequences)
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, sequence in enumerate(sequences):
        at = slice(longest - len(sequence.ids), longest) if side == "left" else slice(0, len(sequence.ids))
        ids[place, at] = torch.tensor(sequence.ids)
        mask[place, at] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    videos = [video for sequence in sequences for video in sequence.videos]
    if videos:
        inputs["mm_token_type_ids"] = 2 * (ids == config.video_token_id).int() * mask.int()
        inputs["pixel_values_videos"] = torch.cat([video.rows for video in videos])
        inputs["video_grid_thw"] = torch.tensor([video.grid for video in videos])
        if config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([video.seconds for video in videos])
    return inputs
