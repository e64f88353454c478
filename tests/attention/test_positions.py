"""Positions of prompts with videos, beside the published definition written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.attention.positions import VideoPatches, layout
from ramet.errors import ConfigError

VIDEO = 9


def slow_positions(config: Any, ids: Sequence[int], videos: Sequence[VideoPatches], more: int = 0) -> torch.Tensor:
    """(3, T + more) of ids and of text after them: each token after the largest number so far, a video's relative to where it starts.

    The n-th step of time stands floor(n * seconds * tokens_per_second) after the first, in exact arithmetic.
    """
    merge = config.vision_config.spatial_merge_size
    grids = [(v.grid[0], v.grid[1] // merge, v.grid[2] // merge, v.seconds) for v in videos]
    if config.model_type == "qwen3_vl":
        grids = [(1, h, w, s) for t, h, w, s in grids for _ in range(t)]
    positions: list[tuple[int, int, int]] = []
    while len(positions) < len(ids) + more:
        start = max((max(p) for p in positions), default=-1) + 1
        if grids and ids[len(positions)] == config.video_token_id:
            steps, rows, columns, seconds = grids.pop(0)
            rate = Fraction(seconds) * config.vision_config.tokens_per_second if config.model_type == "qwen2_5_vl" else 1
            for step in range(steps):
                for row in range(rows):
                    for column in range(columns):
                        positions.append((start + math.floor(step * rate), start + row, start + column))
        else:
            positions.append((start, start, start))
    return torch.tensor(positions).T


def config(kind: str = "qwen2_5_vl", rate: int = 2) -> Any:
    return SimpleNamespace(
        model_type=kind, video_token_id=VIDEO, vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=rate)
    )


def test_the_published_example() -> None:
    """Two steps a second and a half apart at two tokens a second, 4 x 6 patches; text goes on after the largest number of any axis."""
    ids = [1, 2, *[VIDEO] * 12, 3, 4]
    laid = layout(config(), ids, [VideoPatches(torch.empty(0), (2, 4, 6), 1.5)])
    assert laid.positions[:, :2].tolist() == [[0, 1]] * 3
    assert laid.positions[0, 2:14].tolist() == [2] * 6 + [5] * 6
    assert laid.positions[1, 2:14].tolist() == [2, 2, 2, 3, 3, 3] * 2
    assert laid.positions[2, 2:14].tolist() == [2, 3, 4] * 4
    assert laid.positions[:, 14:].tolist() == [[6, 7]] * 3
    assert 16 + laid.after == 8
    assert laid.places.tolist() == list(range(2, 14))


@pytest.mark.parametrize(("seconds", "times"), [(0.5, [0, 1, 2, 3]), (0.25, [0, 0, 1, 1]), (0.75, [0, 1, 3, 4]), (30.0, [0, 60, 120, 180])])
def test_parts_of_a_second_count(seconds: float, times: list[int]) -> None:
    laid = layout(config(), [VIDEO] * 4 + [1], [VideoPatches(torch.empty(0), (4, 2, 2), seconds)])
    assert laid.positions[0].tolist() == [*times, max(times) + 1]


@settings(max_examples=150)
@given(data=st.data())
def test_any_prompt(data: st.DataObject) -> None:
    """Any number of videos, of any length and size, with text of any length between, before and after them, and sampled placeholders."""
    kind = data.draw(st.sampled_from(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]))
    made = config(kind, data.draw(st.integers(1, 25)))
    text = st.lists(st.integers(0, 8), max_size=5)
    ids, videos = data.draw(text), []
    for _ in range(data.draw(st.integers(0, 3))):
        grid = (data.draw(st.integers(1, 6)), 2 * data.draw(st.integers(1, 4)), 2 * data.draw(st.integers(1, 4)))
        videos.append(VideoPatches(torch.empty(0), grid, data.draw(st.integers(1, 400)) / 8))
        steps, area = (grid[0], grid[1] * grid[2] // 4)
        for _ in range(steps if kind == "qwen3_vl" else 1):
            ids = [*ids, *[VIDEO] * (area if kind == "qwen3_vl" else area * steps), *data.draw(text)]
        ids += [7]
    ids += data.draw(st.lists(st.sampled_from([3, VIDEO]), max_size=4)) if ids and ids[-1] != VIDEO else []
    laid = layout(made, ids, videos)
    expected = slow_positions(made, ids, videos, more=3)
    assert laid.positions.tolist() == expected[:, : len(ids)].tolist()
    assert [len(ids) + n + laid.after for n in range(3)] == expected[0, len(ids) :].tolist()


def test_what_does_not_fit_is_refused() -> None:
    clip = VideoPatches(torch.empty(0), (2, 4, 4), 1.0)
    with pytest.raises(ConfigError, match="has 7 video tokens, but its videos need 8"):
        layout(config(), [VIDEO] * 7, [clip])
    with pytest.raises(ConfigError, match="other tokens stand among the 8 video tokens of a video"):
        layout(config(), [*[VIDEO] * 5, 1, *[VIDEO] * 3], [clip])
