"""A policy that sees, beside the model's own `generate`, one request at a time."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormatError, ControlTokenFormat
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tasks import task_group
from ramet.agents.tree import Message, Segment, Task, Tree
from ramet.errors import CheckpointError, PolicyError
from ramet.media.clips import make_questions, write_clip
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.engines.openai import WireFormat
from ramet.policy.engines.vision import VideoReader, VideoSequence, VideoSettings, VisionPolicy, model_inputs
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.policy.training.rows import batches, rows_of, token_logprobs
from ramet.recipes.nano.vision import random_vision_model
from tests.attention.test_positions import slow_positions

VIDEO = VideoSettings(max_frames=4, max_pixels=56 * 56)
TEXTS = ["What is there?", "And now?", "Look at it well, and say what you see."]


@pytest.fixture(scope="module")
def sights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VideoReader, Any, list[Segment]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("clips")
    rows = make_questions(folder, 6, 1)
    tokenizer, model = random_vision_model(TEXTS * 4, 0)
    reader = VideoReader(model.config, tokenizer, VIDEO)
    chat = ControlTokenFormat(tokenizer)
    chat.placeholder_ids = reader.ids
    return model, reader, chat, [Segment(str(folder / row["video"])) for row in rows]


def requests(chat: Any, clips: list[Segment], temperature: float = 0.0) -> list[SampleRequest]:
    """None, one and two videos, of several lengths; some ask the same about other videos."""
    rng = random.Random(0)
    made = []
    for n in range(14):
        media = tuple(rng.sample(clips, n % 3))
        ids = chat.render([Message("user", TEXTS[n % 2], media)], tools=())
        made.append(SampleRequest(tuple(ids), 12 + n, frozenset(), n, Sampling(temperature), media=media))
    return made


async def sampled(policy: VisionPolicy, asked: list[SampleRequest]) -> list[Sample]:
    found: list[Any] = [None] * len(asked)

    async def one(n: int) -> None:
        found[n] = await policy.sample(asked[n], Partial())

    async with policy, task_group() as group:
        for n in range(len(asked)):
            group.start_soon(one, n)
    return found


def test_a_batch_says_what_generate_says_one_by_one(sights: Any) -> None:
    model, reader, chat, clips = sights
    asked = requests(chat, clips)
    together = anyio.run(sampled, VisionPolicy(model, reader), asked)
    twice = anyio.run(sampled, VisionPolicy(model, reader, max_batch=3), [*asked, *asked])
    assert len({sample.ids for sample in together}) > 5
    for request, sample, again in zip(asked, together, twice, strict=False):
        inputs = model_inputs(model.config, [VideoSequence(request.prompt, tuple(reader(s).video for s in request.media))], 0)
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=-1)
        assert sample.ids == tuple(said[0, len(request.prompt) :].tolist())
        assert again.ids == sample.ids
    assert any(sample.cached > 0 for sample in twice[len(asked) :])


def test_the_same_words_about_another_video_share_no_memory(sights: Any) -> None:
    model, reader, chat, clips = sights
    asked = [
        SampleRequest(tuple(chat.render([Message("user", "What is there?", (clip,))], tools=())), 8, frozenset(), media=(clip,))
        for clip in clips[:3]
    ]
    assert len({request.prompt for request in asked}) == 1

    async def main() -> list[Sample]:
        policy = VisionPolicy(model, reader)
        async with policy:
            return [await policy.sample(request, Partial()) for request in [*asked, asked[0]]]

    first, second, third, again = anyio.run(main)
    assert max(second.cached, third.cached) <= 8  # what stands before the video
    assert again.cached == len(asked[0].prompt) - 1
    assert again.ids == first.ids


@pytest.fixture(scope="module", params=[1, 20, 60])
def timed(sights: Any, request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Segment, int]:
    """A clip of as many seconds, and of its own."""
    path = tmp_path_factory.mktemp("timed") / "clip.mp4"
    frames = np.random.default_rng(request.param).integers(0, 255, (request.param * 2, 56, 56, 3)).astype(np.uint8)
    write_clip(path, frames, 2)
    return Segment(str(path)), request.param


def test_all_ways_through_the_model_agree_on_positions(sights: Any, timed: Any) -> None:
    """Sampling, training rows, a batch for supervised training, `generate` and one pass at the positions of the definition; however
    far the time axis of a video runs ahead of its height, its width and the text."""
    model, reader, chat, clips = sights
    clip, seconds = timed
    for media in ((clip,), (clips[0], clip)):
        prompt = tuple(chat.render([Message("user", "What?", media)], tools=()))
        request = SampleRequest(prompt, 10, frozenset(), 3, Sampling(1.0), media=media)
        policy = VisionPolicy(model, reader)
        first, second = anyio.run(sampled, policy, [request, replace(request, seed=4)])
        videos = tuple(reader(segment).video for segment in media)
        assert videos[-1].seconds == pytest.approx(seconds / 2)  # four frames, two a step
        greedy = anyio.run(sampled, VisionPolicy(model, reader), [replace(request, sampling=Sampling(0.0))])[0]
        with torch.no_grad():
            asked = model_inputs(model.config, [VideoSequence(prompt, videos)], 0)
            said = model.generate(**asked, max_new_tokens=10, do_sample=False, eos_token_id=-1)
        assert greedy.ids == tuple(said[0, len(prompt) :].tolist())
        for sample in (first, second):
            whole = [*prompt, *sample.ids]
            ids = torch.tensor([whole])
            exact = model_inputs(model.config, [VideoSequence(whole, videos)], 0)
            exact["position_ids"] = slow_positions(model.config, whole, videos)[:, None]
            rows = policy.training_inputs(ids, ids.tolist(), [media])
            batch = model_inputs(model.config, [VideoSequence(whole, videos), VideoSequence(whole[:-3], videos)], 0)
            for inputs in (lambda _, exact=exact: exact, rows, lambda _, batch=batch: batch):
                logprobs, _, _ = token_logprobs(model, inputs(model)["input_ids"] if inputs is not rows else ids, inputs=inputs)
                assert torch.allclose(logprobs[0, len(prompt) :], torch.tensor(sample.logprobs), atol=2e-5)


def test_training_sees_the_probabilities_that_sampling_saw(sights: Any) -> None:
    """Whole trees with videos: rows carry the media, and the log-probabilities are those of the rollout."""
    model, reader, chat, clips = sights
    policy = VisionPolicy(model, reader)

    async def main() -> list[Tree]:
        runtime = Runtime(policy, chat, Sampling(0.8))
        async with policy:
            tasks = [Task(str(n), (Message("user", TEXTS[n % 3], tuple(clips[: n % 3])),)) for n in range(6)]
            return [await runtime.run(task, Budget(generated=40, answer_reserve=4, depth=0), n) for n, task in enumerate(tasks)]

    rows = [row for tree in anyio.run(main) for row in rows_of(tree, [1.0] * len(tree.branches), 1.0)]
    assert [len(row.media) for row in rows] == [0, 1, 2, 0, 1, 2]
    for batch in batches([row.ids for row in rows], 256):
        chosen = [rows[i] for i in batch.members]
        inputs = policy.training_inputs(batch.ids, [row.ids for row in chosen], [row.media for row in chosen])
        logprobs, _, _ = token_logprobs(model, batch.ids, 0.8, inputs=inputs)
        behaviour, mask = batch.spread([row.logprobs for row in rows]), batch.spread([row.mask for row in rows], torch.bool)
        assert (logprobs - behaviour)[mask].abs().max() < 2e-5
    logprobs.sum().backward()
    assert all(p.grad is None for p in model.model.visual.parameters())
    model.zero_grad()


def test_a_placeholder_that_was_sampled_is_a_token_like_others(sights: Any) -> None:
    """A model may write the id of a placeholder: the next turn and training go on, with the videos where they were."""
    model, reader, chat, clips = sights
    pad = model.config.video_token_id
    prompt = (*chat.render([Message("user", "What?", (clips[0],))], tools=()), pad, 80, pad)
    request = SampleRequest(prompt, 6, frozenset(), media=(clips[0],))
    policy = VisionPolicy(model, reader)
    (sample,) = anyio.run(sampled, policy, [replace(request, sampling=Sampling(1.0))])
    ids = torch.tensor([[*prompt, *sample.ids]])
    inputs = policy.training_inputs(ids, ids.tolist(), [(clips[0],)])
    logprobs, _, _ = token_logprobs(model, ids, inputs=inputs)
    assert torch.allclose(logprobs[0, len(prompt) :], torch.tensor(sample.logprobs), atol=2e-5)
    assert policy.sight.layout(prompt, (clips[0],)).after == policy.sight.layout(prompt[:-3], (clips[0],)).after


def test_what_does_not_see_says_so(sights: Any) -> None:
    model, reader, _chat, clips = sights
    text, tokenizer, plain = load_model(BASE)
    task = Task("t", (Message("user", "What?", (clips[0],)),))

    async def run(policy: Any, format_: Any) -> Tree:
        async with policy:
            return await Runtime(policy, format_).run(task, Budget(generated=20, depth=0))

    with pytest.raises(ChatFormatError, match="this model has no vision"):
        anyio.run(run, HFPolicy(text), plain)
    with pytest.raises(ChatFormatError, match="this model has no vision"):
        WireFormat().render(task.messages, tools=())
    request = SampleRequest((1, 2), 2, frozenset(), media=(clips[0],))
    with pytest.raises(PolicyError, match="the prompt has 0 video tokens, but its videos need 8"):
        anyio.run(sampled, VisionPolicy(model, reader), [request])
    with pytest.raises(CheckpointError, match="video is not supported"):
        VideoReader(text.config, tokenizer, VIDEO)


def test_clones_are_given_segments_by_key(sights: Any) -> None:
    from ramet.agents.context import ContextStore, clone_prompt

    _, _, _, clips = sights
    store = ContextStore({"s1": clips[0], "note": "a text", "s2": replace(clips[1], start=0.2)})
    assert store.media(["S2", "note", "s1"]) == (clips[0], replace(clips[1], start=0.2))
    assert clone_prompt(store, "What?", ["s2", "note"]) == "note: a text\ns2: video 1\nWhat?"


@pytest.mark.parametrize("order", ["filmed", "reversed", "shuffled"])
def test_frames_in_another_order(sights: Any, order: Any) -> None:
    _, _, _, clips = sights
    filmed, other = VIDEO.read(clips[2]), replace(VIDEO, order=order).read(clips[2])
    assert filmed.times == other.times
    expected = filmed.pixels[::-1] if order == "reversed" else filmed.pixels
    if order != "shuffled":
        assert (other.pixels == expected).all()
    assert sorted(frame.tobytes() for frame in other.pixels) == sorted(frame.tobytes() for frame in filmed.pixels)


def test_newer_models_lay_videos_out_step_by_step(sights: Any, tmp_path: Path) -> None:
    """Qwen3-VL: each step of time by itself, after the second at which it stands; its own code takes what is made."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    _, _reader, _, clips = sights
    tokenizer, model = random_vision_model(TEXTS * 4, 0)
    old = model.config
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
             "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=tower, video_token_id=old.video_token_id, image_token_id=old.image_token_id + 1,
        vision_start_token_id=old.vision_start_token_id, vision_end_token_id=old.vision_end_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    newer = Qwen3VLModel(config).eval()
    seen = VideoReader(config, tokenizer, VIDEO)(clips[0])
    assert seen.ids.count(config.vision_start_token_id) == seen.video.grid[0] == 2
    assert tokenizer.decode(seen.ids[: seen.ids.index(config.vision_start_token_id)]) == "<0.2 seconds>"
    inputs = model_inputs(config, [VideoSequence([*seen.ids, 70, 71], (seen.video,)), VideoSequence([70, 71])], 0)
    with torch.no_grad():
        hidden = newer(**inputs).last_hidden_state
        alone = newer(**model_inputs(config, [VideoSequence([70, 71])], 0)).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert torch.allclose(hidden[1, :2], alone[0], atol=1e-5)
