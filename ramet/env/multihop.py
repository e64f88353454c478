"""Multi-hop questions over documents: HotpotQA (distractor), 2WikiMultihopQA, MuSiQue (answerable).

A document's key is its title. The root reads all documents, or their titles only; every method that an environment is
measured with reads the same. Contexts can be made longer: documents of other questions are added up to a number of
tokens, and the supporting ones put at the beginning, in the middle, at the end, or anywhere.
"""

from __future__ import annotations

import html
import random
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from ramet.agents.context import ContextStore
from ramet.agents.tree import Message, Segment, Task
from ramet.data import Flag, Row, Said, listed, load_rows, parsed
from ramet.env.instructions import DELEGATE, DIRECT
from ramet.env.questions import Questions, normalised
from ramet.env.settings import DataSettings, words
from ramet.errors import TaskError
from ramet.rewards.f1 import exact_match, f1, normalise, references

Metric = Literal["em", "f1"]
Gold = Literal["as is", "start", "middle", "end", "random"]


class _Question(BaseModel):
    question: Said


class _Answerable(BaseModel):
    answerable: Flag = True


class _Passage(BaseModel):
    title: Said
    sentences: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Fact(BaseModel):
    title: Said


class _Paragraph(BaseModel):
    title: Said
    paragraph_text: str
    is_supporting: Flag = False


class _Documents(BaseModel):
    """Of HotpotQA and 2WikiMultihopQA `context` and `supporting_facts`; of MuSiQue `paragraphs`."""

    context: Annotated[list[_Passage] | None, BeforeValidator(listed("title", "sentences"))] = None
    supporting_facts: Annotated[list[_Fact] | None, BeforeValidator(listed("title", "sent_id"))] = None
    paragraphs: Annotated[list[_Paragraph] | None, BeforeValidator(listed("title", "paragraph_text", "is_supporting"))] = None


class _Asked(_Question):
    answer: Said
    answer_aliases: list[Said] | None = None
    question_decomposition: Annotated[list[Any] | None, BeforeValidator(listed("question", "answer"))] = None


