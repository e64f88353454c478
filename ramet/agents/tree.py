"""The record of one rollout: a tree of branches of turns.

Everything after the rollout works on a `Tree`: rewards read its answer and `Usage`; advantages and training rows read its token ids,
masks and log-probabilities. The token ids are authoritative; text is a view that a `ChatFormat` makes of them and is never encoded
again.

Records are frozen once built. A branch is append-only: its ids are the prompt followed by, for each turn, the sampled ids and then the
ids that the runtime appended (a tool message, an error, or the notice to answer).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, Literal, get_args

from ramet.errors import TaskError

Role = Literal["system", "user", "assistant", "tool"]


class StopReason(str, Enum):
    """Why a sample ended."""

    END = "end"
    """The model ended its turn with a stop id."""
    LENGTH = "length"
    """The granted tokens were used up; the turn is cut."""
    CANCELLED = "cancelled"
    """The sample was cancelled; its ids are those generated until then."""
    FAILED = "failed"
    """The backend failed. The turn has no ids, only the cost of its attempts; a retry starts over."""


class Status(str, Enum):
    """How a branch ended: the type of the result that its parent receives."""

    ANSWERED = "answered"
    """The branch ended its turn with an answer."""
    EMPTY = "empty"
    """The branch ended its turn without stating an answer."""
    OUT_OF_BUDGET = "out of budget"
    """The budget was used up first. An answer may still have been stated from the reserve."""
    TIMED_OUT = "timed out"
    """The tree's time was up before the branch ended."""
    REFUSED = "refused"
    """The clone was not started, for want of budget, depth or width, or the call was invalid, or the backend refused the request."""
    FAILED = "failed"
    """The backend failed, and retries did not help."""
    CANCELLED = "cancelled"
    """The branch was cancelled, by itself or with its parent or its tree."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a video file, from `start` to `end` in seconds; to the end of the video if `end` is None.

    Raises `TaskError` unless 0 <= start < end.
    """

    file: str
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.start < math.inf and (self.end is None or self.start < self.end)):
            raise TaskError(
                f"{self.file}: a part of a video starts at 0 seconds or later and ends after it starts, not from {self.start} to {self.end}"
            )


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `content` is untrusted: no part of it can become a control token. The videos in `media` precede it.

    Raises `TaskError` for an unknown role, or content that is not text.
    """

    role: Role
    content: str
    media: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise TaskError(f"no role {self.role!r}; choose one of {', '.join(get_args(Role))}")
        if not isinstance(self.content, str):
            raise TaskError(f"the content of a message is text, not {type(self.content).__name__}; videos go into media")


@dataclass(frozen=True, slots=True)
class Task:
    """One problem to solve.

    id         unique in its data set
    messages   what the root branch starts with
    documents  texts and parts of videos that clones can be given by key; the root sees of them what `messages` contain
    reference  what grading needs, such as the right answer
    meta       further facts about the task, for records
    """

    id: str
    messages: tuple[Message, ...]
    documents: Mapping[str, str | Segment] = field(default_factory=dict)
    reference: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tree cost.

    generated      sampled tokens, including those of cancelled and failed samples
    prefilled      prompt tokens that the backend had to compute
    cached         prompt tokens that the backend reused
    critical_path  sampled tokens along the longest chain of branches that waited for one another
    clones         number of clones started
    turns          number of turns
    attention      sum over sampled and prefilled tokens of the context length that each attends to, without discarded attempts
    seconds        wall-clock time
    """

    generated: int = 0
    prefilled: int = 0
    cached: int = 0
    critical_path: int = 0
    clones: int = 0
    turns: int = 0
    attention: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One sampled turn and what was appended to it. Raises `ValueError` unless there is one log-probability per sampled id.

    sampled              ids that the model sampled, the stop id included
    logprobs             natural-log probability of each under the sampling distribution
    stop                 why the sample ended
    version              version of the weights that sampled the first of them
    prefilled            prompt tokens that the backend had to compute for this turn
    cached               prompt tokens that it reused
    discarded            tokens that failed attempts generated before this sample; charged, not trained on
    discarded_prefilled  prompt tokens that failed attempts computed; charged
    appended             ids that the runtime appended afterwards
    clones               branches that this turn's call started, in call order
    updates              for each change of weights during the sample, the number of ids sampled before it
    """

    sampled: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason
    version: int = 0
    prefilled: int = 0
    cached: int = 0
    discarded: int = 0
    discarded_prefilled: int = 0
    appended: tuple[int, ...] = ()
    clones: tuple[Branch, ...] = ()
    updates: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sampled) != len(self.logprobs):
            raise ValueError(f"{len(self.sampled)} sampled ids but {len(self.logprobs)} log-probabilities")

    @property
    def versions(self) -> list[int]:
        """For each sampled id, the version of the weights that sampled it."""
        return [self.version + sum(start <= place for start in self.updates) for place in range(len(self.sampled))]


@dataclass(frozen=True, slots=True)
class Branch:
    """One context: the root's (id "0") or a clone's (id "0.2.1": clone 1 of clone 2 of the root, counted from 0).

    prompt     ids that it started with
    status     how it ended; `reason` says more where there is more to say
    answer     the answer that it stated, if any
    objective  what its parent asked of it; empty for the root
    seconds    wall-clock time from its start to its end
    """

    id: str
    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]
    status: Status
    answer: str | None
    reason: str = ""
    objective: str = ""
    seconds: float = 0.0
    media: tuple[Segment, ...] = ()
    """The videos that the placeholders in the prompt stand for, in order."""

    @property
    def ids(self) -> list[int]:
        """The whole context, in order."""
        ids = list(self.prompt)
        for turn in self.turns:
            ids += turn.sampled
            ids += turn.appended
        return ids

    @property
    def mask(self) -> list[bool]:
        """For each of `ids`, whether it was sampled."""
        mask = [False] * len(self.prompt)
        for turn in self.turns:
            mask += [True] * len(turn.sampled)
            mask += [False] * len(turn.appended)
        return mask

    @property
    def logprobs(self) -> list[float]:
        """For each of `ids`, its log-probability when it was sampled; 0.0 if it was not sampled."""
        logprobs = [0.0] * len(self.prompt)
        for turn in self.turns:
            logprobs += turn.logprobs
            logprobs += [0.0] * len(turn.appended)
        return logprobs

    @property
    def versions(self) -> list[int]:
        """For each of `ids`, the version of the weights that sampled it; -1 if it was not sampled."""
        versions = [-1] * len(self.prompt)
        for turn in self.turns:
            versions += turn.versions
            versions += [-1] * len(turn.appended)
        return versions

    @property
    def generated(self) -> int:
        """Sampled tokens of this branch alone, including those of discarded attempts."""
        return sum(len(turn.sampled) + turn.discarded for turn in self.turns)

    @property
    def depth(self) -> int:
        """Levels below the root: 0 for the root itself."""
        return self.id.count(".")

    @property
    def clones(self) -> tuple[Branch, ...]:
        """The clones of all turns, in the order in which they were started."""
        return tuple(clone for turn in self.turns for clone in turn.clones)

    def walk(self) -> Iterator[Branch]:
        """This branch and all branches under it, parents first, in call order."""
        stack = [self]
        while stack:
            branch = stack.pop()
            yield branch
            stack.extend(reversed(branch.clones))

    def critical_path(self) -> int:
        """Sampled tokens along the longest chain: this branch's own turns, plus the longest clone of each call."""
        paths: dict[str, int] = {}
        for branch in reversed(list(self.walk())):
            paths[branch.id] = branch.generated + sum(max((paths[c.id] for c in turn.clones), default=0) for turn in branch.turns)
        return paths[self.id]

    def flat(self) -> list[tuple[int, Branch]]:
        """The branches in the order of `walk`, each without its clones and with the index of the parent's turn that started it."""
        turns = {clone.id: number for branch in self.walk() for number, turn in enumerate(branch.turns) for clone in turn.clones}
        alone = (replace(branch, turns=tuple(replace(turn, clones=()) for turn in branch.turns)) for branch in self.walk())
        return [(turns.get(branch.id, 0), branch) for branch in alone]

    @classmethod
    def assembled(cls, flat: Sequence[tuple[int, Branch]]) -> Branch:
        """The branch from which `flat` was made by `Branch.flat`."""
        clones: dict[tuple[str, int], list[Branch]] = {}
        for number, branch in reversed(flat):
            turns = (replace(t, clones=tuple(reversed(c))) if (c := clones.get((branch.id, n))) else t for n, t in enumerate(branch.turns))
            whole = replace(branch, turns=tuple(turns))
            clones.setdefault((branch.id.rpartition(".")[0], number), []).append(whole)
        return whole


