"""Video on several ranks: the vision tower's work is shared exactly, and the decoder's equals the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ramet.attention.comm import RankGroup, SingleRank, simulated
from ramet.attention.hf import attach, extend
from ramet.attention.methods import Method
from ramet.attention.positions import VideoPatches
from ramet.attention.vision import encode, prefill_video
from ramet.errors import ConfigError
from ramet.media.frames import patches, read_frames
from tests.attention.test_positions import slow_positions
from tests.rewards.video.test_frames import write

VIDEO, START, END = 59, 57, 58


@pytest.fixture(scope="module")
def model() -> Any:
    """The real code of Qwen2.5-VL, small and random."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        video_token_id=VIDEO,
        image_token_id=60,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def video(steps: int, height: int, width: int, seed: int, seconds: float = 0.5) -> VideoPatches:
    generator = torch.Generator().manual_seed(seed)
    return VideoPatches(torch.randn(steps * height * width, 3 * 2 * 14 * 14, generator=generator), (steps, height, width), seconds)


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_frames_encoded_apart_are_those_encoded_together(model: Any, hosts: int) -> None:
    """Uneven runs, a run that ends within a video, more hosts than steps."""
    videos = [video(3, 8, 4, 1), video(2, 4, 4, 2)]
    with torch.no_grad():
        whole = model.model.visual(torch.cat([v.rows for v in videos]), grid_thw=torch.tensor([v.grid for v in videos])).pooler_output
    for features in simulated(hosts, lambda group: encode(model.model.visual, group, videos)):
        assert [len(f) for f in features] == [24, 8]
        assert (torch.cat(features) - whole).abs().max() < 1e-6


def prompt(features: int) -> list[int]:
    return [1, 2, 3, START, *[VIDEO] * features, END, 4, 5, 6, 7, 8]


@torch.no_grad()
def own(model: Any, ids: list[int], clip: VideoPatches) -> Tensor:
    """The model's own logits, at the positions of the definition."""
    model.set_attn_implementation({"text_config": "eager"})
    logits: Tensor = model(
        input_ids=torch.tensor([ids]),
        pixel_values_videos=clip.rows,
        video_grid_thw=torch.tensor([clip.grid]),
        position_ids=slow_positions(model.config, ids, [clip])[:, None],
    ).logits[0]
    attach(model)
    return logits


@pytest.mark.parametrize(("hosts", "seconds"), [(1, 15.0), (2, 0.5), (2, 5.0), (4, 15.0)])
def test_prefill_and_decoding_equal_the_model_itself(model: Any, hosts: int, seconds: float) -> None:
    """With all keys passed on; positions are three-dimensional for the video and go on from its end for the text, in time too."""
    clip = video(4, 8, 4, 3, seconds)
    ids, more = prompt(32), [9, 10, 11]
    expected = own(model, ids + more, clip)

    def rank(group: RankGroup) -> list[Tensor]:
        method = Method("spava", anchor=4, passing=1000)
        sequence, logits = prefill_video(model, group, method, ids, 5, [clip])
        return [logits, *(extend(model, group, [sequence], [[token]], method) for token in more)]

    for logits in simulated(hosts, rank):
        for step, ours in enumerate(logits):
            assert (ours[0] - expected[len(ids) - 1 + step]).abs().max() < 1e-5


@pytest.mark.parametrize("cut", [0, 3])
def test_a_sequence_that_is_cut_before_a_video_goes_on_where_the_video_began(model: Any, cut: int) -> None:
    """A sibling whose prompt begins alike and has another end, or a later turn of it: positions are those of what is kept."""
    clips = [video(4, 8, 4, 3, 5.0), video(3, 4, 4, 4, 9.0)]
    shared = [*prompt(32), *range(10, 10 + cut)]
    whole, other = [*shared, START, *[VIDEO] * 12, END, 20, 21], [*shared, 30, 31]
    expected = own(model, [*other, 32, 33], clips[0])

    def rank(group: RankGroup) -> list[Tensor]:
        method = Method("spava", anchor=4, passing=1000)
        sequence, _ = prefill_video(model, group, method, whole, len(whole) - len(shared), clips)
        extend(model, group, [sequence], [[22, 23]], method)
        fork = sequence.fork(len(shared))
        first = extend(model, group, [fork], [[30, 31]], method)
        extend(model, group, [fork], [[40]], method)
        return [first, extend(model, group, [fork.fork(len(other))], [[32, 33]], method)]

    for first, then in simulated(2, rank):
        assert (first - expected[len(other) - 1]).abs().max() < 1e-5
        assert (then - expected[-1]).abs().max() < 1e-5


def test_from_a_file_to_an_answer(model: Any, tmp_path: Path) -> None:
    """Decoding, patches, shared vision tower, Spava, sharded greedy decoding: three hosts say what one says."""
    attach(model)
    frames = read_frames(write(tmp_path / "clip.mp4", 40), 7)
    rows, grid = patches(frames.pixels)
    clip = VideoPatches(rows, grid, frames.seconds * 2)
    ids = prompt(grid[0] * grid[1] * grid[2] // 4)

    def answer(group: RankGroup, method: Method) -> list[int]:
        sequence, logits = prefill_video(model, group, method, ids, 5, [clip])
        said: list[int] = []
        for _ in range(6):
            said.append(int(logits[0].argmax()))
            logits = extend(model, group, [sequence], [[said[-1]]], method)
        return said

    alone = answer(SingleRank(), Method("dense"))
    assert simulated(3, lambda group: answer(group, Method("spava", anchor=4, passing=1000))) == [alone] * 3
    rough = simulated(3, lambda group: answer(group, Method("spava", anchor=4, passing=2)))
    assert rough[0] == rough[1] == rough[2]


def test_tokens_and_features_must_agree(model: Any) -> None:
    attach(model)
    with pytest.raises(ConfigError, match="has 31 video tokens, but its videos need 32"):
        prefill_video(model, SingleRank(), Method("dense"), prompt(31), 5, [video(4, 8, 4, 3)])
    with pytest.raises(ConfigError, match="does not support given positions"):
        simulated(2, lambda group: prefill_video(model, group, Method("apb"), prompt(32), 5, [video(4, 8, 4, 3)]))
