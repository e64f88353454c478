"""Pairwise judging: which of two answers a judge prefers, and how its votes become a verdict.

A judge is shown the two answers in an order and never learns which is expected to be the better one. An output counts as a vote only if
all of it has the form `<think>critique</think><answer>1</answer>` (or 2). Anything else is an abstention. Judges tend to prefer one
position, so pairs are by default shown in both orders and verdicts report whether the orders agree (position consistency, as in
VL-RewardBench, Li et al. 2024, arXiv 2411.17451).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ramet.errors import ConfigError, RametError, first_line
from ramet.rewards.video.discriminative import VideoAnswer, sigmoid
from ramet.rewards.video.pairs import VideoInput

Order = Literal["both", "random"]
"""How the answers of a pair are ordered for the judge: in both orders, or in one that the seed determines for each pair."""
_OUTPUT = r"\s*<think>(?P<critique>(?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>\s*(?P<answer>%s)\s*</answer>\s*"
_CHOICE = re.compile(_OUTPUT % "[12]", re.DOTALL)
_RATING = re.compile(_OUTPUT % "10|[1-9]", re.DOTALL)


@dataclass(frozen=True)
class AnswerPair:
    """Two answers, `a` and `b`, to one question about a video."""

    id: str
    video: VideoInput
    question: str
    a: str
    b: str


@dataclass(frozen=True)
class PairwisePrompt:
    """An answer pair as it is shown to a judge, in one of its two orders."""

    id: str
    video: VideoInput
    question: str
    first: str
    second: str


class PairwiseJudge(Protocol):
    """A model, or anything else, that says which of two answers is better."""

    @property
    def name(self) -> str:
        """The judge's name, for messages and reports."""
        ...

    def judge(self, prompts: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[str]]:
        """`k` sampled outputs for each prompt, unparsed. A `RametError` stops the run; any other exception counts as k abstentions."""
        ...


class VideoRewardModel(Protocol):
    """A model that gives each answer a score of its own, on a scale of its own. Higher is better."""

    @property
    def name(self) -> str:
        """The model's name, for messages and reports."""
        ...

    def score(self, items: Sequence[VideoAnswer]) -> list[float]:
        """One score for each item. Raises `RewardError` or `TaskError` for what cannot be scored."""
        ...


class NormalizedRewardModel(Protocol):
    """A model that gives each answer a reward between 0 and 1."""

    def probabilities(self, items: Sequence[VideoAnswer]) -> list[float]:
        """One reward in [0, 1] for each item. Raises `RewardError` or `TaskError` for what cannot be scored."""
        ...


class ServedRewardModel(VideoRewardModel, Protocol):
    """A model whose rewards are a function of its scores, as a reward server needs it."""

    def rewards(self, scores: Sequence[float]) -> list[float]:
        """The reward in [0, 1] that belongs to each score."""
        ...


def parse_choice(output: str) -> tuple[int | None, str]:
    """The choice, 1 or 2, and the critique of a judge's output; (None, "") for an abstention."""
    match = _CHOICE.fullmatch(output)
    return (int(match["answer"]), match["critique"].strip()) if match else (None, "")


def parse_rating(output: str) -> tuple[int | None, str]:
    """The rating, from 1 to 10, and the critique of a pointwise output; (None, "") for an abstention."""
    match = _RATING.fullmatch(output)
    return (int(match["answer"]), match["critique"].strip()) if match else (None, "")


@dataclass(frozen=True)
class Vote:
    """One output of a judge.

    forward  whether answer a was shown first
    choice   the position chosen, 1 or 2; None for an abstention
    output   the text, unparsed
    error    what the judge raised in place of an output
    """

    forward: bool
    choice: int | None
    output: str
    error: str = ""

    @property
    def prefers_a(self) -> bool | None:
        """Whether the vote is for answer a; None for an abstention."""
        return None if self.choice is None else (self.choice == 1) == self.forward