@dataclass(frozen=True, slots=True)
class Tree:
    """One finished rollout of a task.

    error    what the backend failed the root with; empty if it did not
    regrown  number of trees grown before this one and discarded, because the backend failed a branch
    """

    task_id: str
    root: Branch
    usage: Usage
    seed: int = 0
    error: str = ""
    regrown: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Flat, because a chain of clones may be deeper than pickle can recurse.
        others = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "root"}
        return _unpickled, (self.root.flat(), others)

    @property
    def answer(self) -> str | None:
        """The root's answer, if it stated one."""
        return self.root.answer

    @property
    def branches(self) -> list[Branch]:
        """All branches, parents first, in call order."""
        return list(self.root.walk())

    @property
    def spawned(self) -> bool:
        """Whether any clone was started."""
        return any(branch.clones for branch in self.branches)

    @property
    def failed(self) -> str:
        """The error with which the backend failed any branch; "" if there was none. A failed tree says nothing about the policy."""
        return self.error or next((branch.reason for branch in self.branches if branch.status is Status.FAILED), "")

    @property
    def starved(self) -> str:
        """The limit that left no room to sample even one token; "" if something was sampled, or if no limit was the cause."""
        if self.usage.generated or self.root.status not in (Status.OUT_OF_BUDGET, Status.TIMED_OUT):
            return ""
        limit = "seconds" if self.root.status is Status.TIMED_OUT else self.root.reason or "generated"
        return f"a prompt of {len(self.root.prompt)} tokens leaves nothing of {limit if ' ' in limit else f'budget.{limit}'}"


