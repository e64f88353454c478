"""Answers in words: exact match and F1 after SQuAD's normalisation, the best over aliases.

The rules are those of the official scorers of HotpotQA, 2WikiMultihopQA and MuSiQue: lower case, no punctuation, no
articles, single spaces. Where one side says yes, no or noanswer and the other does not, the HotpotQA and 2Wiki scorers give
no partial credit (`verdicts`); MuSiQue's does not make this exception. A reference that these rules reduce to nothing (`The`, `A`, `?`) is
matched only as it is written, and an empty answer matches nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ramet.agents.tree import Task
from ramet.errors import TaskError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
VERDICTS = ("yes", "no", "noanswer")


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation and articles removed, spaces single."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def references(task: Task) -> Sequence[str]:
    """The task's reference answers, aliases included. Raises `TaskError` if there is none."""
    answers = task.reference
    if not isinstance(answers, (tuple, list)) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise TaskError(f"task {task.id} has no reference answer in words; add one or choose another reward")
    return answers


def exact_match(task: Task, answer: str | None) -> float:
    """1.0 if the answer, normalised, is one of the references."""
    golds = references(task)
    return float(answer is not None and any(_same(answer, gold) for gold in golds))


def _same(answer: str, gold: str) -> bool:
    left = normalise(gold)
    return normalise(answer) == left if left else _plain(answer) == _plain(gold) != ""


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def f1(task: Task, answer: str | None, verdicts: bool = True) -> float:
    """The best token F1 over the references."""
    golds = references(task)
    return max(token_f1(answer or "", gold, verdicts) if normalise(gold) else float(_same(answer or "", gold)) for gold in golds)


def token_f1(answer: str, gold: str, verdicts: bool = True) -> float:
    """Harmonic mean of precision and recall of normalised tokens, as multisets."""
    ours, theirs = normalise(answer), normalise(gold)
    if verdicts and ours != theirs and (ours in VERDICTS or theirs in VERDICTS):
        return 0.0
    predicted, expected = ours.split(), theirs.split()
    if not predicted or not expected:
        return float(not verdicts and predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
