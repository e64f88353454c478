"""Best of N: which of several answers a reward model picks.

By score the highest; with a judge by a knockout (N - 1 duels) or a round robin (N (N - 1) / 2), each in both orders.
`ramet.benchmarks.evaluation.best_of_n` measures what that is worth.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ramet.agents.tree import Segment
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.rewards.video.judge import AnswerPair, PairwiseJudge, VideoRewardModel, compare


@dataclass(frozen=True)
class CandidateAnswers:
    """What was sampled for one question. `stated` is each answer's final statement, in one spelling, for votes."""

    id: str
    video: Segment | None
    question: str
    answers: tuple[str, ...]
    stated: tuple[str | None, ...]
    right: tuple[bool, ...]

    @property
    def cluster(self) -> str:
        return self.id if self.video is None else os.path.realpath(self.video.file)


class ScoreSelector:
    """Picks the highest score; the first of equal ones."""

    def __init__(self, model: VideoRewardModel):
        self.model, self.calls = model, 0
        self._scores: dict[str, list[float]] = {}

    def cost(self, n: int) -> int:
        """Answers that are scored to pick one of `n`."""
        return n

    def __call__(self, question: CandidateAnswers, chosen: Sequence[int]) -> int:
        if question.id not in self._scores:
            self._scores[question.id] = self.model.score(
                [VideoAnswer(question.video, question.question, answer) for answer in question.answers]
            )
            self.calls += len(question.answers)
        scores = self._scores[question.id]
        return max(chosen, key=lambda i: (scores[i], -i))


class PairwiseSelector:
    """Picks by duels, each asked once: `k` votes in each of two orders. Without a majority the first of the two stays.

    calls  outputs that were sampled
    """

    def __init__(self, judge: PairwiseJudge, method: Literal["knockout", "round-robin"] = "knockout", k: int = 1, seed: int = 0):
        self.judge, self.method, self.k, self.seed, self.calls = judge, method, k, seed, 0
        self._won: dict[tuple[str, int, int], str | None] = {}

    def cost(self, n: int) -> int:
        """Outputs that are sampled to pick one of `n`."""
        return 2 * self.k * (n - 1 if self.method == "knockout" else n * (n - 1) // 2)

    def __call__(self, question: CandidateAnswers, chosen: Sequence[int]) -> int:
        if self.method == "knockout":
            best = chosen[0]
            for other in chosen[1:]:
                best = other if self._winner(question, best, other) == "b" else best
            return best
        self._ask(question, [(i, j) for n, i in enumerate(chosen) for j in chosen[n + 1 :]])
        wins: Counter[int] = Counter(dict.fromkeys(chosen, 0))
        for n, i in enumerate(chosen):
            for j in chosen[n + 1 :]:
                winner = self._winner(question, i, j)
                wins[i] += winner == "a"
                wins[j] += winner == "b"
        return max(chosen, key=lambda i: (wins[i], -chosen.index(i)))

    def _winner(self, question: CandidateAnswers, i: int, j: int) -> str | None:
        self._ask(question, [(i, j)])
        if i < j:
            return self._won[question.id, i, j]
        return {"a": "b", "b": "a", None: None}[self._won[question.id, j, i]]

    def _ask(self, question: CandidateAnswers, pairs: Sequence[tuple[int, int]]) -> None:
        new = {pair for p in pairs if (question.id, *(pair := (min(p), max(p)))) not in self._won}
        alike = {(i, j) for i, j in new if question.answers[i] == question.answers[j]}
        self._won |= {(question.id, i, j): None for i, j in alike}
        asked = sorted(new - alike)
        duels = [
            AnswerPair(f"{question.id}/{i}/{j}", question.video, question.question, question.answers[i], question.answers[j])
            for i, j in asked
        ]
        if duels:
            for (i, j), verdict in zip(asked, compare(self.judge, duels, self.k, "both", self.seed), strict=True):
                self._won[question.id, i, j] = verdict.winner
                self.calls += len(verdict.votes)