@dataclass(frozen=True)
class PairwiseVerdict:
    """The outcome for one answer pair.

    winner       "a" or "b"; None for a tie, and where there is no valid vote
    votes        the judge's votes, in the order in which they were sampled
    consistent   whether both orders, each by its own majority, prefer the same answer; None unless both orders were shown
    probability  of answer a being the better one; only where scores decide
    """

    winner: Literal["a", "b"] | None
    votes: tuple[Vote, ...] = ()
    consistent: bool | None = None
    probability: float | None = None

    @property
    def invalid(self) -> int:
        """Number of abstentions."""
        return sum(vote.choice is None for vote in self.votes)

    @property
    def critiques(self) -> list[str]:
        """The critique of each vote, "" for an abstention."""
        return [parse_choice(vote.output)[1] for vote in self.votes]


def majority(votes: Sequence[Vote]) -> Literal["a", "b"] | None:
    """The answer that most valid votes prefer; None for a tie, and where there is no valid vote."""
    lead = sum((1 if vote.prefers_a else -1) for vote in votes if vote.prefers_a is not None)
    return "a" if lead > 0 else "b" if lead < 0 else None


def verdict_of(votes: Sequence[Vote]) -> PairwiseVerdict:
    """The verdict by the majority of all votes together."""
    by_order = [majority([vote for vote in votes if vote.forward is forward]) for forward in (True, False)]
    both = len({vote.forward for vote in votes}) == 2
    return PairwiseVerdict(majority(votes), tuple(votes), by_order[0] is not None and by_order[0] == by_order[1] if both else None)


def orders(pair: AnswerPair, order: Order, seed: int) -> list[bool]:
    """The orders in which a pair is shown, True for a first: both, or one fixed by the seed and the pair's id.

    Raises `ConfigError` for an order that does not exist.
    """
    if order == "both":
        return [True, False]
    if order != "random":
        raise ConfigError(f"unknown order {order!r}; choose both or random")
    return [random.Random(f"order/{seed}/{pair.id}").random() < 0.5]


def compare(judge: PairwiseJudge, pairs: Sequence[AnswerPair], k: int = 1, order: Order = "both", seed: int = 0) -> list[PairwiseVerdict]:
    """The judge's verdict on each pair, from `k` votes per order.

    Raises `ConfigError` for fewer than one vote, an order that does not exist, and a judge that gives another number of outputs.
    """
    if k < 1:
        raise ConfigError(f"a verdict needs at least one vote (got {k})")
    shown = [(index, forward) for index, pair in enumerate(pairs) for forward in orders(pair, order, seed)]
    prompts = []
    for index, forward in shown:
        pair = pairs[index]
        prompts.append(PairwisePrompt(pair.id, pair.video, pair.question, *((pair.a, pair.b) if forward else (pair.b, pair.a))))
    votes: list[list[Vote]] = [[] for _ in pairs]
    for (index, forward), samples in zip(shown, _outputs(judge, prompts, k, seed), strict=True):
        votes[index] += [Vote(forward, parse_choice(output)[0], output, error) for output, error in samples]
    return [verdict_of(v) for v in votes]


def _outputs(judge: PairwiseJudge, prompts: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[tuple[str, str]]]:
    """(output, error) of each sample. Where a batch raises, each of its prompts is tried alone, so that one does not spoil the others."""
    try:
        outputs = [list(map(str, group)) for group in judge.judge(prompts, k, seed)]
    except RametError:
        raise  # the model or a video is missing, which says nothing about the answers
    except Exception as error:
        if len(prompts) > 1:
            return [_outputs(judge, [prompt], k, seed)[0] for prompt in prompts]
        return [[("", f"{type(error).__name__}: {first_line(error)}")] * k]
    if len(outputs) != len(prompts) or any(len(group) != k for group in outputs):
        raise ConfigError(f"the judge {judge.name} did not give {k} outputs for each of {len(prompts)} prompts")
    return [[(output, "") for output in group] for group in outputs]


def compare_by_score(model: VideoRewardModel, pairs: Sequence[AnswerPair], temperature: float = 1.0) -> list[PairwiseVerdict]:
    """Verdicts of a model that scores each answer by itself; equal scores are a tie.

    The probability of a is sigmoid((score of a - score of b) / temperature), the model of Bradley and Terry (1952).
    """
    scores = model.score([VideoAnswer(pair.video, pair.question, answer) for pair in pairs for answer in (pair.a, pair.b)])
    verdicts = []
    for a, b in zip(scores[::2], scores[1::2], strict=True):
        verdicts.append(PairwiseVerdict("a" if a > b else "b" if b > a else None, probability=sigmoid((a - b) / temperature)))
    return verdicts
