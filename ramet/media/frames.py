"""Frames of a video by timestamp, and what the vision towers of Qwen2-VL to Qwen3-VL take of them.

    frames = read_frames(Path("clip.mp4"), 16)                # uint8 (16, height, width, 3), and the second of each
    pixels, grid = patches(frames.pixels)                     # rows of patches, (t, h, w) in patches

A video is a file that PyAV decodes (`containers`), a picture, an animated WebP or a folder of pictures, a second each (`pictures`). It is
untrusted: what is no video, has no frames, is cut short or is too large to be decoded is named in a `TaskError`, with the second where
it ends.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ramet.errors import ConfigError, TaskError
from ramet.media.containers import VideoFile, reading_errors
from ramet.media.pictures import ImageSequence, images_in_folder, open_image

if TYPE_CHECKING:
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the red, green and blue channels of CLIP's training images, in shares of 255."""
MAX_TOTAL_PIXELS = 2**28
"""Pixels of all frames that are held at once, as they are handed out."""
SLACK = 0.25
"""Seconds after the last picture of a file that is cut short for which it stands."""

Fit = Callable[[int, int], tuple[int, int]]
"""Height and width that frames are resized to, of those that they have."""


@dataclass(frozen=True)
class Frames:
    """`pixels` is uint8 (frames, height, width, 3); `times` are seconds from the beginning of the video."""

    pixels: np.ndarray
    times: tuple[float, ...]
    seconds: float
    """Between one frame and the next, on average."""
    damaged: int = 0
    """Packets that could not be decoded, of those that were needed."""


def read_frames(
    path: Path,
    count: int,
    start: float = 0.0,
    end: float | None = None,
    *,
    fps: float | None = None,
    indices: Sequence[int] = (),
    fit: Fit | None = None,
) -> Frames:
    """Frames of [start, end) seconds: what is shown in the middle of each of `count` equal parts; a short clip repeats frames.

    With `fps`, that many a second instead, at most `count` in all. With `indices`, the frames of these numbers, from 0 on, in
    ascending order, and nothing else counts. With `fit`, each frame is resized as soon as it is read, bicubically.

    A clip with damage is read as far as it goes: the last picture before stands in for one that cannot be decoded. Raises `TaskError`
    where more than a quarter of the frames have none within a second.
    """
    if count < 1 or (fps is not None and not fps > 0):
        raise ConfigError(f"at least one frame must be read (got {count}, {fps} a second)")
    with _video(path) as video:
        if indices:
            return _numbered(path, video, sorted(set(indices)), fit)
        stop = video.length if end is None else min(end, video.length)
        length = stop - start
        if not length > 0 or start < 0:
            raise TaskError(f"{path} has nothing between {start:g} and {stop:g} seconds")
        if fps is not None:
            count = max(1, min(count, round(length * fps)))
        wanted = [start + length * (2 * i + 1) / (2 * count) for i in range(count)]
        if wanted[-1] > video.end + SLACK:
            raise TaskError(f"{path} is cut short: its frames end at {video.end:.2f} s, and {wanted[-1]:.2f} s was to be read")
        height, width = fit(video.height, video.width) if fit else (video.height, video.width)
        if count * height * width > MAX_TOTAL_PIXELS:
            raise TaskError(f"{count} frames of {path} have more than {MAX_TOTAL_PIXELS} pixels; read fewer")
        kept: list[np.ndarray] = []
        times: list[float] = []
        for time, pixels in video.frames_at(wanted):
            kept.append(kept[-1] if times and times[-1] == time else _fitted(pixels, fit))
            times.append(time)
        return _frames(path, kept, times, length / count, video.damaged)


def _video(path: Path) -> VideoFile | ImageSequence:
    """A video by what it holds, to be closed after use."""
    if path.is_dir():
        return ImageSequence(images_in_folder(path))
    return open_image(path) or VideoFile(path)


def _numbered(path: Path, video: VideoFile | ImageSequence, indices: list[int], fit: Fit | None) -> Frames:
    kept: list[np.ndarray] = []
    times: list[float] = []
    number = -1
    for number, (time, pixels) in enumerate(video.all_frames()):
        if number == indices[len(kept)]:
            kept.append(_fitted(pixels, fit))
            times.append(time)
            if len(kept) == len(indices):
                return _frames(path, kept, times, (times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0, video.damaged)
    raise TaskError(f"{path} has {number + 1} frames; number {indices[len(kept)]} was to be read")


def _fitted(pixels: np.ndarray, fit: Fit | None) -> np.ndarray:
    return pixels if fit is None else resized(pixels, *fit(*pixels.shape[:2]))


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame (height, width, 3) of another size, bicubically; one that has it as it is."""
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _frames(path: Path, kept: list[np.ndarray], times: list[float], seconds: float, damaged: int) -> Frames:
    if len({frame.shape for frame in kept}) > 1:
        raise TaskError(f"the frames of {path} differ in size: {', '.join(sorted({f'{f.shape[1]}x{f.shape[0]}' for f in kept}))}")
    return Frames(np.stack(kept), tuple(times), seconds, damaged)


def video_seconds(path: Path) -> float:
    """How long a video lasts: to the end of its pictures, or to where its file says where it is cut short. Raises `TaskError`."""
    with _video(path) as video:
        return video.length


def content_id(path: Path) -> str:
    """A hash of a video's bytes, remembered for as long as its files stay as they are; of a folder, of its pictures.

    Raises `TaskError` where it cannot be read.
    """
    files = images_in_folder(path) if path.is_dir() else [path]
    with reading_errors(path):
        return _hash(tuple((str(file), (state := file.stat()).st_mtime_ns, state.st_size) for file in files))


@lru_cache(maxsize=65536)
def _hash(states: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in states:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def fitted(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest height and width that are multiples of `factor`, with `min_pixels` to `max_pixels` pixels, at the same aspect."""
    if max(height, width) > 200 * min(height, width):
        raise TaskError(f"frames of {width}x{height} are too narrow: one side is more than 200 times the other")
    rows, columns = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, columns


def patches(
    pixels: np.ndarray,
    *,
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
    min_pixels: int = 56 * 56,
    max_pixels: int = 14 * 14 * 4 * 1280,
    mean: Sequence[float] = MEAN,
    deviation: Sequence[float] = DEVIATION,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Rows for the vision tower, float32 (t h w, 3 temporal patch^2), and the grid (t, h, w) in patches.

    Frames are resized bicubically; an odd last frame is doubled. Rows are ordered by time, then by merged square, so that
    the rows of one step in time stand together.
    """
    import torch

    height, width = fitted(pixels.shape[1], pixels.shape[2], patch * merge, min_pixels, max_pixels)
    frames = (
        torch.from_numpy(np.stack([resized(frame, height, width) for frame in pixels])).float() / 255 - torch.tensor(mean)
    ) / torch.tensor(deviation)
    if len(frames) % temporal:
        frames = torch.cat([frames, frames[-1:].expand(temporal - len(frames) % temporal, -1, -1, -1)])
    t, h, w = len(frames) // temporal, height // patch, width // patch
    split = frames.view(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    rows = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3 * temporal * patch * patch)
    return rows, (t, h, w)
