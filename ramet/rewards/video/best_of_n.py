"""Best of N: selecting one of several answers with a reward model.

A scoring model selects the answer with the highest score. A judge selects by a knockout, with N - 1 comparisons, or by a round robin,
with N (N - 1) / 2 comparisons, each in both orders. `ramet.benchmarks.evaluation.best_of_n` measures the accuracy that this gives.
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
    """The answers sampled for one question.

    answers  the full texts
    stated   the final statement of each answer in canonical spelling, for majority votes; None for an answer without one
    right    whether each answer is right
    """

    id: str
    video: Segment | None
    question: str
    answers: tuple[str, ...]
    stated: tuple[str | None, ...]
    right: tuple[bool, ...]

    @property
    def cluster(self) -> str:
        """Identifies the video, or the question where there is none: outcomes within a cluster are not independent."""
        return self.id if self.video is None else os.path.realpath(self.video.file)


class ScoreSelector:
    """Selects the answer with the highest score, the first of equal ones. `calls` counts the answers scored so far."""

    def __init__(self, model: VideoRewardModel):
        self.model, self.calls = model, 0
        self._scores: dict[str, list[float]] = {}

    def cost(self, n: int) -> int:
        """Number of answers scored to select one of `n`."""
        return n

    def __call__(self, question: CandidateAnswers, chosen: Sequence[int]) -> int:
        """The index of the answer selected among those with the indices `chosen`."""
        if question.id not in self._scores:
            self._scores[question.id] = self.model.score(
                [VideoAnswer(question.video, question.question, answer) for answer in question.answers]
            )
            self.calls += len(question.answers)
        scores = self._scores[question.id]
        return max(chosen, key=lambda i: (scores[i], -i))


class PairwiseSelector:
    """Selects an answer by pairwise comparisons, with `k` votes in each of the two orders.

    judge   compares two answers; each comparison is made once and remembered
    method  knockout: the winner so far meets the next answer, and stays on a tie. round-robin: most wins, the first of equal ones
    calls   outputs sampled so far
    """

    def __init__(self, judge: PairwiseJudge, method: Literal["knockout", "round-robin"] = "knockout", k: int = 1, seed: int = 0):
        self.judge, self.method, self.k, self.seed, self.calls = judge, method, k, seed, 0
        self._won: dict[tuple[str, int, int], str | None] = {}

    def cost(self, n: int) -> int:
        """Number of outputs sampled to select one of `n`."""
        return 2 * self.k * (n - 1 if self.method == "knockout" else n * (n - 1) // 2)

    def __call__(self, question: CandidateAnswers, chosen: Sequence[int]) -> int:
        """The index of the answer selected among those with the indices `chosen`."""
        if self.method == "knockout":
            best = chosen[0]
            for other in chosen[1:]:
                best = other if self._winner(question, best, other) == "b" else best
            return best
        self._compare(question, [(i, j) for n, i in enumerate(chosen) for j in chosen[n + 1 :]])
        wins: Counter[int] = Counter(dict.fromkeys(chosen, 0))
        for n, i in enumerate(chosen):
            for j in chosen[n + 1 :]:
                winner = self._winner(question, i, j)
                wins[i] += winner == "a"
                wins[j] += winner == "b"
        return max(chosen, key=lambda i: (wins[i], -chosen.index(i)))

    def _winner(self, question: CandidateAnswers, i: int, j: int) -> str | None:
        """The outcome for answers i and j: "a" if i wins, "b" if j does, None for a tie."""
        self._compare(question, [(i, j)])
        if i < j:
            return self._won[question.id, i, j]
        return {"a": "b", "b": "a", None: None}[self._won[question.id, j, i]]

    def _compare(self, question: CandidateAnswers, pairs: Sequence[tuple[int, int]]) -> None:
        """Compare those of the pairs that have not been compared yet; identical answers tie without a comparison."""
        new = {pair for p in pairs if (question.id, *(pair := (min(p), max(p)))) not in self._won}
        alike = {(i, j) for i, j in new if question.answers[i] == question.answers[j]}
        self._won |= {(question.id, i, j): None for i, j in alike}
        places = sorted(new - alike)
        answer_pairs = [
            AnswerPair(f"{question.id}/{i}/{j}", question.video, question.question, question.answers[i], question.answers[j])
            for i, j in places
        ]
        if answer_pairs:
            for (i, j), verdict in zip(places, compare(self.judge, answer_pairs, self.k, "both", self.seed), strict=True):
                self._won[question.id, i, j] = verdict.winner
                self.calls += len(verdict.votes)
