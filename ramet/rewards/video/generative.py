"""VideoGRM: a vision-language model that writes a critique and then a verdict, between two answers or on one.

    grm = VideoGRM.load(Path("model"))
    compare(grm, [AnswerPair("1", Segment("clip.mp4"), "What colour is the square?", "red", "blue")], k=5)

What it is asked, and the grammar of what counts, are ours (see docs/video-rewards.md). Samples come from the engine of the
delegation policy: k votes read the video once.
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
from ramet.policy.engines.vision import VideoReader, VideoSettings, VisionPolicy, shown_id
from ramet.policy.models.load import load_model
from ramet.policy.models.lora import merged
from ramet.policy.training.rows import token_logprobs
from ramet.rewards.video.discriminative import SCORES, VideoAnswer
from ramet.rewards.video.judge import PairwisePrompt, parse_rating
from ramet.rewards.video.pairs import segments_of
from ramet.terminal import quiet

PAIRWISE = (
    "A video, a question about it, and two answers. Which answer is right about the video?\nQuestion: {question}\nAnswer 1: {first}\n"
    "Answer 2: {second}\nWrite <think>what you see and what is wrong</think><answer>1</answer>, or <answer>2</answer>. There are no ties."
)
POINTWISE = (
    "A video, a question about it, and an answer. How right is the answer about the video?\nQuestion: {question}\nAnswer: {answer}\n"
    "Write <think>what you see and what is wrong</think><answer>a whole number from 1, wrong, to 10, right</answer>."
)


GRM_SETTINGS = "video_grm.json"


@dataclass(frozen=True)
class GRMSettings:
    """How a VideoGRM watches and samples.

    expected  of ratings: the mean under the model's own odds of 1 to 10 after its critique, instead of the number that it writes
    votes     ratings of one answer; their mean counts
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


def pairwise(shown: PairwisePrompt) -> Message:
    """What a judge reads. Answers are untrusted: they stand in it as text, and no part of them is a control token."""
    text = PAIRWISE.format(question=shown.question, first=shown.first, second=shown.second)
    return Message("user", text, segments_of(shown.video))


