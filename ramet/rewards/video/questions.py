"""Questions about videos with answers that can be checked by rule."""

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
    """A question about a video, with its right answer.

    video     the video, or the part of it, that the question is about
    choices   the possible answers; empty for an open question
    evidence  the part of the video that contains the answer, where it is known; a reward model is shown this part of a long video
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
        """The part of the video that a reward model is shown."""
        return self.evidence or self.video

    def stated(self, response: str) -> str | None:
        """The final answer of a response in canonical form: one of the choices, a number, or normalised words. None if there is none.

        A choice may be given in full, as an equal number, or by its letter (A for the first), with or without its text.
        """
        answer = extract_answer(response)
        if answer is None:
            return None
        for canonical in (_exact, number):
            equal = [c for c in self.choices if canonical(c) is not None and canonical(c) == canonical(answer)]
            if equal:
                return equal[0]
        plain = {_plain(c): c for c in self.choices}
        if len(plain) == len(self.choices) and _plain(answer) in plain and number(answer) is None:
            return plain[_plain(answer)]
        letter = _LETTER.fullmatch(answer.strip())
        if letter and self.choices and ord(letter[1]) - ord("A") < len(self.choices):
            choice = self.choices[ord(letter[1]) - ord("A")]
            if not letter[2] or _plain(letter[2]) == _plain(choice):
                return choice
        value = number(answer)
        return _plain(answer) if value is None else str(value)

    def right(self, response: str) -> bool:
        """Whether the final answer of a response is the right one."""
        stated = self.stated(response)
        return stated is not None and stated == self.stated(f"Answer: {self.answer}")


def _exact(answer: str) -> str:
    """An answer without regard to case, whitespace and a final full stop."""
    return " ".join(answer.casefold().split()).removesuffix(".")


def _plain(answer: str) -> str:
    """An answer normalised as in `rewards.f1`, or only without regard to case where that leaves nothing."""
    return normalise(answer) or answer.strip().casefold()


def load_questions(source: str, fields: Mapping[str, str] | None = None, videos: Path | None = None) -> list[VideoQuestion]:
    """Load the questions of a file, with columns `video, question, answer` and optionally `id, choices, category, start, end, evidence`.

    fields  maps these names to the file's columns
    videos  the folder of the videos, by default that of the file

    Raises `TaskError`, naming the row, for values that are missing, of the wrong type or inconsistent, and for an id that occurs twice.
    """
    names, root = dict(fields or {}), videos or Path(source).parent
    questions = [question_of(row, names, root, f"{source}, row {n}") for n, row in enumerate(load_rows(source), 1)]
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        raise TaskError(f"{source} has the id {next(i for i in ids if ids.count(i) > 1)!r} more than once")
    return questions


def question_of(row: Row, fields: Mapping[str, str], root: Path, where: str) -> VideoQuestion:
    """The question of one row. `where` names the row in the messages of `TaskError`; see `load_questions`."""

    def optional(name: str, default: Any) -> Any:
        return field_of(row, name, fields, where, ... if name in fields else default)

    def label(name: str) -> str:
        value = optional(name, None)
        return "" if value in (None, "") else text(value, name, where)

    video = video_of_row(row, fields, root, where)
    if not isinstance(video, Segment):
        raise TaskError(f"{where} must name exactly one video")
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
        raise TaskError(f"{where}: its answer {question.answer!r} is not among its choices")
    return question


def _evidence(video: Segment, span: Any, where: str) -> Segment | None:
    """The part of a video's file between two times in seconds; None for no times. Raises `TaskError` for anything else."""
    if span is None:
        return None
    numbers = isinstance(span, list) and len(span) == 2 and all(isinstance(n, (int, float)) and math.isfinite(n) for n in span)
    if not numbers or not 0 <= span[0] < span[1]:
        raise TaskError(f"{where}: its evidence must be a start and a later end, in seconds (got {str(span)[:40]})")
    return Segment(video.file, float(span[0]), float(span[1]))
