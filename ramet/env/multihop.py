"""Multi-hop questions over documents: HotpotQA (distractor), 2WikiMultihopQA, MuSiQue (answerable).

A document's key is its title. The root reads all documents or only their titles, and every method that is compared reads the same.
Contexts can be lengthened: documents of other questions are added up to a number of tokens, with the supporting documents at the
beginning, in the middle, at the end, or anywhere.
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
from ramet.data import Flag, NonEmptyText, Row, listed, load_rows, parsed
from ramet.env.instructions import DELEGATE, DIRECT
from ramet.env.questions import Questions, normalised
from ramet.env.settings import DataSettings, words
from ramet.errors import TaskError
from ramet.rewards.f1 import exact_match, f1, normalise, references

Metric = Literal["em", "f1"]
Gold = Literal["as is", "start", "middle", "end", "random"]


class _Question(BaseModel):
    question: NonEmptyText


class _Answerable(BaseModel):
    answerable: Flag = True


class _Passage(BaseModel):
    title: NonEmptyText
    sentences: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Fact(BaseModel):
    title: NonEmptyText


class _Paragraph(BaseModel):
    title: NonEmptyText
    paragraph_text: str
    is_supporting: Flag = False


class _Documents(BaseModel):
    """The documents of a row: `context` and `supporting_facts` in HotpotQA and 2WikiMultihopQA, `paragraphs` in MuSiQue."""

    context: Annotated[list[_Passage] | None, BeforeValidator(listed("title", "sentences"))] = None
    supporting_facts: Annotated[list[_Fact] | None, BeforeValidator(listed("title", "sent_id"))] = None
    paragraphs: Annotated[list[_Paragraph] | None, BeforeValidator(listed("title", "paragraph_text", "is_supporting"))] = None


class _Answered(_Question):
    answer: NonEmptyText
    answer_aliases: list[NonEmptyText] | None = None
    question_decomposition: Annotated[list[Any] | None, BeforeValidator(listed("question", "answer"))] = None


@dataclass(frozen=True)
class MultihopEnvironment(Questions):
    """Questions whose answer takes several documents.

    metric         the default metric of `grade`: exact match or F1
    show           what the root reads: all documents, or titles only
    only_gold      leave out the documents that do not support the answer
    tokens         lengthen contexts to about this many tokens; None: leave them as they are
    ood_tokens     the same for the split "ood"
    gold_position  where the supporting documents are placed
    count          counts the tokens of a text
    """

    metric: Metric = "em"
    show: Literal["documents", "titles"] = "documents"
    only_gold: bool = False
    tokens: int | None = None
    ood_tokens: int | None = None
    gold_position: Gold = "as is"
    count: Callable[[str], int] = words
    columns: ClassVar[tuple[str, ...]] = tuple(name for model in (_Answered, _Answerable, _Documents) for name in model.model_fields)

    def wanted(self, row: Row, split: str, where: str) -> bool:
        """Whether the question is answerable."""
        return parsed(_Answerable, row, self.fields, where).answerable

    def question(self, row: Row, split: str, where: str) -> str:
        """The normalised question."""
        return normalised(parsed(_Question, row, self.fields, where).question)

    def content(self, row: Row, split: str, where: str) -> Hashable:
        """The question, the answer and the supporting documents (all documents, if the row names none as supporting)."""
        answered = parsed(_Answered, row, self.fields, where)
        texts, supporting = documents(row, self.fields, where)
        relevant = frozenset((folded(key), normalised(text)) for key, text in texts.items() if key in supporting or not supporting)
        return normalised(answered.question), normalised(answered.answer), relevant

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        """The task of one row, with its documents and those added to lengthen it."""
        answered = parsed(_Answered, row, self.fields, where)
        texts, supporting = documents(row, self.fields, where)
        if not supporting and (self.only_gold or self.gold_position in ("start", "middle", "end")):
            raise TaskError(
                f"{where} names no supporting documents, which env.only_gold and env.gold_position need; name their column in env.fields"
            )
        tokens = self.ood_tokens if split in ("ood", "tune_ood") else self.tokens
        chosen = self._arranged(texts, supporting, split, tokens, random.Random(f"{task_id}/{tokens}/{self.gold_position}"))
        gold = tuple(key for key in chosen if key in supporting)
        meta = {"size": len(answered.question_decomposition or gold), "supporting": gold, "question": answered.question}
        answers = (answered.answer, *(answered.answer_aliases or ()))
        return Task(task_id, (Message("user", self._prompt(answered.question, chosen)),), chosen, answers, meta)

    def _arranged(
        self, texts: Mapping[str, str], supporting: set[str], split: str, tokens: int | None, rng: random.Random
    ) -> dict[str, str]:
        """The documents of a task by title, in the order in which they are shown, lengthened to about `tokens` if that is not None."""
        gold = [key for key in texts if key in supporting]
        others = [] if self.only_gold else [key for key in texts if key not in supporting]
        chosen = {key: texts[key] for key in texts if key in gold or key in others}
        if tokens is not None:
            length = sum(self.count(f"{key}: {value}\n") for key, value in chosen.items())
            titles = {folded(key) for key in texts}
            for key, value in self._other_documents(split, rng):
                size = self.count(f"{key}: {value}\n")
                if length + size > tokens:
                    break
                if folded(key) not in titles:
                    titles.add(folded(key))
                    chosen[key], length = value, length + size
                    others.append(key)
            rng.shuffle(others)
        elif self.gold_position == "as is":
            return chosen
        rng.shuffle(gold)
        at = {"start": 0, "middle": len(others) // 2, "end": len(others)}.get(self.gold_position)
        order = [*others[:at], *gold, *others[at:]] if at is not None else rng.sample([*others, *gold], len(others) + len(gold))
        return {key: chosen[key] for key in order}

    def _other_documents(self, split: str, rng: random.Random) -> Iterator[tuple[str, str]]:
        """(title, text) of the documents of all rows, row after row in a seeded order."""
        rows = load_rows(self.source(split))
        for index in rng.sample(range(len(rows)), len(rows)):
            yield from documents(rows[index], self.fields, f"{self.source(split)}, row {index + 1}")[0].items()

    def _prompt(self, question: str, chosen: Mapping[str, str | Segment]) -> str:
        """The text that the root reads: the documents or their titles, then the question."""
        if self.show == "titles":
            return "Documents, by title:\n" + "\n".join(f"- {key}" for key in chosen) + f"\n\nQuestion: {question}"
        return f"Documents:\n{ContextStore(chosen).render(chosen)}\n\nQuestion: {question}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Exact match and F1, the default metric first."""
        return ("em", "f1") if self.metric == "em" else ("f1", "em")

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        """Exact match or F1 with the reference or any of its aliases, by the normalisation of the data sets."""
        if not normalise(answer or ""):
            # The data sets' rules leave nothing of such an answer, nor of a reference such as "The": an empty answer would be right.
            plain = _plain(answer or "")
            return float(plain != "" and plain in map(_plain, references(task)))
        return exact_match(task, answer) if (metric or self.metric) == "em" else f1(task, answer, verdicts=self.name != "musique")

    def canonical(self, answer: str) -> str:
        """The answer normalised by the rules of the data sets."""
        return normalise(answer) or _plain(answer)

    def size(self, task: Task) -> int:
        """The number of hops."""
        return int(task.meta["size"])

    def with_documents(self, task: Task, keys: Sequence[str]) -> Task:
        """The same question with only these documents, all of them shown, for methods that retrieve."""
        chosen = {key: task.documents[key] for key in keys}
        return replace(task, messages=(Message("user", replace(self, show="documents")._prompt(task.meta["question"], chosen)),))


