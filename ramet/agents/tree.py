"""The record of one rollout: a tree of branches of turns.

Everything after the rollout works on a `Tree`: rewards read its answer and `Usage`; advantages and training rows read its token ids,
masks and log-probabilities. The token ids are authoritative; text is a view that a `ChatFormat` makes of them and is never encoded
again.

Records are frozen once built. A branch is append-only: its ids are the prompt followed by, for each turn, the sampled ids and then the
ids that the runtime appended (a tool message, an error, or the notice to answer).

A chain of clones may be deeper than Python's stack: whatever is done with a whole tree (to compare, pickle, store or print it) goes over
a flat list of its branches.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from ramet.agents.layout import inert, lines_of, short
from ramet.errors import CheckpointError, TaskError
from ramet.storage import read_text, write_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MessageRole = Literal["system", "user", "assistant", "tool"]
_MESSAGE_ROLES = get_args(MessageRole)


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


OVERRUN = "does not keep to max_tokens"
"""What the error of a branch says whose backend generated more than it was granted."""


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
        if self.role not in _MESSAGE_ROLES:
            raise TaskError(f"no role {self.role!r}; choose one of {', '.join(_MESSAGE_ROLES)}")
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

    @classmethod
    def ask(cls, id: str, question: str, documents: Mapping[str, str | Segment] = MappingProxyType({}), reference: Any = None) -> Task:
        """A task of one question. Of its documents the root is told the keys and lengths, below the question."""
        content = f"{question}\n\n{index(documents)}" if documents else question
        return cls(id, (Message("user", content),), dict(documents), reference)


LISTED = 200
"""Documents that an `index` names, at most."""


def index(documents: Mapping[str, str | Segment]) -> str:
    """The line that tells a root which documents there are, and how long."""
    listed = [f"{key} ({len(text):,} characters)" if isinstance(text, str) else f"{key} (video)" for key, text in documents.items()]
    more = f", and {len(listed) - LISTED:,} more" if len(listed) > LISTED else ""
    return f"Documents: {', '.join(listed[:LISTED])}{more}"


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


@dataclass(frozen=True, slots=True, repr=False, eq=False)
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

    def __repr__(self) -> str:
        return f"Branch({self.id}: {self.ending}, {len(self.turns)} turns, {len(self.clones)} clones, {self.generated} tokens)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Branch) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash((self.id, self.prompt, self.status, self.answer))

    def _parts(self) -> list[tuple[Any, ...]]:
        """All fields of the branches of `flat`."""
        return [(turn, *(getattr(branch, item.name) for item in fields(branch))) for turn, branch in self.flat()]

    @property
    def ending(self) -> str:
        """How it ended, on one line: its status, its answer, and what else there is to say."""
        answer = [] if self.answer is None else [short(self.answer)]
        return " ".join([self.status.value, *answer, *([f"({short(self.reason)})"] if self.reason else [])])

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


class TextView(Protocol):
    """What makes text of ids: a `ramet.agents.chat.ChatFormat`."""

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text for people to read."""


@dataclass(frozen=True, slots=True)
class BranchText:
    """What a branch read and wrote, as text: its prompt and, for each turn, what was sampled and what was appended."""

    prompt: str
    turns: tuple[tuple[str, str], ...]