class VideoGRM:
    """A judge between answers (`judge`), and a score of one (`score`)."""

    def __init__(self, model: Any, tokenizer: Any, chat: ChatFormat, settings: GRMSettings):
        self.model, self.tokenizer, self.chat, self.settings = model, tokenizer, chat, settings
        self.name = "VideoGRM"
        self.reader = VideoReader(model.config, tokenizer, settings.video)
        self.chat.placeholder_ids = self.reader.ids
        self._encode = TextEncoder(tokenizer)
        self._known: OrderedDict[Any, float] = OrderedDict()

    @classmethod
    def load(cls, path: Path, settings: GRMSettings | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VideoGRM:
        """From a model directory; by default with the settings that it was trained with. Raises `CheckpointError`."""
        settings = settings or saved_settings(path) or GRMSettings()
        model, tokenizer, chat = load_model(path, dtype=dtype, device=device)
        return cls(model, tokenizer, chat, settings)

    def save(self, path: Path) -> None:
        """Weights (adapters merged), tokenizer and settings as a model directory. Raises `StorageError`."""
        state = merged(self.model)
        try:
            with quiet():
                self.model.save_pretrained(path, **({} if state is None else {"state_dict": state}))
            self.tokenizer.save_pretrained(path)
            (path / GRM_SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    def with_video(self, **changes: Any) -> VideoGRM:
        """The same model with other settings of videos."""
        return VideoGRM(self.model, self.tokenizer, self.chat, replace(self.settings, video=replace(self.settings.video, **changes)))

    def judge(self, shown: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[str]]:
        """`k` outputs for each; see `PairwiseJudge`."""
        return self.generate([pairwise(one) for one in shown], [f"{one.id}/{one.first}" for one in shown], k, seed)

    def generate(self, messages: Sequence[Message], places: Sequence[str], k: int, seed: int) -> list[list[str]]:
        """`k` texts after each message; `places` make their seeds."""
        return [[self._text(sample) for sample in group] for group in self.sample(messages, places, k, seed)]

    def _text(self, sample: Sample) -> str:
        return self.chat.text([i for i in sample.ids if i not in self.chat.stop_ids])

    def sample(self, messages: Sequence[Message], places: Sequence[str], k: int, seed: int) -> list[list[Sample]]:
        """The same as samples."""
        self.chat.placeholder_ids = self.reader.ids
        sampling = Sampling(self.settings.temperature)
        limit = self.model.config.get_text_config().max_position_embeddings
        asked = []
        for message, place in zip(messages, places, strict=True):
            prompt = tuple(self.chat.render([message], tools=()))
            room = min(self.settings.max_tokens, limit - len(prompt))
            if room < 1:
                raise RewardError(f"{len(prompt)} tokens leave no room for a verdict in the model's {limit}; show fewer frames")
            for n in range(k):
                asked.append(SampleRequest(prompt, room, self.chat.stop_ids, seed_of(seed, place, n), sampling, place, message.media))
        found: list[Any] = [None] * len(asked)

        async def one(policy: VisionPolicy, n: int) -> None:
            found[n] = await policy.sample(asked[n], Partial())

        async def main() -> None:
            async with VisionPolicy(self.model, self.reader) as policy, task_group() as group:
                for n in range(len(asked)):
                    group.start_soon(one, policy, n)

        drain.run(main)
        return [found[start : start + k] for start in range(0, len(found), k)]

    def rate(self, items: Sequence[VideoAnswer], seed: int = 0) -> list[tuple[float | None, list[str]]]:
        """(mean rating from 1 to 10, None if none can be read; the outputs) of each item."""
        messages = [Message("user", POINTWISE.format(question=i.question, answer=i.answer), segments_of(i.video)) for i in items]
        groups = self.sample(messages, [f"{i.question}/{i.answer}" for i in items], self.settings.votes, seed)
        rated = []
        for message, group in zip(messages, groups, strict=True):
            said = [self._text(sample) for sample in group]
            numbers = [float(n) for n, _ in map(parse_rating, said) if n is not None]
            if self.settings.expected and numbers:
                numbers = [self._expected(message, text) for text in said if parse_rating(text)[0] is not None]
            rated.append((sum(numbers) / len(numbers) if numbers else None, said))
        return rated

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        """Mean ratings; known ones are not asked for again.

        An answer of which no rating can be read has none: `RewardError`, never a number of ours.
        """
        keys = [(tuple(map(shown_id, segments_of(i.video))), i.question, i.answer) for i in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        for (key, item), (rating, said) in zip(missing.items(), self.rate(list(missing.values())) if missing else [], strict=True):
            if rating is None:
                raise RewardError(f"the VideoGRM's {len(said)} ratings of {item.answer[:40]!r} cannot be read, such as {said[0][:80]!r}")
            found[key] = self._known[key] = rating
        while len(self._known) > SCORES:
            self._known.popitem(last=False)
        return [found[key] for key in keys]

    def rewards(self, scores: Sequence[float]) -> list[float]:
        """Ratings as rewards between 0 and 1."""
        return [(rating - 1) / 9 for rating in scores]

    def probabilities(self, items: Sequence[VideoAnswer]) -> list[float]:
        """The rewards of answers."""
        return self.rewards(self.score(items))

    @torch.inference_mode()
    def _expected(self, message: Message, said: str) -> float:
        """The mean of 1 to 10 under the odds of each, written in place of the number that was."""
        before = self.chat.render([message], tools=()) + self._encode(said.rpartition("<answer>")[0] + "<answer>")
        policy = VisionPolicy(self.model, self.reader)
        odds = []
        for rating in range(1, 11):
            tail = self._encode(f"{rating}</answer>")
            ids = torch.tensor([[*before, *tail]], device=self.model.device)
            inputs = policy.training_inputs(ids, ids.tolist(), [message.media])
            odds.append(float(token_logprobs(self.model, ids, inputs=inputs)[0][0, -len(tail) :].sum()))
        top = max(odds)
        weights = [math.exp(o - top) for o in odds]
        return sum(r * w for r, w in zip(range(1, 11), weights, strict=True)) / sum(weights)
