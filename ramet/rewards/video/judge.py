"""Judging between two answers: what a judge is shown, what it may say, and how votes become a verdict.

A judge is anything with a name and `say`. It never learns which answer is the better one, only a first and a second. What it says
counts if the whole of it is `<think>critique</think><answer>1</answer>` (or 2); anything else is an abstention, never a vote.
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
_CRITIQUE = r"\s*<think>(?P<critique>(?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>\s*(?P<said>%s)\s*</answer>\s*"
_CHOICE = re.compile(_CRITIQUE % "[12]", re.DOTALL)
_RATING = re.compile(_CRITIQUE % "10|[1-9]", re.DOTALL)


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one question about a video."""

    id: str
    video: VideoInput
    question: str
    a: str
    b: str


@dataclass(frozen=True)
class PairwisePrompt:
    """A duel as a judge sees it."""

    id: str
    video: VideoInput
    question: str
    first: str
    second: str


class PairwiseJudge(Protocol):
    """Says which of two answers is better."""

    @property
    def name(self) -> str: ...

    def judge(self, shown: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[str]]:
        """`k` outputs for each, as they were sampled. What it raises counts as k abstentions; a `RametError` of ours is passed on."""


class VideoRewardModel(Protocol):
    """Gives answers a score."""

    @property
    def name(self) -> str: ...

    def score(self, items: Sequence[VideoAnswer]) -> list[float]: ...


class NormalizedRewardModel(Protocol):
    """Gives answers a reward between 0 and 1."""

    def probabilities(self, items: Sequence[VideoAnswer]) -> list[float]: ...


class ServedRewardModel(VideoRewardModel, Protocol):
    """Its rewards are a function of its scores."""

    def rewards(self, scores: Sequence[float]) -> list[float]: ...


def parse_choice(said: str) -> tuple[int | None, str]:
    """(1, 2 or None for an abstention, the critique)."""
    match = _CHOICE.fullmatch(said)
    return (int(match["said"]), match["critique"].strip()) if match else (None, "")


def parse_rating(said: str) -> tuple[int | None, str]:
    """(1 to 10 or None, the critique)."""
    match = _RATING.fullmatch(said)
    return (int(match["said"]), match["critique"].strip()) if match else (None, "")


@dataclass(frozen=True)
class Vote:
    """One output of a judge. `forward`: was a first? `choice`: the place that it picks. `error`: what it raised instead."""

    forward: bool
    choice: int | None
    said: str
    error: str = ""

    @property
    def a(self) -> bool | None:
        """Is it for a? None: it abstains."""
        return None if self.choice is None else (self.choice == 1) == self.forward


@dataclass(frozen=True)
class PairwiseVerdict:
    """`winner` is "a", "b", or None where votes are equal or there is none.

    consistent   did each order by itself name the same answer? None unless both were asked
    probability  that a is better, where scores decide
    """

    winner: Literal["a", "b"] | None
    votes: tuple[Vote, ...] = ()
    consistent: bool | None = None
    probability: float | None = None

    @property
    def invalid(self) -> int:
        return sum(vote.choice is None for vote in self.votes)

    @property
    def critiques(self) -> list[str]:
        return [parse_choice(vote.said)[1] for vote in self.votes]


def majority(votes: Sequence[Vote]) -> Literal["a", "b"] | None:
    """Of those that do not abstain; None for a tie and where all do."""
    lead = sum((1 if vote.a else -1) for vote in votes if vote.a is not None)
    return "a" if lead > 0 else "b" if lead < 0 else None


def decided(votes: Sequence[Vote]) -> PairwiseVerdict:
    """The verdict of all votes together."""
    both = [majority([v for v in votes if v.forward is forward]) for forward in (True, False)]
    asked = {vote.forward for vote in votes}
    return PairwiseVerdict(majority(votes), tuple(votes), both[0] is not None and both[0] == both[1] if len(asked) == 2 else None)


def orders(duel: AnswerPair, order: Order, seed: int) -> list[bool]:
    """The orders in which a duel is shown: `both`, or one that the seed and the duel fix."""
    if order == "both":
        return [True, False]
    if order != "random":
        raise ConfigError(f"no order {order!r}; there are both and random")
    return [random.Random(f"order/{seed}/{duel.id}").random() < 0.5]


def compare(judge: PairwiseJudge, duels: Sequence[AnswerPair], k: int = 1, order: Order = "both", seed: int = 0) -> list[PairwiseVerdict]:
    """Verdicts of `k` votes in each order."""
    if k < 1:
        raise ConfigError(f"a verdict takes at least one vote (got {k})")
    asked = [(n, forward) for n, duel in enumerate(duels) for forward in orders(duel, order, seed)]
    shown = []
    for n, forward in asked:
        d = duels[n]
        shown.append(PairwisePrompt(d.id, d.video, d.question, *((d.a, d.b) if forward else (d.b, d.a))))
    votes: list[list[Vote]] = [[] for _ in duels]
    for (n, forward), outputs in zip(asked, _said(judge, shown, k, seed), strict=True):
        votes[n] += [Vote(forward, parse_choice(said)[0], said, error) for said, error in outputs]
    return [decided(v) for v in votes]


def _said(judge: PairwiseJudge, shown: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[tuple[str, str]]]:
    """(output, error) of every sample. Where a batch raises, each of it is asked by itself, so that one does not spoil the others."""
    try:
        outputs = [list(map(str, said)) for said in judge.judge(shown, k, seed)]
    except RametError:
        raise  # the model or the video cannot be had: no matter of judgement
    except Exception as error:
        if len(shown) > 1:
            return [_said(judge, [one], k, seed)[0] for one in shown]
        return [[("", f"{type(error).__name__}: {first_line(error)}")] * k]
    if len(outputs) != len(shown) or any(len(said) != k for said in outputs):
        raise ConfigError(f"the judge {judge.name} was to give {k} outputs for each of {len(shown)} questions, and did not")
    return [[(said, "") for said in group] for group in outputs]


def by_scores(model: VideoRewardModel, duels: Sequence[AnswerPair], temperature: float = 1.0) -> list[PairwiseVerdict]:
    """Verdicts of a model that scores answers one by one: probability(a) = sigmoid of the difference over the temperature."""
    scores = model.score([VideoAnswer(d.video, d.question, answer) for d in duels for answer in (d.a, d.b)])
    verdicts = []
    for a, b in zip(scores[::2], scores[1::2], strict=True):
        verdicts.append(PairwiseVerdict("a" if a > b else "b" if b > a else None, probability=sigmoid((a - b) / temperature)))
    return verdicts
