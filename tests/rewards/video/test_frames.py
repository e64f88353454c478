"""Videos are written here, frame by frame, and read back."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ramet.errors import ConfigError, TaskError
from ramet.media.frames import content_id, fitted, patches, read_frames


def write(path: Path, count: int, rate: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
    """A clip whose n-th frame has brightness 4 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(count):
            image = np.full((size[1], size[0], 3), 4 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(pixels: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in pixels]


def test_frames_are_the_middles_of_equal_parts(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", 40)
    frames = read_frames(clip, 4)
    assert numbers(frames.pixels) == [4, 14, 24, 34] or np.abs(np.array(numbers(frames.pixels)) - [5, 15, 25, 35]).max() <= 1
    assert frames.seconds == pytest.approx(1.0, abs=0.01)
    assert frames.pixels.shape == (4, 48, 64, 3)
    part = read_frames(clip, 2, 1.0, 3.0)
    assert np.abs(np.array(numbers(part.pixels)) - [15, 25]).max() <= 1
    assert part.seconds == pytest.approx(1.0)


def test_a_short_clip_repeats_frames(tmp_path: Path) -> None:
    read = numbers(read_frames(write(tmp_path / "clip.mp4", 3), 9).pixels)
    assert len(read) == 9
    assert read == sorted(read)
    assert set(read) == {0, 1, 2}


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"cannot read video .*No such file"):
        read_frames(tmp_path / "none.mp4", 2)
    (tmp_path / "text.mp4").write_text("not a video at all")
    with pytest.raises(TaskError, match="cannot read video"):
        read_frames(tmp_path / "text.mp4", 2)
    clip = write(tmp_path / "clip.mp4", 20)
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:700])
    with pytest.raises(TaskError):
        read_frames(tmp_path / "cut.mp4", 2)
    with pytest.raises(TaskError, match="nothing between 5 and 2 seconds"):
        read_frames(clip, 2, start=5.0)
    with pytest.raises(ConfigError, match="at least one frame"):
        read_frames(clip, 0)


@pytest.mark.parametrize("size", [(64, 48), (200, 90), (1000, 700), (30, 30)])
def test_patches_are_those_of_the_models_own_processor(size: tuple[int, int]) -> None:
    """For images, which it repeats to two frames; its video processor needs another package."""
    image = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    theirs = Qwen2VLImageProcessorPil()(image, return_tensors="pt")
    ours, grid = patches(np.stack([image, image]))
    assert list(grid) == theirs["image_grid_thw"][0].tolist()
    assert torch.allclose(ours, theirs["pixel_values"], atol=1e-5)


def test_an_odd_frame_is_doubled_and_narrow_frames_are_refused() -> None:
    pixels = np.zeros((3, 56, 56, 3), dtype=np.uint8)
    rows, grid = patches(pixels)
    assert grid == (2, 4, 4)
    assert rows.shape == (32, 3 * 2 * 14 * 14)
    with pytest.raises(TaskError, match="too narrow"):
        fitted(10, 3000, 28, 1, 10**9)


def test_times_are_those_of_the_frames_that_are_shown(tmp_path: Path) -> None:
    """Variable frame rate: frame n is shown from times[n] on, whatever the spacing."""
    starts = [0, 100, 200, 1000, 1100, 3000]  # milliseconds
    path = tmp_path / "variable.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, start in enumerate(starts):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * index, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read_frames(path, 6, 0.0, 3.0)
    assert [round(float(f.mean()) / 40) for f in frames.pixels] == [2, 2, 4, 4, 4, 4]  # at 0.25, 0.75, 1.25, ...
    assert frames.times == pytest.approx((0.2, 0.2, 1.1, 1.1, 1.1, 1.1), abs=0.002)
    assert frames.seconds == pytest.approx(0.5)
    numbered = read_frames(path, 1, indices=(5, 0, 3))
    assert [round(float(f.mean()) / 40) for f in numbered.pixels] == [0, 3, 5]
    assert numbered.times == pytest.approx((0.0, 1.0, 3.0), abs=0.002)
    with pytest.raises(TaskError, match="has 6 frames; number 9 was to be read"):
        read_frames(path, 1, indices=(9,))


