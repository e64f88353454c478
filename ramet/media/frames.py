"""Frames of a video by timestamp, and their patches as the vision encoders of Qwen2-VL to Qwen3-VL take them.

    frames = read_frames(Path("clip.mp4"), 16)                # uint8 [16, height, width, 3], and the time of each
    pixels, grid = patches(frames.pixels)                     # rows of patches, and the grid (t, h, w) in patches

A video is a file that PyAV decodes (`containers`), or images (`images`): one image, an animated WebP, or a folder of images that are
shown for a second each. It is untrusted input: `TaskError` names a file that is not a video, has no frames, is truncated or is too large.
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
from ramet.media.containers import VideoFile
from ramet.media.images import ImageSequence, images_in_folder, open_image
from ramet.media.packets import reading_errors

if TYPE_CHECKING:
    from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Means of the red, green and blue channels of CLIP's training images, as fractions of 255."""
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviations."""
MAX_TOTAL_PIXELS = 2**28
"""Most pixels of all frames of one result together, after resizing."""
TRUNCATION_SLACK = 0.25
"""Seconds after the end of a truncated file for which its last frame may still stand."""

Fit = Callable[[int, int], tuple[int, int]]
"""Maps the height and width of a frame to those that it is resized to."""


@dataclass(frozen=True)
class Frames:
    """Frames of one video.

    pixels   uint8 [frames, height, width, 3]
    times    time from which each frame is shown, in seconds from the start of the video
    seconds  mean time between two frames, in seconds
    damaged  packets that were needed and could not be decoded
    """

    pixels: np.ndarray
    times: tuple[float, ...]
    seconds: float
    damaged: int = 0


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
    """Read frames of a video: those shown in the middle of each of `count` equal parts of [start, end), in seconds.

    end      by default the end of the video
    fps      frames per second to read instead, at most `count` in all
    indices  numbers of the frames to read instead, from 0; the other arguments, except `fit`, are ignored. Returned in ascending order
    fit      size to which each frame is resized, bicubically, as soon as it is read

    A short clip repeats frames. In a damaged file, the frame before stands in for one that cannot be decoded. Raises `TaskError` for a
    file that cannot be read, a part without frames, and a file that is too damaged (see `VideoFile.frames_at`); `ConfigError` for a count
    or rate that is not positive.
    """
    if count < 1 or (fps is not None and not fps > 0):
        raise ConfigError(f"at least one frame must be read (got a count of {count} and a rate of {fps} per second)")
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
        if wanted[-1] > video.end + TRUNCATION_SLACK:
            raise TaskError(f"{path} is truncated: its frames end at {video.end:.2f} s, and the one at {wanted[-1]:.2f} s was to be read")
        height, width = fit(video.height, video.width) if fit else (video.height, video.width)
        if count * height * width > MAX_TOTAL_PIXELS:
            raise TaskError(f"{count} frames of {path} have more than {MAX_TOTAL_PIXELS} pixels; read fewer")
        frames: list[np.ndarray] = []
        times: list[float] = []
        for time, pixels in video.frames_at(wanted):
            frames.append(frames[-1] if times and times[-1] == time else _resized_to(fit, pixels))
            times.append(time)
        return _stacked(path, frames, times, length / count, video.damaged)


def _video(path: Path) -> VideoFile | ImageSequence:
    """Open a video by what it contains. The result is a context manager."""
    if path.is_dir():
        return ImageSequence(images_in_folder(path))
    return open_image(path) or VideoFile(path)


def _numbered(path: Path, video: VideoFile | ImageSequence, indices: list[int], fit: Fit | None) -> Frames:
    """The frames of the given numbers, which ascend."""
    frames: list[np.ndarray] = []
    times: list[float] = []
    number = -1
    for number, (time, pixels) in enumerate(video.all_frames()):
        if number == indices[len(frames)]:
            frames.append(_resized_to(fit, pixels))
            times.append(time)
            if len(frames) == len(indices):
                return _stacked(path, frames, times, (times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0, video.damaged)
    raise TaskError(f"{path} has {number + 1} frames; number {indices[len(frames)]} was to be read")


def _resized_to(fit: Fit | None, pixels: np.ndarray) -> np.ndarray:
    return pixels if fit is None else resized(pixels, *fit(*pixels.shape[:2]))


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame uint8 [height, width, 3] resized bicubically, or itself if it has that size already."""
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _stacked(path: Path, frames: list[np.ndarray], times: list[float], seconds: float, damaged: int) -> Frames:
    """The frames as one array. Raises `TaskError` if they differ in size."""
    if len({frame.shape for frame in frames}) > 1:
        raise TaskError(f"the frames of {path} differ in size: {', '.join(sorted({f'{f.shape[1]}x{f.shape[0]}' for f in frames}))}")
    return Frames(np.stack(frames), tuple(times), seconds, damaged)


def video_seconds(path: Path) -> float:
    """Duration of a video in seconds: the end of its last frame or, in a truncated file, the duration that it declares.

    Raises `TaskError` for a file that cannot be read.
    """
    with _video(path) as video:
        return video.length


def content_id(path: Path) -> str:
    """The first 24 hexadecimal digits of the SHA-256 of a video file, or of a folder's images; cached until the files change.

    Raises `TaskError` for a file that cannot be read.
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
    """The nearest height and width that are multiples of `factor`, have `min_pixels` to `max_pixels` pixels, and keep the aspect ratio.

    The rule is that of Qwen2-VL (Wang et al. 2024, arXiv 2409.12191). Raises `TaskError` for an aspect ratio above 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise TaskError(f"frames of {width}x{height} pixels are too narrow: one side is more than 200 times the other")
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
    """Patches for the vision encoder, float32 [t h w, 3 temporal patch^2], and the grid (t, h, w) in patches.

    pixels                  uint8 [frames, height, width, 3]
    patch                   side of a patch, in pixels
    merge                   patches per side of the squares whose features the model merges
    temporal                frames per temporal step; the last frame is repeated to fill the last step
    min_pixels, max_pixels  of a resized frame; see `fitted`
    mean, deviation         by which the channels are normalised

    Patches are ordered by temporal step, then by merged square, so that those of one step are contiguous.
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