@dataclass(frozen=True)
class MultihopEnvironment(Questions):
    """Questions whose answer takes several documents.

    metric     what `grade` gives unless asked for the other: exact match or F1
    show       what the root reads: every document, or titles only
    only_gold  leave out the documents that do not support the answer
    tokens     lengthen contexts to about this many tokens; None: as they are
    ood_tokens the same for the split "ood"
    gold_position  where the supporting documents stand
    count      tokens of a text
    """

    metric: Metric = "em"
    show: Literal["documents", "titles"] = "documents"
    only_gold: bool = False
    tokens: int | None = None
    ood_tokens: int | None = None
    gold_position: Gold = "as is"
    count: Callable[[str], int] = words
    columns: ClassVar[tuple[str, ...]] = tuple(name for model in (_Asked, _Answerable, _Documents) for name in model.model_fields)

    def wanted(self, row: Row, split: str, where: str) -> bool:
        return parsed(_Answerable, row, self.fields, where).answerable

    def question(self, row: Row, split: str, where: str) -> str:
        return normalised(parsed(_Question, row, self.fields, where).question)

    def content(self, row: Row, split: str, where: str) -> Hashable:
        asked = parsed(_Asked, row, self.fields, where)
        found, supporting = documents(row, self.fields, where)
        read = frozenset((folded(key), normalised(value)) for key, value in found.items() if key in supporting or not supporting)
        return normalised(asked.question), normalised(asked.answer), read

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        asked = parsed(_Asked, row, self.fields, where)
        found, supporting = documents(row, self.fields, where)
        if not supporting and (self.only_gold or self.gold_position in ("start", "middle", "end")):
            raise TaskError(
                f"{where} names no supporting documents, which env.only_gold and env.gold_position need; name their column in env.fields"
            )
        tokens = self.ood_tokens if split in ("ood", "tune_ood") else self.tokens
        chosen = self._arranged(found, supporting, split, tokens, random.Random(f"{task_id}/{tokens}/{self.gold_position}"))
        gold = tuple(key for key in chosen if key in supporting)
        meta = {"size": len(asked.question_decomposition or gold), "supporting": gold, "question": asked.question}
        answers = (asked.answer, *(asked.answer_aliases or ()))
        return Task(task_id, (Message("user", self._prompt(asked.question, chosen)),), chosen, answers, meta)

    def _arranged(
        self, found: Mapping[str, str], supporting: set[str], split: str, tokens: int | None, rng: random.Random
    ) -> dict[str, str]:
        gold = [key for key in found if key in supporting]
        others = [] if self.only_gold else [key for key in found if key not in supporting]
        chosen = {key: found[key] for key in found if key in gold or key in others}
        if tokens is not None:
            length = sum(self.count(f"{key}: {value}\n") for key, value in chosen.items())
            taken = {folded(key) for key in found}
            for key, value in self._strangers(split, rng):
                size = self.count(f"{key}: {value}\n")
                if length + size > tokens:
                    break
                if folded(key) not in taken:
                    taken.add(folded(key))
                    chosen[key], length = value, length + size
                    others.append(key)
            rng.shuffle(others)
        elif self.gold_position == "as is":
            return chosen
        rng.shuffle(gold)
        at = {"start": 0, "middle": len(others) // 2, "end": len(others)}.get(self.gold_position)
        order = [*others[:at], *gold, *others[at:]] if at is not None else rng.sample([*others, *gold], len(others) + len(gold))
        return {key: chosen[key] for key in order}

    def _strangers(self, split: str, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Documents of other rows, row after row in a seeded order."""
        rows = load_rows(self.source(split))
        for index in rng.sample(range(len(rows)), len(rows)):
            yield from documents(rows[index], self.fields, f"{self.source(split)}, row {index + 1}")[0].items()

    def _prompt(self, question: str, chosen: Mapping[str, str | Segment]) -> str:
        if self.show == "titles":
            return "Documents, by title:\n" + "\n".join(f"- {key}" for key in chosen) + f"\n\nQuestion: {question}"
        return f"Documents:\n{ContextStore(chosen).render(chosen)}\n\nQuestion: {question}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("em", "f1") if self.metric == "em" else ("f1", "em")

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        if not normalise(answer or ""):
            # Nothing is left of it by the sets' rules, nor of a reference such as "The": silence would be right.
            said = _plain(answer or "")
            return float(said != "" and said in map(_plain, references(task)))
        return exact_match(task, answer) if (metric or self.metric) == "em" else f1(task, answer, verdicts=self.name != "musique")

    def canonical(self, answer: str) -> str:
        return normalise(answer) or _plain(answer)

    def size(self, task: Task) -> int:
        return int(task.meta["size"])

    def with_documents(self, task: Task, keys: Sequence[str]) -> Task:
        """The same question over some of its documents, which are shown: for methods that retrieve."""
        chosen = {key: task.documents[key] for key in keys}
        return replace(task, messages=(Message("user", replace(self, show="documents")._prompt(task.meta["question"], chosen)),))


_Tokens = Annotated[int, Field(ge=1)]


class MultihopSettings(DataSettings):
    """Questions whose answer takes several documents."""

    kind: Literal["hotpotqa", "2wikimultihopqa", "musique"]
    """Which data set; it says how rows are read."""
    metric: Metric = "em"
    """What a score is: exact match or F1."""
    show: Literal["documents", "titles"] = "documents"
    """What the root reads: every document, or titles only."""
    only_gold: bool = False
    """Leave out the documents that do not support the answer."""
    tokens: _Tokens | None = None
    """Lengthen contexts to about this many tokens with documents of other questions; without: as they are."""
    ood_tokens: _Tokens | None = None
    """The same out of distribution; without `ood`, of the rows of `data`."""
    gold_position: Gold = "as is"
    """Where the supporting documents stand."""

    multihop: ClassVar[bool] = True

    @property
    def sources(self) -> dict[str, str]:
        return super().sources | {"ood": self.ood or (self.data if self.ood_tokens else "")}

    def instruction(self, spawn: bool) -> str:
        return DELEGATE if spawn else DIRECT

    def build(self, count: Callable[[str], int] = words) -> MultihopEnvironment:
        return MultihopEnvironment(
            self.sources, self.fields, self.kind, self.allow_overlap, self.metric, self.show, self.only_gold, self.tokens,
            self.ood_tokens, self.gold_position, count,
        )  # fmt: skip


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())


def folded(title: str) -> str:
    """The same for titles that differ in nothing but Unicode form, HTML entities, case and spaces."""
    return " ".join(unicodedata.normalize("NFC", html.unescape(title)).casefold().split())


def documents(row: Row, fields: Mapping[str, str], where: str) -> tuple[dict[str, str], set[str]]:
    """(text by title, titles that support the answer) of a row in any of the three sets' formats. Texts of one title are joined.

    Raises `TaskError` where a row has no documents, or where what supports its answer is none of them.
    """
    read = parsed(_Documents, row, fields, where)
    if read.paragraphs is not None:
        pairs = [(p.title, p.paragraph_text) for p in read.paragraphs]
        needed = [p.title for p in read.paragraphs if p.is_supporting]
    else:
        pairs = [(passage.title, " ".join(s.strip() for s in passage.sentences)) for passage in read.context or ()]
        needed = [fact.title for fact in read.supporting_facts or ()]
    if not pairs:
        raise TaskError(f"{where} has no documents: neither `context` nor `paragraphs`; it has {', '.join(map(str, row))}")
    joined: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for title, body in pairs:
        key = spelled.setdefault(folded(title), title)
        joined[key] = f"{joined[key]} {body}" if key in joined else body
    lost = next((title for title in needed if folded(title) not in spelled), None)
    if lost is not None:
        raise TaskError(f"{where}: {lost!r}, which supports its answer, is none of its documents; mend the row or leave it out")
    return joined, {spelled[folded(title)] for title in needed}