def test_a_part_is_read_from_the_nearest_key_frame_and_is_the_same(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", 60)
    whole = read_frames(clip, 60)
    for start in (0.53, 2.33, 5.03):
        part = read_frames(clip, 4, start, start + 0.8)
        places = [int((start + 0.8 * (2 * i + 1) / 8) * 10) for i in range(4)]
        assert np.abs(np.array(numbers(part.pixels)) - numbers(whole.pixels[places])).max() <= 1
        assert part.times == pytest.approx([p / 10 for p in places], abs=0.01)


def test_frames_a_second(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", 40)
    assert len(read_frames(clip, 100, fps=2).pixels) == 8
    assert len(read_frames(clip, 5, fps=2).pixels) == 5
    assert len(read_frames(clip, 100, 0.0, 0.1, fps=2).pixels) == 1
    with pytest.raises(ConfigError):
        read_frames(clip, 4, fps=0)


def test_pictures_and_their_folders(tmp_path: Path) -> None:
    from PIL import Image

    for n in (1, 2, 9, 10):
        Image.new("RGB", (40, 30), (20 * n, 20 * n, 20 * n)).save(tmp_path / f"frame{n}.png")
    frames = read_frames(tmp_path, 4)
    assert [round(float(f.mean()) / 20) for f in frames.pixels] == [1, 2, 9, 10]
    assert frames.times == (0.0, 1.0, 2.0, 3.0)
    assert read_frames(tmp_path / "frame9.png", 2).pixels.shape == (2, 30, 40, 3)
    Image.new("RGB", (41, 30)).save(tmp_path / "frame11.png")
    with pytest.raises(TaskError, match="differ in size: 40x30, 41x30"):
        read_frames(tmp_path, 5)
    (tmp_path / "frame11.png").write_text("no picture")
    with pytest.raises(TaskError, match="cannot read image"):
        read_frames(tmp_path, 5)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TaskError, match="has no images"):
        read_frames(empty, 1)
    levels = [Image.new("P", (32, 24), n) for n in range(4)]
    levels[0].save(tmp_path / "a.gif", save_all=True, append_images=levels[1:], duration=[100, 500, 100, 300])
    assert read_frames(tmp_path / "a.gif", 3).pixels.shape == (3, 24, 32, 3)


def test_rotated_and_odd_sized_clips(tmp_path: Path) -> None:
    """A frame that its file says to turn by 90 degrees comes out turned."""
    plain, turned = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:, :16] = 250  # bright on the left
    with av.open(str(plain), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(plain.read_bytes())
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # clockwise
    at = data.index(matrix, data.index(b"tkhd"))
    data[at : at + len(matrix)] = quarter
    turned.write_bytes(bytes(data))
    frame = read_frames(turned, 1).pixels[0]
    assert frame.shape == (64, 48, 3)
    assert frame[:12].mean() > 200 > 50 > frame[40:].mean()  # what was on the left is above
    assert read_frames(write(tmp_path / "odd.avi", 3, size=(66, 50)), 2).pixels.shape == (2, 50, 66, 3)


def test_a_clip_that_is_cut_short_says_where(tmp_path: Path) -> None:
    whole = write(tmp_path / "clip.mkv", 60)
    data = whole.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(TaskError, match=r"cut\.mkv is truncated: its frames end at [123]\.\d\d s, and the one at 5\.25 s was to be read"):
        read_frames(cut, 4)
    assert len(read_frames(cut, 4, 0.0, 1.0).pixels) == 4


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", 5)
    first = content_id(clip)
    (tmp_path / "copy.mp4").write_bytes(clip.read_bytes())
    assert content_id(tmp_path / "copy.mp4") == first
    write(clip, 6)
    assert content_id(clip) != first
    with pytest.raises(TaskError, match="cannot read video"):
        content_id(tmp_path / "none.mp4")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_errors_of_ours_or_frames(tmp_path: Path, seed: int) -> None:
    """Bytes of a real clip overwritten at random: frames, or one line that names the file; nothing else escapes."""
    rng = random.Random(seed)
    data = bytearray(write(tmp_path / "clip.mp4", 12).read_bytes())
    for _ in range(rng.choice((1, 8, 64))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(data[: rng.randrange(1, len(data))] if seed % 3 == 0 else data))
    try:
        assert read_frames(path, 3).pixels.ndim == 4
    except TaskError as error:
        assert "damaged.mp4" in str(error)
