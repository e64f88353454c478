"""Scores for integer answers: exact match, and the graded score of the SELFCEST release.

Both read the answer that the branch stated, not its reasoning. Neither can divide by zero, overflow or evaluate a model's text.
"""

from __future__ import annotations

import math
import re

from ramet.agents.tree import Task
from ramet.errors import TaskError

_INTEGER = re.compile(r"-?\d+")
_STATED = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")
MAX_DIGITS = 400


def reference_integer(task: Task) -> int:
    """The task's reference answer. Raises `TaskError` if it is not an integer."""
    if isinstance(task.reference, bool) or not isinstance(task.reference, int):
        raise TaskError(f"task {task.id} has no integer reference answer; add one or choose another reward")
    return task.reference


def stated_integer(answer: str | None) -> int | None:
    """The integer that is the whole answer, apart from thousands separators and a final full stop; else None."""
    if answer is None:
        return None
    text = answer.strip().removesuffix(".").replace("\u2212", "-")
    return int(text.replace(",", "")) if _STATED.fullmatch(text) and len(text) <= MAX_DIGITS else None


def canonical_integer(answer: str) -> str:
    """The stated integer in plain digits, or the stripped answer if it is not an integer."""
    value = stated_integer(answer)
    return answer.strip() if value is None else str(value)


def integer_match(task: Task, answer: str | None) -> float:
    """1.0 if the stated answer is the reference integer, else 0.0."""
    return float(stated_integer(answer) == reference_integer(task))


def graded_integer(task: Task, answer: str | None) -> float:
    """The graded score in [0, 1] of the SELFCEST release (General learned delegation by clones, Li et al. 2026, arXiv 2602.13262).

    With A the last integer in the answer and B the reference answer: 1 if they are equal, else
    0.2 / log2(2 + |A - B| / sqrt(|2 + max(A, B)|)). Without an integer: 0.1 if the reference answer is a substring, else 0. Unlike in the
    release, the root is taken of at least 1, since it divides by zero for max(A, B) = -2, and the logarithm is computed from exact
    integers, since it overflows. Raises `TaskError` for a task without an integer reference answer.
    """
    target = reference_integer(task)
    if answer is None:
        return 0.0
    integers = _INTEGER.findall(answer)
    if not integers:
        return 0.1 if str(target) in answer else 0.0
    if len(integers[-1]) > MAX_DIGITS:
        return 0.0
    value = int(integers[-1])
    if value == target:
        return 1.0
    scale = max(abs(2 + max(value, target)), 1)
    if scale.bit_length() > 1000 or abs(value - target).bit_length() > 1000:
        log2 = math.log2(abs(value - target)) - math.log2(scale) / 2
        return 0.2 / max(log2, 1.0)
    return 0.2 / math.log2(2 + abs(value - target) / math.sqrt(scale))
