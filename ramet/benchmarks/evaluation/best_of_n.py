"""Best-of-N curves: what choosing among N answers gains, beside the most that it could gain.

N answers at a time are drawn, by the seed, from those that were sampled for a question; the draws are the same for every method:

    pass       is there a right one among them (pass@k: Chen et al., arXiv:2107.03374)? No way of choosing can do better
    majority   the answer that most of them give, ties by lot (self-consistency)
    random     one of them by lot
    a model    the one that it prefers
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ramet.benchmarks.evaluation.statistics import clustered_mean
from ramet.errors import ConfigError, TaskError
from ramet.rewards.video.best_of_n import CandidateAnswers, PairwiseSelector, ScoreSelector

NS = (1, 2, 4, 8, 16)
DRAWS = 16
"""How often N answers are drawn from those of a question."""
Picker = ScoreSelector | PairwiseSelector


def best_of_n(
    questions: Sequence[CandidateAnswers], pickers: dict[str, Picker], ns: Sequence[int] = NS, seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A `best_of_n` record for each N and method: accuracy with its interval over videos, and how often the model is called for one choice.

    Where N answers are all that there are, one draw is enough. Every question needs as many answers as the largest N. A question
    whose video cannot be read is left out for every method and counted as `unreadable`; where none is left, the `TaskError` is raised.
    """
    fewest = min((len(q.answers) for q in questions), default=0)
    ns = [n for n in ns if n <= fewest]
    if not ns:
        raise ConfigError(f"best of n needs answers: a question has {fewest}")
    methods = ("pass", "majority", "random", *pickers)
    accuracies: dict[tuple[int, str], list[float]] = {(n, m): [] for n in ns for m in methods}
    watched: list[CandidateAnswers] = []
    fault: TaskError | None = None
    for question in questions:
        try:
            of_question = {(n, m): value for n in ns for m, value in _accuracies(question, pickers, n, seed).items()}
        except TaskError as error:
            fault = error
        else:
            watched.append(question)
            for case, value in of_question.items():
                accuracies[case].append(value)
        if report is not None:
            report(1)
    if fault is not None and not watched:
        raise fault
    records = []
    for (n, method), values in accuracies.items():
        interval = clustered_mean(values, [q.cluster for q in watched])
        record: dict[str, Any] = {
            "record": "best_of_n", "n": n, "method": method, "questions": len(watched),
            "unreadable": len(questions) - len(watched), "accuracy": interval.mean, "ci_low": interval.low, "ci_high": interval.high,
        }  # fmt: skip
        if method in pickers:
            record["calls_per_question"] = pickers[method].cost(n)
        records.append(record)
    return records


def _accuracies(question: CandidateAnswers, pickers: dict[str, Picker], n: int, seed: int) -> dict[str, float]:
    """The accuracy of each method on one question, averaged over draws of `n` of its answers."""
    rng = random.Random(f"best/{seed}/{question.id}/{n}")
    scores: dict[str, list[float]] = {m: [] for m in ("pass", "majority", "random", *pickers)}
    for draw in [rng.sample(range(len(question.answers)), n) for _ in range(DRAWS if n < len(question.answers) else 1)]:
        right = [question.right[i] for i in draw]
        scores["pass"].append(float(any(right)))
        scores["random"].append(sum(right) / n)
        counts = Counter(question.stated[i] for i in draw if question.stated[i] is not None)
        top = [s for s, c in counts.items() if c == max(counts.values())]
        won = [question.right[next(i for i in draw if question.stated[i] == s)] for s in top]
        scores["majority"].append(sum(won) / len(won) if won else 0.0)
        for name, picker in pickers.items():
            scores[name].append(float(question.right[picker(question, draw)]))
    return {m: sum(values) / len(values) for m, values in scores.items()}