def _unpickled(flat: list[tuple[int, Branch]], others: dict[str, Any]) -> Tree:
    """The tree that was pickled as its flat root and its other fields."""
    return Tree(root=Branch.assembled(flat), **others)


def price(root: Branch, seconds: float = 0.0) -> Usage:
    """The total `Usage` of a tree, counted from its branches (the ledger counts it independently)."""
    generated = prefilled = cached = turns = attention = clones = 0
    for branch in root.walk():
        clones += 1
        context = len(branch.prompt)
        for turn in branch.turns:
            turns += 1
            generated += len(turn.sampled) + turn.discarded
            prefilled += turn.prefilled + turn.discarded_prefilled
            cached += turn.cached
            # Each computed prompt token attends to itself and all before it; so does each sampled one.
            first = context - turn.prefilled
            attention += turn.prefilled * first + turn.prefilled * (turn.prefilled + 1) // 2
            attention += len(turn.sampled) * context + len(turn.sampled) * (len(turn.sampled) + 1) // 2
            context += len(turn.sampled) + len(turn.appended)
    return Usage(
        generated=generated,
        prefilled=prefilled,
        cached=cached,
        critical_path=root.critical_path(),
        clones=clones - 1,
        turns=turns,
        attention=attention,
        seconds=seconds,
    )
