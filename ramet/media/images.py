"""Images as a video: a folder of images, a single one, or an animated WebP. Pixels are those that an image viewer shows.

An image is turned by its EXIF orientation, and 16 bits per channel are reduced to 8. Files are untrusted input: the format is detected
from their content among a few that are allowed, and an image that is too large is refused by its header.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ramet.errors import TaskError
from ramet.media.containers import oriented
from ramet.media.packets import MAX_PIXELS, format_of, reading_errors, require_regular_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of the files of a folder that are read as images."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Pillow's names of the formats that are read."""
IMAGE_SECONDS = 1.0
"""Seconds for which an image without a duration of its own is shown."""
ORIENTATION = 0x0112
"""The EXIF tag of an image's orientation."""
TURNS = {2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1), 5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}
"""The matrix of each EXIF orientation, as `oriented` takes it."""


class ImageSequence:
    """Image files that are shown one after another, or the frames of one animated file. The interface is that of `VideoFile`.

    files    the image files, in order, or one animated file
    seconds  duration of each frame of an animated file; image files are shown for `IMAGE_SECONDS`

    Raises `TaskError` for a first image that cannot be read or is too large.
    """

    damaged = 0

    def __init__(self, files: Sequence[Path], seconds: Sequence[float] = ()):
        self._files, self._animated = list(files), bool(seconds)
        until = np.cumsum([0.0, *(seconds or [IMAGE_SECONDS] * len(self._files))])
        self._times = until[:-1]
        self.length = self.end = float(until[-1])
        with _image(self._files[0]) as image:
            self.height, self.width = image.height, image.width

    def __enter__(self) -> ImageSequence:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def frames_at(self, seconds: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
        """The image shown at each of the given times; see `VideoFile.frames_at`. Raises `TaskError` for one that cannot be read."""
        places = np.maximum(np.searchsorted(self._times, seconds, side="right") - 1, 0).tolist()
        before, pixels = -1, np.empty(0)
        for place in places:
            if place != before:
                before, pixels = place, self._pixels(place)
            yield float(self._times[place]), pixels

    def all_frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """Every image in turn; see `VideoFile.all_frames`."""
        return self.frames_at(self._times.tolist())

    def _pixels(self, place: int) -> np.ndarray:
        with _image(self._files[0 if self._animated else place]) as image:
            if self._animated:
                image.seek(place)
            pixels = _eight_bits(image)
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
            return pixels if turn is None else oriented(pixels, turn)


def _eight_bits(image: Any) -> np.ndarray:
    """A Pillow image as uint8 [height, width, 3]."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip values above 255
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


@contextmanager
def _image(file: Path) -> Iterator[Any]:
    """An open Pillow image. Raises `TaskError` if the file cannot be read or the image is too large."""
    from PIL import Image

    with reading_errors(file, "cannot read image"):
        try:
            with Image.open(require_regular_file(file), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise TaskError(f"{file} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are allowed")
                yield image
        except (Image.DecompressionBombError, SyntaxError, struct.error) as error:
            raise OSError(str(error)) from error


def images_in_folder(folder: Path) -> list[Path]:
    """The image files of a folder, hidden ones aside, ordered by the numbers in their names, so that 10 comes after 9.

    Raises `TaskError` if there are none or the folder cannot be read.
    """
    with reading_errors(folder):
        files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and not f.is_dir()]
    if not files:
        raise TaskError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    return sorted(files, key=lambda f: [(int(n or 0), t) for n, t in re.findall(r"(\d*)(\D*)", f.name)])


def open_image(file: Path) -> ImageSequence | None:
    """Open a file that contains an image or an animated WebP. Returns None for anything else, such as other animations.

    Raises `TaskError` for an image that cannot be read or is too large.
    """
    from PIL import UnidentifiedImageError

    try:
        with _image(file) as image:
            kind, animated = image.format, getattr(image, "is_animated", False)
    except TaskError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return None
        raise
    if kind == "WEBP" and animated:
        return ImageSequence([file], _durations(file))
    if (kind == "PNG" and animated) or (kind == "JPEG" and format_of(file) == "mjpeg"):
        return None
    return ImageSequence([file])


def _durations(file: Path) -> list[float]:
    """Duration in seconds of each frame of an animated WebP, from the headers of its `ANMF` chunks."""
    with file.open("rb") as data:
        data.seek(12)
        durations = []
        while len(head := data.read(8)) == 8:
            name, size = head[:4], int.from_bytes(head[4:], "little")
            begun = data.tell()
            if name == b"ANMF":
                durations.append(int.from_bytes(data.read(15)[12:], "little") / 1000 or 0.1)
            data.seek(begun + size + size % 2)
    return durations
