"""Multi-hop questions over documents: HotpotQA (distractor), 2WikiMultihopQA, MuSiQue (answerable).

A document's key is its title. The root reads all documents, or their titles only; every method that an environment is
measured with reads the same. Contexts can be made longer: documents of other questions are added up to a number of
tokens, and the supporting ones put at the beginning, in the middle, at the end, or anywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ramet.agents.context import ContextStore
from ramet.agents.tree import Message, Task
from ramet.data import Row, field, load_rows, text, texts
from ramet.env.questions import Questions
from ramet.errors import TaskError, first_line
from ramet.rewards.f1 import exact_match, f1, normalise

Metric = Literal["em", "f1"]
Gold = Literal["as is", "start", "middle", "end", "random"]


def words(text: str) -> int:
    """Tokens of an English text, roughly; for when no tokenizer is at hand."""
    return len(text) // 4


@dataclass(frozen=True)
class MultihopEnvironment(Questions):
    """Questions whose answer takes several documents.

    metric     what `grade` gives unless asked for the other: exact match or F1
    show       what the root reads: every document, or titles only
    only_gold  leave out the documents that do not support the answer
    tokens     lengthen contexts to about this many tokens; None: as they are
    ood_tokens the same for the split "ood"
    gold       where the supporting documents stand
    count      tokens of a text
    """

    metric: Metric = "em"
    show: Literal["documents", "titles"] = "documents"
    only_gold: bool = False
    tokens: int | None = None
    ood_tokens: int | None = None
    gold: Gold = "as is"
    count: Callable[[str], int] = words

    def wanted(self, row: Row, split: str) -> bool:
        return bool(row.get("answerable", True))

    def task(self, row: Row, task_id: str, where: str, split: str) -> Task:
        question = text(field(row, "question", self.fields, where), "question", where)
        answers = [text(field(row, "answer", self.fields, where), "answer", where)]
        answers += texts(field(row, "answer_aliases", self.fields, where, []) or [], "aliases", where)
        found, supporting = documents(row, self.fields, where)
        tokens = self.ood_tokens if split == "ood" else self.tokens
        chosen = self._arranged(found, supporting, split, tokens, random.Random(f"{task_id}/{tokens}/{self.gold}"))
        gold = tuple(key for key in chosen if key in supporting)
        hops = len(field(row, "question_decomposition", self.fields, where, None) or gold)
        meta = {"size": hops, "supporting": gold}
        return Task(task_id, (Message("user", self._prompt(question, chosen)),), chosen, tuple(answers), meta | {"question": question})

    def _arranged(
        self, found: Mapping[str, str], supporting: set[str], split: str, tokens: int | None, rng: random.Random
    ) -> dict[str, str]:
        gold = [key for key in found if key in supporting]
        others = [] if self.only_gold else [key for key in found if key not in supporting]
        chosen = {key: found[key] for key in found if key in gold or key in others}
        if tokens is not None:
            length = sum(self.count(f"{key}: {value}\n") for key, value in chosen.items())
            folded = {key.strip().casefold() for key in found}
            for key, value in self._strangers(split, rng):
                size = self.count(f"{key}: {value}\n")
                if length + size > tokens:
                    break
                if key.strip().casefold() not in folded:
                    folded.add(key.strip().casefold())
                    chosen[key], length = value, length + size
                    others.append(key)
            rng.shuffle(others)
        elif self.gold == "as is":
            return chosen
        rng.shuffle(gold)
        at = {"start": 0, "middle": len(others) // 2, "end": len(others)}.get(self.gold)
        order = [*others[:at], *gold, *others[at:]] if at is not None else rng.sample([*others, *gold], len(others) + len(gold))
        return {key: chosen[key] for key in order}

    def _strangers(self, split: str, rng: random.Random) -> Any:
        """Documents of other rows, row after row in a seeded order."""
        rows = load_rows(self.sources[split])
        for index in rng.sample(range(len(rows)), len(rows)):
            yield from documents(rows[index], self.fields, f"row {index + 1}")[0].items()

    def _prompt(self, question: str, chosen: Mapping[str, str]) -> str:
        if self.show == "titles":
            return "Documents, by title:\n" + "\n".join(f"- {key}" for key in chosen) + f"\n\nQuestion: {question}"
        return f"Documents:\n{ContextStore(chosen).render(chosen)}\n\nQuestion: {question}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("em", "f1") if self.metric == "em" else ("f1", "em")

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return exact_match(task, answer) if (metric or self.metric) == "em" else f1(task, answer, verdicts=self.name != "musique")

    def canonical(self, answer: str) -> str:
        return normalise(answer)

    def size(self, task: Task) -> int:
        return int(task.meta["size"])

    def with_documents(self, task: Task, keys: Sequence[str]) -> Task:
        """The same question over some of its documents, which are shown: for methods that retrieve."""
        chosen = {key: task.documents[key] for key in keys}
        return replace(task, messages=(Message("user", replace(self, show="documents")._prompt(task.meta["question"], chosen)),))


def documents(row: Row, fields: Mapping[str, str], where: str) -> tuple[dict[str, str], set[str]]:
    """(text by title, titles that support the answer) of a row in any of the three sets' formats. Texts of one title are joined."""
    try:
        return _documents(row, fields, where)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise TaskError(f"{where}: its documents are not as any of the sets has them ({first_line(error)})") from None


def _documents(row: Row, fields: Mapping[str, str], where: str) -> tuple[dict[str, str], set[str]]:
    paragraphs = field(row, "paragraphs", fields, where, None)
    if paragraphs is not None:
        pairs = [(p.get("title"), p.get("paragraph_text"), bool(p.get("is_supporting"))) for p in paragraphs]
        supporting = {str(title) for title, _, needed in pairs if needed}
    else:
        context = _decoded(field(row, "context", fields, where))
        facts = _decoded(field(row, "supporting_facts", fields, where, []))
        listed = list(zip(context["title"], context["sentences"], strict=True)) if isinstance(context, Mapping) else context
        supporting = {str(t) for t in (facts["title"] if isinstance(facts, Mapping) else [fact[0] for fact in facts])}
        pairs = [(title, " ".join(s.strip() for s in sentences), False) for title, sentences in listed]
    joined: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for title, body, _ in pairs:
        name = text(title, "title", where)
        key = spelled.setdefault(name.casefold(), name)
        joined[key] = f"{joined[key]} {body}" if key in joined else str(body)
    if not joined:
        raise TaskError(f"{where} has no documents")
    return joined, {spelled[t.strip().casefold()] for t in supporting if t.strip().casefold() in spelled}


def _decoded(value: Any) -> Any:
    """Some copies keep lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise TaskError(f"{value[:40]!r} is not a list of documents") from None
