"""Mathematics: GSM8K, MATH, AIME and AMC, in the data sets' own formats, graded by equivalence."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from ramet.agents.protocol import last_boxed
from ramet.agents.tree import Message, Task
from ramet.data import Model, NonEmptyText, Row, parsed
from ramet.env.questions import Questions, normalised
from ramet.env.settings import DataSettings, words
from ramet.errors import TaskError
from ramet.rewards.maths import canonical, math_match, parse_reference, squeezed

FIELDS: Mapping[str, Mapping[str, str]] = {
    "gsm8k": {},
    "math": {"question": "problem", "answer": "solution"},
    "aime": {"question": "problem"},
    "amc": {"question": "problem"},
}
"""The columns in which each data set has the question and the answer, if named differently."""
_THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?%?")


def _level(value: object) -> int:
    """The level of difficulty that a value such as 5 or "Level 5" states; 0 for "Level ?"."""
    match = re.fullmatch(r"(?:level\s*)?(\d+|\?)(?:\.0)?", str(value).strip(), re.IGNORECASE)
    if match is None or isinstance(value, bool):
        raise ValueError("should be a level, such as 5 or Level 5")
    return 0 if match[1] == "?" else int(match[1])


def _year(value: object) -> int:
    """The one year that a value contains."""
    years = set(re.findall(r"(?<!\d)(?:19|20)\d\d(?!\d)", str(value)))
    if len(years) != 1 or not isinstance(value, (int, float, str)):
        raise ValueError("should be a year, or text that contains one")
    return int(years.pop())


class _Question(BaseModel):
    question: NonEmptyText


class _Level(BaseModel):
    level: Annotated[int, BeforeValidator(_level)]
    """0 if the data set itself does not know."""


class _Year(BaseModel):
    year: Annotated[int, BeforeValidator(_year)]


class _Solved(_Question):
    answer: NonEmptyText


@dataclass(frozen=True)
class MathsEnvironment(Questions):
    """Mathematical questions with one answer.

    levels      the levels of MATH to use (5 is the hard split); empty: all
    last_year   the last year of AIME to train on; later years are measured. None: no split by year
    """

    levels: tuple[int, ...] = ()
    last_year: int | None = None
    metrics = ("accuracy",)
    columns: ClassVar[tuple[str, ...]] = ("question", "answer", "level", "year")

    def wanted(self, row: Row, split: str, where: str) -> bool:
        """Whether the row's level and year belong to the split."""
        if self.levels and self._read(_Level, row, where).level not in self.levels:
            return False
        return self.last_year is None or (self._read(_Year, row, where).year <= self.last_year) == (split == "train")

    def question(self, row: Row, split: str, where: str) -> str:
        """The question without differences in typesetting."""
        return _typeset_alike(self._read(_Question, row, where).question)

    def content(self, row: Row, split: str, where: str) -> Hashable:
        """The question without differences in typesetting, and the canonical answer."""
        solved = self._read(_Solved, row, where)
        return _typeset_alike(solved.question), canonical(final_answer(solved.answer, where))

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        """The task of one row, whose reference is the final answer of its solution."""
        solved = self._read(_Solved, row, where)
        answer = final_answer(solved.answer, where)
        parse_reference(answer, where)
        levelled = (self.name == "math" and self._column("level", row) in row) or "level" in self.fields or self.levels
        size = self._read(_Level, row, where).level if levelled else 0
        return Task(task_id, (Message("user", solved.question),), {}, answer, {"size": size})

    def _read(self, model: type[Model], row: Row, where: str) -> Model:
        return parsed(model, row, {name: self._column(name, row) for name in model.model_fields}, where)

    def _column(self, name: str, row: Row) -> str:
        """The column by the field map, or else the data set's own name, capitalised as in some copies if need be."""
        own = FIELDS.get(self.name, {}).get(name, name)
        return self.fields.get(name) or (own.capitalize() if own not in row and own.capitalize() in row else own)

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """1.0 if the answer is mathematically equal to the reference, otherwise 0.0."""
        return math_match(task, answer)

    def canonical(self, answer: str) -> str:
        """The canonical form of the answer's value."""
        return canonical(answer)

    def size(self, task: Task) -> int:
        """The level of difficulty; 0 if there is none."""
        return int(task.meta["size"])


class MathsSettings(DataSettings):
    """Mathematics with one answer."""

    kind: Literal["gsm8k", "math", "aime", "amc"]
    """Which data set; it determines how rows are read."""
    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = ()
    """The levels of MATH to use (5 is the hard split); empty: all."""
    last_year: int | None = None
    """The last year of AIME to train on; later years are measured. By default there is no split by year."""

    def build(self, count: Callable[[str], int] = words) -> MathsEnvironment:
        """The environment; `count` is not used."""
        return MathsEnvironment(self.sources, self.fields, self.kind, self.allow_overlap, self.levels, self.last_year)


def _typeset_alike(question: str) -> str:
    """A form that is equal for questions that differ only in what `normalised` removes and in how their formulas are typeset."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", normalised(squeezed(question)))


def final_answer(solution: str, where: str = "the row") -> str:
    """The answer in a reference solution: after `####`, in the last box, or the whole of a one-line text, without thousands separators.

    Raises `TaskError` if there is none or if it is empty.
    """
    _, marker, after = solution.rpartition("####")
    boxed = last_boxed(solution)
    if not marker and boxed is None and "\n" in solution:
        raise TaskError(f"{where}: its solution has neither `####` nor a box; name the column of the answer in env.fields")
    answer = (after if marker else solution if boxed is None else boxed).strip()
    if not answer.strip("$\\{}()[]., "):
        raise TaskError(f"{where}: its solution ends in an empty answer ({answer!r}); correct the row or leave it out")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
