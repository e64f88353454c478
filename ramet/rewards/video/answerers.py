"""Where answers to questions about videos come from, besides models: a script for clips drawn here, and files."""

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

ASKED = "Think step by step, briefly, about what the video shows. End with a line `Answer: ...`."
PHRASES = (
    "Answer: {}",
    "I look at the frames.\nAnswer: {}",
    "The frames show it well.\nAnswer: {}",
    "Let me see what is there first.\nAnswer: {}",
)


@dataclass(frozen=True)
class Guesser:
    """Writes an answer that is right with the probability `skill`, else any other choice. A script, and no model: it sees nothing."""

    skill: float = 0.5
    name: str = "guesser"

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        answers = []
        for question in questions:
            if not question.choices:
                raise TaskError(f"question {question.id} has no choices to guess among")
            rng = random.Random(f"{self.name}/{seed}/{question.id}/{blind}")
            stated = question.stated(f"Answer: {question.answer}")
            wrong = [c for c in question.choices if c != stated]
            skill = 1 / len(question.choices) if blind else self.skill
            said = [str(stated) if rng.random() < skill else rng.choice(wrong) for _ in range(n)]
            answers.append([rng.choice(PHRASES).format(s) for s in said])
        return answers


class ModelAnswerer:
    """A vision-language model that thinks and answers."""

    def __init__(self, model: VideoGRM, name: str):
        self.model, self.name = model, name

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        messages = []
        for question in questions:
            choices = f"\nChoices: {', '.join(question.choices)}" if question.choices else ""
            messages.append(Message("user", f"{question.question}{choices}\n{ASKED}", () if blind else (question.video,)))
        return self.model.generate(messages, [f"{self.name}/{q.id}/{blind}" for q in questions], n, seed)


class _Recorded(BaseModel):
    id: NonEmptyText
    response: NonEmptyText
    blind: Flag = False


class RecordedAnswers:
    """Answers that somebody sampled already: rows with `id` (of the question) and `response`, and perhaps `source`, `blind`."""

    def __init__(self, source: str, fields: Mapping[str, str] | None = None):
        names = dict(fields or {})
        self.name = source.rpartition("/")[2]
        self._answers: dict[tuple[str, bool], list[str]] = {}
        for number, row in enumerate(load_rows(source), 1):
            said = parsed(_Recorded, row, names, f"{source}, row {number}")
            self._answers.setdefault((said.id, said.blind), []).append(said.response)

    def answer(self, questions: Sequence[VideoQuestion], n: int, seed: int, blind: bool = False) -> list[list[str]]:
        """The first `n` of each question, or as many as there are; a question without any is an error."""
        missing = [q.id for q in questions if (q.id, blind) not in self._answers]
        if missing and not blind:
            raise TaskError(f"{self.name} has no answers to {len(missing)} questions, such as {missing[0]}")
        return [self._answers.get((q.id, blind), [""])[:n] for q in questions]
