"""Sources of answers to questions about videos: a scripted guesser for synthetic clips, a vision-language model, and recorded answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from ramet.agents.tree import Message
from ramet.data import Flag, NonEmptyText, load_rows, parsed
from ramet.errors import TaskError
from ramet.rewards.video.generative import VideoGRM
from ramet.rewards.video.questions import VideoQuestion

INSTRUCTION = "Think step by step, briefly, about what the video shows. End with a line `Answer: ...`."
"""Follows every question to a model."""
PHRASES = (
    "Answer: {}",
    "I look at the frames.\nAnswer: {}",
    "The frames show it well.\nAnswer: {}",
    "Let me see what is there first.\nAnswer: {}",
)


@dataclass(frozen=True)
class Guesser:
    """A script that answers rightly with probability `skill`, and else with a random wrong choice. It does not look at the video."""

    skill: float = 0.5
    name: str = "guesser"

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        """See `Answerer`. Blind answers are right by chance only. Raises `TaskError` for a question without choices."""
        answers = []
        for question in questions:
            if not question.choices:
                raise TaskError(f"question {question.id} has no choices to guess among")
            rng = random.Random(f"{self.name}/{seed}/{question.id}/{blind}")
            stated = question.stated(f"Answer: {question.answer}")
            wrong = [c for c in question.choices if c != stated]
            skill = 1 / len(question.choices) if blind else self.skill
            choices = [str(stated) if rng.random() < skill else rng.choice(wrong) for _ in range(n)]
            answers.append([rng.choice(PHRASES).format(choice) for choice in choices])
        return answers


class ModelAnswerer:
    """A vision-language model that reasons and answers. The sampling settings are the model's."""

    def __init__(self, model: VideoGRM, name: str):
        self.model, self.name = model, name

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        """See `Answerer`. Raises what `VideoGRM.sample` raises."""
        messages = []
        for question in questions:
            choices = f"\nChoices: {', '.join(question.choices)}" if question.choices else ""
            messages.append(Message("user", f"{question.question}{choices}\n{INSTRUCTION}", () if blind else (question.video,)))
        return self.model.generate(messages, [f"{self.name}/{q.id}/{blind}" for q in questions], n, seed)


class _Recorded(BaseModel):
    id: NonEmptyText
    response: NonEmptyText
    blind: Flag = False


class RecordedAnswers:
    """Answers from a file: rows with the question's `id` and a `response`, and optionally `blind`, for answers without the video.

    source  the file
    fields  maps these names to the file's columns

    Raises `TaskError`, naming the row, for a value that is missing or of the wrong type.
    """

    def __init__(self, source: str, fields: Mapping[str, str] | None = None):
        names = dict(fields or {})
        self.name = source.rpartition("/")[2]
        self._answers: dict[tuple[str, bool], list[str]] = {}
        for number, row in enumerate(load_rows(source), 1):
            recorded = parsed(_Recorded, row, names, f"{source}, row {number}")
            self._answers.setdefault((recorded.id, recorded.blind), []).append(recorded.response)

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        """The first `n` answers to each question, or as many as there are.

        Raises `TaskError` for a question without answers. Without blind answers, a question gets one empty blind answer.
        """
        missing = [q.id for q in questions if (q.id, blind) not in self._answers]
        if missing and not blind:
            raise TaskError(f"{self.name} has no answers to {len(missing)} questions, for example to {missing[0]}")
        return [self._answers.get((q.id, blind), [""])[:n] for q in questions]