FORMAT = 1
"""The version of a stored tree."""


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        failed = f", failed: {short(self.failed)}" if self.failed else ""
        return f"Tree({short(self.task_id)}: {self.root.ending}, {len(self.branches)} branches, {self.usage.generated} tokens{failed})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.root.flat(), self._others())

    def _others(self) -> dict[str, Any]:
        """All fields but the root."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "root"}

    def record(self) -> dict[str, Any]:
        """The tree as JSON takes it: every field, the root without its clones, and the clones as a flat list (`Branch.flat`).

        `of` gives the same tree back, except that values of other types come back as JSON has them, and halves of a surrogate pair that
        stand side by side as the character that they spell.
        """
        flat = self.root.flat()
        trees, branches = _adapters()
        (whole,) = trees.dump_python([replace(self, root=replace(flat[0][1], value=None))], mode="json")
        clones = branches.dump_python([(turn, replace(branch, value=None)) for turn, branch in flat[1:]], mode="json")
        for dumped, (_, branch) in zip([whole["root"], *(clone for _, clone in clones)], flat, strict=True):
            dumped["value"] = plain(branch.value)
        return {"version": FORMAT, "tree": whole, "clones": clones}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Tree:
        """The tree of a `record`, or of an older one with its clones nested inside their parents.

        Raises `CheckpointError` for what is not a tree, and for one of a version that this one does not read.
        """
        from pydantic import ValidationError

        trees, branches = _adapters()
        if record.get("version", FORMAT) != FORMAT:
            version_read = short(str(record["version"]))
            raise CheckpointError(f"a tree of version {version_read}, where this ramet reads version {FORMAT}: use the ramet that wrote it")
        try:
            if "tree" not in record:
                return trees.validate_python([record])[0]
            (tree,), clones = trees.validate_python([record["tree"]]), branches.validate_python(record.get("clones"))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, problem["loc"][1:])) or "tree"
            raise CheckpointError(f"not a tree that this ramet can read: {where}: {problem['msg']}") from error
        whole = replace(tree, root=Branch.assembled([(0, tree.root), *clones]))
        if len(whole.branches) != len(clones) + 1:
            raise CheckpointError("not a tree that this ramet can read: a clone has no parent")
        return whole

    def save(self, path: Path | str) -> None:
        """Write the tree to a JSON file, whole or not at all. Raises `StorageError`."""
        write_text(Path(path), json.dumps(self.record()) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Tree:
        """The tree of a file that `save` wrote. Raises `CheckpointError`, in one line, for a file that is missing or is something else."""
        try:
            record = json.loads(read_text(Path(path)))
        except OSError as error:
            raise CheckpointError(f"cannot read tree {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a tree that was saved: it is not JSON") from error
        if not isinstance(record, dict):
            raise CheckpointError(f"{path} is not a tree that was saved")
        try:
            return cls.of(record)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def texts(self, chat: TextView, roles: Mapping[str, TextView] | None = None) -> list[BranchText]:
        """What each of `branches` read and wrote. `roles`: the formats of roles whose model has another tokenizer."""

        def of(branch: Branch) -> BranchText:
            view = (roles or {}).get(branch.role, chat)
            return BranchText(view.text(branch.prompt), tuple((view.text(turn.sampled), view.text(turn.appended)) for turn in branch.turns))

        return [of(branch) for branch in self.branches]

    def text(self, chat: TextView, roles: Mapping[str, TextView] | None = None) -> str:
        """The whole tree for people to read: see `written`."""
        return written(self, self.texts(chat, roles))

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

    def roles(self) -> dict[str, Usage]:
        """What the branches of each role cost, "" the model's own; without critical path and seconds, which are of the whole tree."""
        held: dict[str, list[Branch]] = {}
        for branch in self.branches:
            held.setdefault(branch.role, []).append(branch)
        costs = {role: _summed(branches) for role, branches in held.items()}
        root = costs[self.root.role]
        return costs | {self.root.role: replace(root, clones=root.clones - 1)}

    @property
    def spawned(self) -> bool:
        """Whether any clone was started."""
        return any(branch.clones for branch in self.branches)

    @property
    def failed(self) -> str:
        """The error with which the backend failed any branch; "" if there was none. A failed tree says nothing about the policy."""
        return self.error or next((branch.reason for branch in self.branches if branch.status is Status.FAILED), "")

    @property
    def overran(self) -> bool:
        """Whether `failed`, and all that failed is that the backend went past a grant: it may keep to those of other trees."""
        reasons = [branch.reason for branch in self.branches if branch.status is Status.FAILED]
        return bool(reasons) and all(OVERRUN in reason for reason in reasons)

    @property
    def starved(self) -> str:
        """The limit that left no room to sample even one token; "" if something was sampled, or if no limit was the cause."""
        if self.usage.generated or self.root.status not in (Status.OUT_OF_BUDGET, Status.TIMED_OUT):
            return ""
        branch = next(branch for branch in self.branches if not branch.clones)  # where a program started attempts, the first of them
        limit = "seconds" if self.root.status is Status.TIMED_OUT else branch.reason or "generated"
        return f"a prompt of {len(branch.prompt)} tokens leaves nothing of {limit if ' ' in limit else f'budget.{limit}'}"


def plain(value: Any) -> Any:
    """A user's value as JSON takes it; its `repr` where there is no such form."""
    from pydantic_core import to_jsonable_python

    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        return json.loads(json.dumps(to_jsonable_python(value, serialize_unknown=True)))
    except (TypeError, ValueError, RecursionError):
        return repr(value)


@functools.cache
def _adapters() -> tuple[TypeAdapter[list[Tree]], TypeAdapter[list[tuple[int, Branch]]]]:
    """What converts trees and flat branches. Lists, because they alone pass the rule that unknown fields are errors on to a dataclass."""
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(extra="forbid")
    return TypeAdapter(list[Tree], config=strict), TypeAdapter(list[tuple[int, Branch]], config=strict)


def written(tree: Tree, texts: Sequence[BranchText]) -> str:
    """A tree for people to read: branch after branch in call order, each with what it read and wrote, line by line behind a margin.

    What models and documents say can neither pass for another part of it nor act on a terminal: control characters are spelled out.
    """
    lines = [inert(repr(tree))]
    for branch, text in zip(tree.branches, texts, strict=True):
        role = f" as {branch.role}" if branch.role else ""
        lines += ["", inert(f"{branch.id}{role}: {branch.ending}, {branch.generated} tokens")]
        if branch.objective:
            lines += lines_of("objective", branch.objective)
        lines += lines_of("prompt", text.prompt)
        for turn, (sampled, appended) in zip(branch.turns, text.turns, strict=True):
            if turn.sampled:
                lines += lines_of("program" if turn.written else "model", sampled)
            for call in turn.calls:
                lines += lines_of("call", f"{call.name} {call.arguments} -> {call.result.status.value}, {call.seconds:.3g} seconds")
            if turn.stop in (StopReason.CANCELLED, StopReason.FAILED):
                lines += lines_of("stopped", turn.stop.value)
            if turn.appended:
                lines += lines_of("runtime", appended)
    return "\n".join(lines)


def _unpickled(flat: list[tuple[int, Branch]], others: dict[str, Any]) -> Tree:
    """The tree that was pickled as its flat root and its other fields."""
    return Tree(root=Branch.assembled(flat), **others)


def price(root: Branch, seconds: float = 0.0) -> Usage:
    """The total `Usage` of a tree, counted from its branches (the ledger counts it independently)."""
    total = _summed(root.walk())
    return replace(total, critical_path=root.critical_path(), clones=total.clones - 1, seconds=seconds)


def _summed(branches: Iterable[Branch]) -> Usage:
    """What these branches cost, each counted as a clone; without critical path and seconds, which are of a whole tree."""
    generated = prefilled = cached = turns = attention = clones = 0
    calls: list[ToolCall] = []
    for branch in branches:
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
        clones=clones,
        turns=turns,
        attention=attention,
        tool_calls=sum(call.cost for call in calls),
        tool_seconds=sum(call.seconds for call in calls),
    )
