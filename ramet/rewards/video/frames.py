"""Frames of a video file, evenly spaced, as the vision towers of Qwen2-VL and Qwen2.5-VL take them.

    frames = read_frames(Path("clip.mp4"), 16)                # uint8 (16, height, width, 3), and seconds between them
    pixels, grid = patches(frames.pixels, size=...)           # rows of patches, (t, h, w) in patches

A file is untrusted: what is not a video, has no frames or cannot be decoded is named in a `TaskError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramet.errors import ConfigError, TaskError, first_line

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the red, green and blue channels of CLIP's training images, in shares of 255."""


@dataclass(frozen=True)
class Frames:
    """`pixels` is uint8 (frames, height, width, 3); `seconds` lies between one frame and the next."""

    pixels: np.ndarray
    seconds: float


def read_frames(path: Path, count: int, start: float = 0.0, end: float | None = None) -> Frames:
    """`count` frames, each from the middle of one of `count` equal parts of [start, end) seconds; a short clip repeats frames."""
    try:
        import av
    except ImportError:
        raise ConfigError("reading videos needs PyAV: pip install 'ramet[video]'") from None
    if count < 1:
        raise ConfigError(f"at least one frame must be read (got {count})")
    kept: list[np.ndarray] = []
    last = None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise TaskError(f"{path} has no video")
            span = _seconds(container, end) - start
            if span <= 0:
                raise TaskError(f"{path} has nothing between {start:g} and {start + span:g} seconds")
            wanted = [start + span * (2 * i + 1) / (2 * count) for i in range(count)]
            for frame in container.decode(container.streams.video[0]):
                while len(kept) < count and last is not None and wanted[len(kept)] < float(frame.time or 0.0):
                    kept.append(last.to_ndarray(format="rgb24"))
                if len(kept) == count:
                    break
                last = frame
            if last is None:
                raise TaskError(f"{path} has no frame that can be decoded")
            kept += [last.to_ndarray(format="rgb24")] * (count - len(kept))
    except (OSError, ValueError) as error:  # PyAV's errors are both
        raise TaskError(f"cannot read video {path}: {first_line(error)}") from error
    return Frames(np.stack(kept), span / count)


def _seconds(container: Any, end: float | None) -> float:
    """Where the part to read ends: `end`, or the end of the file."""
    stream = container.streams.video[0]
    if container.duration:
        length = container.duration / 1_000_000
    elif stream.duration and stream.time_base:
        length = float(stream.duration * stream.time_base)
    else:
        length = stream.frames / float(stream.average_rate or 25) or 1.0
    return length if end is None else min(end, length)


def fitted(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The nearest height and width that are multiples of `factor`, with `least` to `most` pixels, at the same aspect."""
    if max(height, width) > 200 * min(height, width):
        raise TaskError(f"frames of {width}x{height} are too narrow: one side is more than 200 times the other")
    rows, columns = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, columns


def patches(
    pixels: np.ndarray, *, patch: int = 14, merge: int = 2, temporal: int = 2, least: int = 56 * 56, most: int = 14 * 14 * 4 * 1280
) -> tuple[Tensor, tuple[int, int, int]]:
    """Rows for the vision tower, float32 (t h w, 3 temporal patch^2), and the grid (t, h, w) in patches.

    Frames are resized bicubically; an odd last frame is doubled. Rows are ordered by time, then by merged square, so that
    the rows of one step in time stand together.
    """
    from PIL import Image

    height, width = fitted(*pixels.shape[1:3], patch * merge, least, most)
    resized = np.stack([np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in pixels])
    frames = (torch.from_numpy(resized).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    if len(frames) % temporal:
        frames = torch.cat([frames, frames[-1:].expand(temporal - len(frames) % temporal, -1, -1, -1)])
    t, h, w = len(frames) // temporal, height // patch, width // patch
    split = frames.view(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    rows = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3 * temporal * patch * patch)
    return rows, (t, h, w)
