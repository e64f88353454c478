"""Frames of a video by timestamp, and what the vision towers of Qwen2-VL to Qwen3-VL take of them.

    frames = read_frames(Path("clip.mp4"), 16)                # uint8 (16, height, width, 3), and the second of each
    pixels, grid = patches(frames.pixels)                     # rows of patches, (t, h, w) in patches

A video is a file that PyAV decodes (GIFs and single pictures too) or a folder of pictures, a second each. It is untrusted: what
is no video, has no frames, is cut short or is too large to be decoded is named in a `TaskError`, with the second where it ends.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramet.errors import ConfigError, TaskError, first_line

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the red, green and blue channels of CLIP's training images, in shares of 255."""
MOST_PIXELS = 2**25
"""Of one frame, 8K: more is taken for an attack on memory."""
MOST_IN_ALL = 2**28
"""Pixels of all frames that are read at once."""
LISTS = ("hls", "dash", "concat", "sdp", "rtsp", "image2", "imf")
"""Formats whose files name other files or addresses, which nobody has allowed."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Frames:
    """`pixels` is uint8 (frames, height, width, 3); `times` are seconds from the beginning of the video."""

    pixels: np.ndarray
    times: tuple[float, ...]
    seconds: float
    """Between one frame and the next, on average."""


@dataclass(frozen=True)
class _Span:
    """What of a video is read: seconds, and where it begins and ends."""

    start: float
    end: float

    def middles(self, count: int) -> list[float]:
        """The middle of each of `count` equal parts."""
        return [self.start + (self.end - self.start) * (2 * i + 1) / (2 * count) for i in range(count)]


def read_frames(
    path: Path, count: int, start: float = 0.0, end: float | None = None, *, fps: float | None = None, indices: Sequence[int] = ()
) -> Frames:
    """Frames of [start, end) seconds: what is shown in the middle of each of `count` equal parts; a short clip repeats frames.

    With `fps`, that many a second instead, at most `count` in all. With `indices`, the frames of these numbers, from 0 on, in
    ascending order, and nothing else counts.
    """
    if count < 1 or (fps is not None and not fps > 0):
        raise ConfigError(f"at least one frame must be read (got {count}, {fps} a second)")
    if path.is_dir():
        return _chosen(path, _pictures(path), count, start, end, fps, indices)
    with _opened(path) as container:
        if start > 0 and not indices:
            container.seek(int(start * 1_000_000), backward=True)
        return _chosen(path, _Decoded(path, container), count, start, end, fps, indices)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file that PyAV can decode and that may be decoded. What is raised of its reading comes out as a `TaskError`."""
    try:
        import av
    except ImportError:
        raise ConfigError("reading videos needs PyAV: pip install 'ramet[video]'") from None
    try:
        with av.open(str(path)) as container:
            if set(container.format.name.split(",")) & set(LISTS) and path.suffix.lower() not in PICTURES:
                raise TaskError(f"{path} is a list of other files ({container.format.name}); those are not read")
            if not container.streams.video:
                raise TaskError(f"{path} has no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise TaskError(f"{path} has a video in a format that cannot be decoded here")
            if stream.width * stream.height > MOST_PIXELS:
                raise TaskError(f"{path} has frames of {stream.width}x{stream.height}; at most {MOST_PIXELS} pixels are decoded")
            yield container
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise TaskError(f"cannot read video {path}: {first_line(error)}") from error


class _Pictures:
    """A folder of pictures as a video with one frame a second."""

    def __init__(self, folder: Path, files: list[Path]):
        self.length, self.strict = float(len(files)), True
        self._folder, self._files = folder, files
        self.area = _area(files[0])

    def __iter__(self) -> Iterator[tuple[float, float, Any]]:
        for second, file in enumerate(self._files):
            yield float(second), 1.0, file

    def pixels(self, file: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise TaskError(f"{file} is {image.width}x{image.height}; at most {MOST_PIXELS} pixels are decoded")
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise TaskError(f"cannot read picture {file}: {first_line(error)}") from error


def _area(file: Path) -> int:
    """Pixels of a picture, by its header; 0 where that cannot be read, which reading it will say."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return int(image.width * image.height)
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0


def _pictures(folder: Path) -> _Pictures:
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES]
    if not files:
        raise TaskError(f"{folder} has no pictures ({', '.join(PICTURES)})")
    # By the numbers in their names, so that 10 comes after 9.
    return _Pictures(folder, sorted(files, key=lambda f: [(int(n or 0), t) for n, t in re.findall(r"(\d*)(\D*)", f.name)]))


class _Decoded:
    """The frames of an open container, in the order in which they are shown."""

    def __init__(self, path: Path, container: Any):
        self._path, self._container = path, container
        stream = container.streams.video[0]
        self.area = stream.width * stream.height
        self._origin = float((stream.start_time or 0) * (stream.time_base or 0))
        self.strict = not container.streams.audio
        """Does the video last as long as the file says? Where there is sound, it may end sooner."""
        if stream.duration and stream.time_base:
            self.length, self.strict = float(stream.duration * stream.time_base), True
        elif container.duration:
            self.length = container.duration / 1_000_000
        else:
            self.length, self.strict = stream.frames / float(stream.average_rate or 25) or 1.0, False

    def __iter__(self) -> Iterator[tuple[float, float, Any]]:
        import av

        last = 0.0
        decoded = iter(self._container.decode(self._container.streams.video[0]))
        while True:
            try:
                frame = next(decoded)
            except StopIteration:
                return
            except (av.FFmpegError, OSError, ValueError) as error:
                raise TaskError(f"cannot decode video {self._path} after {last:.2f} s: {first_line(error)}") from error
            time = float(frame.time or 0.0) - self._origin
            yield time, float((frame.duration or 0) * (frame.time_base or 0)), frame
            last = time

    def pixels(self, frame: Any) -> np.ndarray:
        if frame.width * frame.height > max(self.area, 1) * 4:
            raise TaskError(f"{self._path} has a frame of {frame.width}x{frame.height}, much larger than it says")
        # A frame says how far it is to be turned against the clock.
        return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


def _chosen(
    path: Path, video: _Pictures | _Decoded, count: int, start: float, end: float | None, fps: float | None, indices: Sequence[int]
) -> Frames:
    if indices:
        return _numbered(path, video, sorted(set(indices)))
    span = _Span(start, video.length if end is None else min(end, video.length))
    length = span.end - span.start
    if not length > 0 or start < 0:
        raise TaskError(f"{path} has nothing between {start:g} and {span.end:g} seconds")
    if fps is not None:
        count = max(1, min(count, round(length * fps)))
    wanted = span.middles(count)
    if count * video.area > MOST_IN_ALL:
        raise TaskError(f"{count} frames of {path} have more than {MOST_IN_ALL} pixels; read fewer")
    kept: list[np.ndarray] = []
    times: list[float] = []
    last, until, shown = None, 0.0, 0.0

    def keep(frame: Any) -> None:
        kept.append(kept[-1] if times and times[-1] == shown else video.pixels(frame))
        times.append(shown)

    for time, duration, frame in video:
        while len(kept) < count and last is not None and wanted[len(kept)] < time:
            keep(last)
        if len(kept) == count:
            break
        last, shown, until = frame, time, time + max(duration, time - shown)
    if last is None:
        raise TaskError(f"{path} has no frame that can be decoded")
    slack = 0.25 if video.strict else 1 + 0.1 * video.length
    if len(kept) < count and wanted[-1] > until + slack:
        raise TaskError(f"{path} is cut short: its frames end at {until:.2f} s, and {wanted[-1]:.2f} s was to be read")
    while len(kept) < count:
        keep(last)
    return _frames(path, kept, times, length / count)


def _numbered(path: Path, video: _Pictures | _Decoded, indices: list[int]) -> Frames:
    kept: list[np.ndarray] = []
    times: list[float] = []
    number = -1
    for number, (time, _, frame) in enumerate(video):
        if number == indices[len(kept)]:
            kept.append(video.pixels(frame))
            times.append(time)
            if len(kept) == len(indices):
                return _frames(path, kept, times, (times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0)
    raise TaskError(f"{path} has {number + 1} frames; number {indices[len(kept)]} was to be read")


def _frames(path: Path, kept: list[np.ndarray], times: list[float], seconds: float) -> Frames:
    if len({frame.shape for frame in kept}) > 1:
        raise TaskError(f"the frames of {path} differ in size: {', '.join(sorted({f'{f.shape[1]}x{f.shape[0]}' for f in kept}))}")
    return Frames(np.stack(kept), tuple(times), seconds)


def video_seconds(path: Path) -> float:
    """How long a video lasts, as its file says. Raises `TaskError`."""
    if path.is_dir():
        return _pictures(path).length
    with _opened(path) as container:
        return _Decoded(path, container).length


def content_id(path: Path) -> str:
    """A hash of a video's bytes, remembered for as long as the file stays as it is. Raises `TaskError` where it cannot be read."""
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    try:
        states = tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
        return _hash(states)
    except OSError as error:
        raise TaskError(f"cannot read video {path}: {error.strerror or error}") from error


@lru_cache(maxsize=65536)
def _hash(states: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in states:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


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
    pixels: np.ndarray,
    *,
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
    least: int = 56 * 56,
    most: int = 14 * 14 * 4 * 1280,
    mean: Sequence[float] = MEAN,
    deviation: Sequence[float] = DEVIATION,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Rows for the vision tower, float32 (t h w, 3 temporal patch^2), and the grid (t, h, w) in patches.

    Frames are resized bicubically; an odd last frame is doubled. Rows are ordered by time, then by merged square, so that
    the rows of one step in time stand together.
    """
    from PIL import Image

    height, width = fitted(pixels.shape[1], pixels.shape[2], patch * merge, least, most)
    resized = np.stack([np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in pixels])
    frames = (torch.from_numpy(resized).float() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    if len(frames) % temporal:
        frames = torch.cat([frames, frames[-1:].expand(temporal - len(frames) % temporal, -1, -1, -1)])
    t, h, w = len(frames) // temporal, height // patch, width // patch
    split = frames.view(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    rows = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3 * temporal * patch * patch)
    return rows, (t, h, w)
