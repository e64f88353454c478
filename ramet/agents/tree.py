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

MessageRole = Literal["system", "user", "assistant", "tool"]


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

    role: MessageRole
    content: str
    media: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in get_args(MessageRole):
            raise TaskError(f"no role {self.role!r}; choose one of {', '.join(get_args(MessageRole))}")
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
    answer     the type that the answer has to fit, such as a pydantic model; None for any text. The model is told its JSON schema, an
               answer that does not fit goes back to it while its budget lasts, and `Tree.value` is what the answer says
    """

    id: str
    messages: tuple[Message, ...]
    documents: Mapping[str, str | Segment] = field(default_factory=dict)
    reference: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    answer: Any = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tree cost.

    generated      sampled tokens, including those of cancelled and failed samples
    prefilled      prompt tokens that the backend had to compute
    cached         prompt tokens that the backend had already
    critical_path  sampled tokens on the longest chain of branches that waited for one another
    tool_calls     calls of tools, each at its tool's cost
    tool_seconds   seconds that tools ran, added up
    attention      sum over sampled and prefilled tokens of the context that each attends to, discarded ones left out
    """

    generated: int = 0
    prefilled: int = 0
    cached: int = 0
    critical_path: int = 0
    clones: int = 0
    turns: int = 0
    attention: int = 0
    seconds: float = 0.0
    tool_calls: int = 0
    tool_seconds: float = 0.0


class ToolStatus(str, Enum):
    """How a tool call ended."""

    DONE = "done"
    """The tool returned; `text` is what it returned."""
    INVALID = "invalid"
    """The arguments did not validate, or there is no such tool."""
    FAILED = "failed"
    """The tool raised, or returned what cannot be written as text."""
    TIMED_OUT = "timed out"
    """The tool's time limit, or what was left of `tool_seconds`, ran out."""
    REFUSED = "refused"
    """The call was not made: no budget was left for it, or nobody approved it."""
    CANCELLED = "cancelled"
    """The branch was cancelled while the tool ran."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gives back to the branch."""

    status: ToolStatus
    text: str

    def block(self) -> str:
        """As the branch reads it: the text, with the status where it is not what the tool returned."""
        return self.text if self.status is ToolStatus.DONE else f"({self.status.value}{': ' + self.text if self.text else ''})"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The record of one call: which tool, with which arguments, how it ended, and what it cost.

    number     its place among the calls of its turn
    arguments  a JSON object
    cost       of the currency `tool_calls`
    seconds    on the clock, of the currency `tool_seconds`
    """

    name: str
    arguments: str
    result: ToolResult
    number: int = 0
    cost: int = 0
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
    calls      calls of tools that this turn made, in call order
    written    ids at the beginning of `sampled`, or all, that a program wrote: charged as if they had been sampled, never trained
    free       ids at the beginning of `appended` that a program wrote in the model's place, charged only as context
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
    calls: tuple[ToolCall, ...] = ()
    written: int = 0
    free: int = 0

    def __post_init__(self) -> None:
        if len(self.sampled) != len(self.logprobs):
            raise ValueError(f"{len(self.sampled)} sampled ids but {len(self.logprobs)} log-probabilities")

    @property
    def started(self) -> bool:
        """Whether its clones are attempts that a program started: there is no turn, sampled or written, that called for them."""
        return bool(self.clones) and not self.sampled and not self.free

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
    role: str = ""
    """Whose policy, instructions and tools it had; "" for the model's own."""
    trainable: bool = True
    """Were its tokens sampled by the policy that learns?"""
    value: Any = None
    """What the answer says, where it had to be of a type (`Task.answer`)."""

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
        """For each of `ids`, whether the model sampled it."""
        mask = [False] * len(self.prompt)
        for turn in self.turns:
            mask += [False] * turn.written + [True] * (len(turn.sampled) - turn.written)
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
class ToolUsage:
    """What one tool cost a tree: how often it was called, what of `tool_calls` that took, and seconds."""

    calls: int = 0
    cost: int = 0
    seconds: float = 0.0


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
    def value(self) -> Any:
        """What the answer says, as the type that the task asks for; None without an answer, or without such a type."""
        return self.root.value

    @property
    def branches(self) -> list[Branch]:
        """All branches, parents first, in call order."""
        return list(self.root.walk())

    def tools(self) -> dict[str, ToolUsage]:
        """What each tool was used for, by name."""
        used: dict[str, ToolUsage] = {}
        for call in (call for branch in self.branches for turn in branch.turns for call in turn.calls):
            before = used.get(call.name, ToolUsage())
            used[call.name] = ToolUsage(before.calls + 1, before.cost + call.cost, before.seconds + call.seconds)
        return used

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
    calls: list[ToolCall] = []
    for branch in root.walk():
        clones += 1
        context = len(branch.prompt)
        for turn in branch.turns:
            turns += 1
            generated += len(turn.sampled) + turn.discarded
            prefilled += turn.prefilled + turn.discarded_prefilled
            cached += turn.cached
            calls += turn.calls
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
        tool_calls=sum(call.cost for call in calls),
        tool_seconds=sum(call.seconds for call in calls),
    )
