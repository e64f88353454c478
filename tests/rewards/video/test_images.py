"""Pictures are read as a viewer shows them, in folders and by themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ramet.errors import TaskError
from ramet.media.frames import content_id, read_frames, video_seconds
from tests.rewards.video.films import bars, film, number
from tests.rewards.video.test_containers import QUARTERS, quarters


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_they_say(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if suffix != "png" else {}
    Image.fromarray(QUARTERS).save(tmp_path / f"1.{suffix}", exif=exif, **options)
    with Image.open(tmp_path / f"1.{suffix}") as image:
        expected = quarters(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    assert quarters(read_frames(tmp_path / f"1.{suffix}", 1).pixels[0]) == expected
    assert quarters(read_frames(tmp_path, 1).pixels[0]) == expected


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    """A ramp of grey from black to white stays one."""
    ramp = np.linspace(0, 65535, 128).astype(np.uint16)
    Image.fromarray(np.repeat(ramp[None], 64, axis=0)).save(tmp_path / f"1.{suffix}")
    row = read_frames(tmp_path / f"1.{suffix}", 1).pixels[0][5]
    assert (row == (ramp >> 8)[:, None]).all()


def test_what_is_hidden_in_a_folder_is_no_picture(tmp_path: Path) -> None:
    for n in (9, 10):
        Image.fromarray(bars(n)).save(tmp_path / f"{n}.png")
    known = content_id(tmp_path)
    (tmp_path / "._9.png").write_bytes(b"\0\5\x16\7" + bytes(200))
    (tmp_path / ".thumb.jpg").write_bytes(b"no picture")
    (tmp_path / "more.png").mkdir()
    (tmp_path / "notes.txt").write_text("no picture either")
    assert [number(f) for f in read_frames(tmp_path, 2).pixels] == [9, 10]
    assert content_id(tmp_path) == known
    os.mkfifo(tmp_path / "11.png")
    with pytest.raises(TaskError, match="not a regular file"):
        read_frames(tmp_path, 3)


def test_animated_webp_keeps_its_times(tmp_path: Path) -> None:
    frames = [Image.fromarray(bars(n)) for n in (5, 6, 7, 8)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 2000, 100, 800], lossless=True)
    assert video_seconds(path) == pytest.approx(3.0)
    read = read_frames(path, 6)  # at 0.25, 0.75, 1.25, ...
    assert [number(f) for f in read.pixels] == [6, 6, 6, 6, 8, 8]
    assert read.times == pytest.approx((0.1, 0.1, 0.1, 0.1, 2.2, 2.2))
    assert [number(f) for f in read_frames(path, 1, indices=(0, 2)).pixels] == [5, 7]


def test_a_picture_is_known_by_its_content(tmp_path: Path) -> None:
    """One JPEG is a picture of a second, several in one file are a film; a suffix makes no picture of anything."""
    Image.fromarray(bars(77)).save(tmp_path / "one.mjpeg", "JPEG", quality=95)
    assert (video_seconds(tmp_path / "one.mjpeg"), number(read_frames(tmp_path / "one.mjpeg", 1).pixels[0])) == (1.0, 77)
    many = film(tmp_path / "many.mjpeg", "mjpeg", [n / 25 for n in range(50)], form="mjpeg", rate=25)
    many.rename(tmp_path / "many.jpg")
    assert [number(f) for f in read_frames(tmp_path / "many.jpg", 2).pixels] == [12, 37]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(TaskError, match="cannot read image"):  # never by a program that runs what is in it
        read_frames(folder, 1)