_Tokens = Annotated[int, Field(ge=1)]


class MultihopSettings(DataSettings):
    """Questions whose answer takes several documents."""

    kind: Literal["hotpotqa", "2wikimultihopqa", "musique"]
    """Which data set; it determines how rows are read."""
    metric: Metric = "em"
    """The score: exact match or F1."""
    show: Literal["documents", "titles"] = "documents"
    """What the root reads: all documents, or titles only."""
    only_gold: bool = False
    """Leave out the documents that do not support the answer."""
    tokens: _Tokens | None = None
    """Lengthen contexts to about this many tokens with documents of other questions; by default they are left as they are."""
    ood_tokens: _Tokens | None = None
    """The same for out-of-distribution tasks; if `ood` is not set, they are made from the rows of `data`."""
    gold_position: Gold = "as is"
    """Where the supporting documents are placed."""

    multihop: ClassVar[bool] = True

    @property
    def sources(self) -> dict[str, str]:
        """The file or hub id of each split's rows; with `ood_tokens`, out-of-distribution tasks may come from `data`."""
        return super().sources | {"ood": self.ood or (self.data if self.ood_tokens else "")}

    def instruction(self, spawn: bool) -> str:
        """With the tool, how to hand documents to clones; without, to answer at once."""
        return DELEGATE if spawn else DIRECT

    def build(self, count: Callable[[str], int] = words) -> MultihopEnvironment:
        """The environment; `count` measures the length of contexts."""
        return MultihopEnvironment(
            self.sources, self.fields, self.kind, self.allow_overlap, self.metric, self.show, self.only_gold, self.tokens,
            self.ood_tokens, self.gold_position, count,
        )  # fmt: skip


def _plain(answer: str) -> str:
    """The answer without case and with single spaces."""
    return " ".join(answer.casefold().split())


def folded(title: str) -> str:
    """A form that is equal for titles that differ only in Unicode form, HTML entities, case and spaces."""
    return " ".join(unicodedata.normalize("NFC", html.unescape(title)).casefold().split())


def documents(row: Row, fields: Mapping[str, str], where: str) -> tuple[dict[str, str], set[str]]:
    """(text by title, titles that support the answer) of a row in the format of any of the three data sets.

    Texts with the same title are joined. Raises `TaskError` if the row has no documents, or if a supporting title is not among them.
    """
    record = parsed(_Documents, row, fields, where)
    if record.paragraphs is not None:
        pairs = [(p.title, p.paragraph_text) for p in record.paragraphs]
        supporting = [p.title for p in record.paragraphs if p.is_supporting]
    else:
        pairs = [(passage.title, " ".join(s.strip() for s in passage.sentences)) for passage in record.context or ()]
        supporting = [fact.title for fact in record.supporting_facts or ()]
    if not pairs:
        raise TaskError(f"{where} has no documents: neither `context` nor `paragraphs`; it has {', '.join(map(str, row))}")
    joined: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for title, body in pairs:
        key = spelled.setdefault(folded(title), title)
        joined[key] = f"{joined[key]} {body}" if key in joined else body
    missing = next((title for title in supporting if folded(title) not in spelled), None)
    if missing is not None:
        raise TaskError(f"{where}: {missing!r}, which supports its answer, is not among its documents; correct the row or leave it out")
    return joined, {spelled[folded(title)] for title in supporting}
