"""Videos are written here, frame by frame, and read back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ramet.errors import ConfigError, TaskError
from ramet.rewards.video.frames import fitted, patches, read_frames


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
