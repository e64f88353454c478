"""VideoGRM: a vision-language model that writes a critique and then a verdict, between two answers or on one.

    grm = VideoGRM.load(Path("model"))
    compare(grm, [AnswerPair("1", Segment("clip.mp4"), "What colour is the square?", "red", "blue")], k=5)

The model kind is that of Video Understanding Reward Modeling (Wei et al. 2026, arXiv 2605.07872), whose prompts are not public; the
prompts and the output format here are our own (see docs/video-rewards.md). Outputs are sampled with the engine of the delegation policy,
which reads a video once for all k votes.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ramet.agents import drain
from ramet.agents.chat import ChatFormat
from ramet.agents.encoding import TextEncoder
from ramet.agents.growth import seed_of
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tasks import task_group
from ramet.agents.tree import Message
from ramet.errors import CheckpointError, RewardError, StorageError, first_line
from ramet.policy.engines.vision import VideoReader, VideoSettings, VisionPolicy, segment_id
from ramet.policy.models.load import load_model
from ramet.policy.models.lora import merged
from ramet.policy.training.rows import token_logprobs
from ramet.rewards.video.discriminative import SCORES, VideoAnswer
from ramet.rewards.video.judge import PairwisePrompt, parse_rating
from ramet.rewards.video.pairs import segments_of
from ramet.terminal import quiet

PAIRWISE_TEMPLATE = (
    "A video, a question about it, and two answers. Which answer is right about the video?\nQuestion: {question}\nAnswer 1: {first}\n"
    "Answer 2: {second}\nWrite <think>what you see and what is wrong</think><answer>1</answer>, or <answer>2</answer>. There are no ties."
)
POINTWISE_TEMPLATE = (
    "A video, a question about it, and an answer. How right is the answer about the video?\nQuestion: {question}\nAnswer: {answer}\n"
    "Write <think>what you see and what is wrong</think><answer>a whole number from 1, wrong, to 10, right</answer>."
)
GRM_SETTINGS = "video_grm.json"
"""The file of a model directory that holds the settings of a trained VideoGRM."""


@dataclass(frozen=True)
class GRMSettings:
    """How a VideoGRM watches videos and samples.

    video        how frames are chosen and resized
    temperature  sampling temperature
    max_tokens   most tokens of an output
    expected     take the expected rating under the model's probabilities of 1 to 10 after its critique, not the rating that it writes
    votes        ratings sampled for one answer; the score is their mean
    """

    video: VideoSettings = field(default_factory=VideoSettings)
    temperature: float = 1.0
    max_tokens: int = 512
    expected: bool = False
    votes: int = 1


def saved_settings(path: Path) -> GRMSettings | None:
    """The settings that a VideoGRM was trained with; None for a directory of a model that was not. Raises `CheckpointError`."""
    if not (path / GRM_SETTINGS).exists():
        return None
    try:
        data = json.loads((path / GRM_SETTINGS).read_text(encoding="utf-8"))
        return GRMSettings(**{**data, "video": VideoSettings(**data["video"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / GRM_SETTINGS} does not hold the settings of a VideoGRM: {first_line(error)}") from error


def pairwise_message(prompt: PairwisePrompt) -> Message:
    """The message that asks a VideoGRM to judge a pair. Answers are untrusted and enter as plain text, never as control tokens."""
    text = PAIRWISE_TEMPLATE.format(question=prompt.question, first=prompt.first, second=prompt.second)
    return Message("user", text, segments_of(prompt.video))


class VideoGRM:
    """A generative reward model: a `PairwiseJudge` through `judge`, and a `ServedRewardModel` through `score`.

    model      a Hugging Face vision-language model
    tokenizer  its tokenizer
    chat       its chat format
    settings   how it watches videos and samples
    """

    def __init__(self, model: Any, tokenizer: Any, chat: ChatFormat, settings: GRMSettings):
        self.model, self.tokenizer, self.chat, self.settings = model, tokenizer, chat, settings
        self.name = "VideoGRM"
        self.reader = VideoReader(model.config, tokenizer, settings.video)
        self.chat.placeholder_ids = self.reader.ids
        self._encode = TextEncoder(tokenizer)
        self._known: OrderedDict[Any, float] = OrderedDict()

    @classmethod
    def load(cls, path: Path, settings: GRMSettings | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VideoGRM:
        """Load a model directory, by default with the settings that it was trained with. Raises `CheckpointError` where that fails."""
        settings = settings or saved_settings(path) or GRMSettings()
        model, tokenizer, chat = load_model(path, dtype=dtype, device=device)
        return cls(model, tokenizer, chat, settings)

    def save(self, path: Path) -> None:
        """Write a model directory: weights with adapters merged, tokenizer and settings. Raises `StorageError`."""
        state = merged(self.model)
        try:
            with quiet():
                self.model.save_pretrained(path, **({} if state is None else {"state_dict": state}))
            self.tokenizer.save_pretrained(path)
            (path / GRM_SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    def with_video(self, **changes: Any) -> VideoGRM:
        """The same model with changes to its `VideoSettings`."""
        return VideoGRM(self.model, self.tokenizer, self.chat, replace(self.settings, video=replace(self.settings.video, **changes)))

    def judge(self, prompts: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[str]]:
        """`k` outputs for each prompt; see `PairwiseJudge`. Raises what `sample` raises."""
        messages = [pairwise_message(prompt) for prompt in prompts]
        return self.generate(messages, [f"{prompt.id}/{prompt.first}" for prompt in prompts], k, seed)

    def generate(self, messages: Sequence[Message], places: Sequence[str], k: int, seed: int) -> list[list[str]]:
        """`k` texts in reply to each message; see `sample`."""
        return [[self._text(sample) for sample in group] for group in self.sample(messages, places, k, seed)]

    def _text(self, sample: Sample) -> str:
        return self.chat.text([i for i in sample.ids if i not in self.chat.stop_ids])

    def sample(self, messages: Sequence[Message], places: Sequence[str], k: int, seed: int) -> list[list[Sample]]:
        """`k` samples in reply to each message.

        places  a name for each message, from which, with `seed`, the seeds of its samples are derived

        Raises `RewardError` for a message that leaves no room for an output, and `TaskError` for a video that cannot be read.
        """
        self.chat.placeholder_ids = self.reader.ids
        sampling = Sampling(self.settings.temperature)
        limit = self.model.config.get_text_config().max_position_embeddings
        requests = []
        for message, place in zip(messages, places, strict=True):
            prompt = tuple(self.chat.render([message], tools=()))
            room = min(self.settings.max_tokens, limit - len(prompt))
            if room < 1:
                raise RewardError(f"{len(prompt)} tokens leave no room for a verdict in the model's {limit}; show fewer frames")
            for n in range(k):
                requests.append(SampleRequest(prompt, room, self.chat.stop_ids, seed_of(seed, place, n), sampling, place, message.media))
        samples: list[Any] = [None] * len(requests)

        async def sample_one(policy: VisionPolicy, n: int) -> None:
            samples[n] = await policy.sample(requests[n], Partial())

        async def main() -> None:
            async with VisionPolicy(self.model, self.reader) as policy, task_group() as group:
                for n in range(len(requests)):
                    group.start_soon(sample_one, policy, n)

        drain.run(main)
        return [samples[start : start + k] for start in range(0, len(samples), k)]

    def rate(self, items: Sequence[VideoAnswer], seed: int = 0) -> list[tuple[float | None, list[str]]]:
        """For each item the mean of its ratings, from 1 to 10, or None if none is valid; and the outputs. Raises what `sample` raises."""
        messages = [Message("user", POINTWISE_TEMPLATE.format(question=i.question, answer=i.answer), segments_of(i.video)) for i in items]
        groups = self.sample(messages, [f"{i.question}/{i.answer}" for i in items], self.settings.votes, seed)
        rated = []
        for message, group in zip(messages, groups, strict=True):
            outputs = [self._text(sample) for sample in group]
            ratings = [float(n) for n, _ in map(parse_rating, outputs) if n is not None]
            if self.settings.expected and ratings:
                ratings = [self._expected(message, output) for output in outputs if parse_rating(output)[0] is not None]
            rated.append((sum(ratings) / len(ratings) if ratings else None, outputs))
        return rated

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        """The mean rating, from 1 to 10, of each item. The latest `SCORES` ratings are cached.

        Raises `RewardError` for an item without a valid rating, and what `sample` raises.
        """
        keys = [(tuple(map(segment_id, segments_of(i.video))), i.question, i.answer) for i in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        scores = {key: self._known[key] for key in keys if key in self._known}
        for (key, item), (rating, outputs) in zip(missing.items(), self.rate(list(missing.values())) if missing else [], strict=True):
            if rating is None:
                raise RewardError(
                    f"none of the VideoGRM's {len(outputs)} ratings of {item.answer[:40]!r} can be read; the first is {outputs[0][:80]!r}"
                )
            scores[key] = self._known[key] = rating
        while len(self._known) > SCORES:
            self._known.popitem(last=False)
        return [scores[key] for key in keys]

    def rewards(self, scores: Sequence[float]) -> list[float]:
        """Ratings from 1 to 10 as rewards in [0, 1], linearly."""
        return [(rating - 1) / 9 for rating in scores]

    def probabilities(self, items: Sequence[VideoAnswer]) -> list[float]:
        """The reward in [0, 1] of each item. Raises what `score` raises."""
        return self.rewards(self.score(items))

    @torch.inference_mode()
    def _expected(self, message: Message, output: str) -> float:
        """The expectation of the rating over 1 to 10, with the critique of `output` and the model's probability of each rating after it."""
        before = self.chat.render([message], tools=()) + self._encode(output.rpartition("<answer>")[0] + "<answer>")
        policy = VisionPolicy(self.model, self.reader)
        logprobs = []
        for rating in range(1, 11):
            tail = self._encode(f"{rating}</answer>")
            ids = torch.tensor([[*before, *tail]], device=self.model.device)
            inputs = policy.training_inputs(ids, ids.tolist(), [message.media])
            logprobs.append(float(token_logprobs(self.model, ids, inputs=inputs)[0][0, -len(tail) :].sum()))
        top = max(logprobs)
        weights = [math.exp(logprob - top) for logprob in logprobs]
        return sum(r * w for r, w in zip(range(1, 11), weights, strict=True)) / sum(weights)
