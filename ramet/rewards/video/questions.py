"""Questions about videos whose answers can be checked by rule, and what counts as a right answer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramet.agents.protocol import extract_answer
from ramet.agents.tree import Segment
from ramet.data import Row, load_rows, text, texts
from ramet.data import field as field_of
from ramet.errors import TaskError
from ramet.rewards.f1 import normalise
from ramet.rewards.maths import number
from ramet.rewards.video.pairs import video_of_row

_LETTER = re.compile(r"\(?([A-Z])\)?[.:)]?(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True)
class VideoQuestion:
    """A question with its right answer; `choices` are empty where it is open.

    evidence  the part of the video that answers, where that is known: what a reward model is shown of a long one
    """

    id: str
    video: Segment
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    category: str = ""
    evidence: Segment | None = None

    @property
    def shown(self) -> Segment:
        """What a reward model is shown."""
        return self.evidence or self.video

    def stated(self, response: str) -> str | None:
        """What a response says in the end, in one spelling: a choice, a number, or plain words. None where it says nothing."""
        said = extract_answer(response)
        if said is None:
            return None
        for alike in (_exact, number):
            meant = [c for c in self.choices if alike(c) is not None and alike(c) == alike(said)]
            if meant:
                return meant[0]
        plain = {_plain(c): c for c in self.choices}
        if len(plain) == len(self.choices) and _plain(said) in plain and number(said) is None:
            return plain[_plain(said)]
        letter = _LETTER.fullmatch(said.strip())
        if letter and self.choices and ord(letter[1]) - ord("A") < len(self.choices):
            choice = self.choices[ord(letter[1]) - ord("A")]
            if not letter[2] or _plain(letter[2]) == _plain(choice):
                return choice
        value = number(said)
        return _plain(said) if value is None else str(value)

    def right(self, response: str) -> bool:
        """Does the response end in the right answer?"""
        said = self.stated(response)
        return said is not None and said == self.stated(f"Answer: {self.answer}")


def _exact(said: str) -> str:
    return " ".join(said.casefold().split()).removesuffix(".")


def _plain(said: str) -> str:
    return normalise(said) or said.strip().casefold()


def load_questions(source: str, fields: Mapping[str, str] | None = None, videos: Path | None = None) -> list[VideoQuestion]:
    """Rows with `id, video, question, answer` and perhaps `choices, category, start, end`. Raises `TaskError`, naming the row."""
    names, root = dict(fields or {}), videos or Path(source).parent
    found = [question_of(row, names, root, f"{source}, row {n}") for n, row in enumerate(load_rows(source), 1)]
    ids = [question.id for question in found]
    if len(set(ids)) < len(ids):
        raise TaskError(f"{source} has the id {next(i for i in ids if ids.count(i) > 1)!r} more than once")
    return found


def question_of(row: Row, fields: Mapping[str, str], root: Path, where: str) -> VideoQuestion:
    """One row's. Raises `TaskError`."""

    def optional(name: str, default: Any) -> Any:
        return field_of(row, name, fields, where, ... if name in fields else default)

    def label(name: str) -> str:
        value = optional(name, None)
        return "" if value in (None, "") else text(value, name, where)

    video = video_of_row(row, fields, root, where)
    if not isinstance(video, Segment):
        raise TaskError(f"{where} names no video, or several; a question is about one")
    choices = tuple(texts(optional("choices", []) or [], "choices", where))
    question = VideoQuestion(
        label("id") or where.rpartition(" ")[2],
        video,
        text(field_of(row, "question", fields, where), "question", where),
        text(field_of(row, "answer", fields, where), "answer", where),
        choices,
        label("category"),
        _evidence(video, optional("evidence", None), where),
    )
    if choices and question.stated(f"Answer: {question.answer}") not in choices:
        raise TaskError(f"{where}: its answer {question.answer!r} is none of its choices")
    return question


def _evidence(video: Segment, span: Any, where: str) -> Segment | None:
    if span is None:
        return None
    numbers = isinstance(span, list) and len(span) == 2 and all(isinstance(n, (int, float)) and math.isfinite(n) for n in span)
    if not numbers or not 0 <= span[0] < span[1]:
        raise TaskError(f"{where}: its evidence is {str(span)[:40]}, not two seconds, the earlier first")
    return Segment(video.file, float(span[0]), float(span[1]))
