"""Mathematics: GSM8K, MATH, AIME and AMC, in the data sets' own formats, graded by equivalence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ramet.agents.protocol import last_boxed
from ramet.agents.tree import Message, Task
from ramet.data import Row, field, text
from ramet.env.questions import Questions
from ramet.errors import TaskError
from ramet.rewards.maths import canonical, math_match, parse_reference

FIELDS: Mapping[str, Mapping[str, str]] = {
    "gsm8k": {},
    "math": {"question": "problem", "answer": "solution"},
    "aime": {"question": "problem", "year": "year"},
    "amc": {"question": "problem"},
}
"""Where each set keeps question and answer."""


@dataclass(frozen=True)
class MathsEnvironment(Questions):
    """Questions with one answer.

    levels      of MATH: those that are wanted (5 is the hard split); empty: all
    last_year   of AIME: the last year of training; later ones are measured. None: no split by year
    """

    levels: tuple[int, ...] = ()
    last_year: int | None = None
    metrics = ("accuracy",)

    def wanted(self, row: Row, split: str) -> bool:
        if self.levels and _digits(row.get("level")) not in self.levels:
            return False
        if self.last_year is None:
            return True
        year = _digits(field(row, "year", self._fields, f"a row of {self.name}"))
        return year is not None and (year <= self.last_year) == (split == "train")

    @property
    def _fields(self) -> Mapping[str, str]:
        return {**FIELDS.get(self.name, {}), **self.fields}

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        question = text(_either(row, "question", self._fields, where), "question", where)
        answer = final_answer(text(_either(row, "answer", self._fields, where), "answer", where), where)
        parse_reference(answer, where)
        return Task(task_id, (Message("user", question),), {}, answer, {"size": _digits(row.get("level")) or 0})

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return math_match(task, answer)

    def canonical(self, answer: str) -> str:
        return canonical(answer)

    def size(self, task: Task) -> int:
        return int(task.meta["size"])


def _either(row: Row, name: str, fields: Mapping[str, str], where: str) -> Any:
    """By the field map, or with a capital as some copies of AIME have it."""
    other = {name: fields.get(name, name).capitalize()}
    return field(row, name, fields, where) if field(row, name, fields, where, None) is not None else field(row, name, other, where)


def _digits(value: object) -> int | None:
    found = re.search(r"\d+", str(value))
    return int(found.group()) if found else None


def final_answer(solution: str, where: str = "the row") -> str:
    """The answer in a reference solution: after `####`, in the last box, or all of a text of one line."""
    _, marker, after = solution.rpartition("####")
    boxed = last_boxed(solution)
    if marker:
        return after.strip().replace(",", "")
    if boxed is not None:
        return boxed.strip()
    if "\n" in solution:
        raise TaskError(f"{where}: its solution has neither `####` nor a box")
    return solution
