"""A branch while it grows, and what all branches of a tree, or all clones of one role, share."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from ramet.agents.budget import Budget, Ledger
from ramet.agents.chat import ChatFormat
from ramet.agents.context import ContextStore
from ramet.agents.events import Event
from ramet.agents.protocol import OUT_OF_BUDGET_NOTICE, SPAWN_SCHEMA, left_line, tool_schema
from ramet.agents.sampling import Middleware, Policy, Sampling
from ramet.agents.tasks import MAX_LEVELS, Slots
from ramet.agents.tools import Tool, ToolCaller, Tools, call_tool
from ramet.agents.tree import Branch, Message, Segment, Status, StopReason, ToolCall, Turn
from ramet.agents.typed import AnswerType
from ramet.errors import ConfigError


@dataclass(slots=True)
class Growth:
    """A branch while it grows. It can be read at any time; `freeze` makes the record."""

    id: str
    prompt: tuple[int, ...]
    ledger: Ledger
    objective: str = ""
    media: tuple[Segment, ...] = ()
    role: str = ""
    trainable: bool = True
    turns: list[Turn] = field(default_factory=list)
    clones: list[Growth] = field(default_factory=list)
    """Clones of the call that is running; once it ends, they are part of its turn."""
    discarded: int = 0
    discarded_prefilled: int = 0
    """Prompt tokens that they have computed."""
    lost: int = 0
    """Tokens that failed attempts have cost this branch and its clones, over all turns."""
    fault: str = ""
    """The error of the last failed attempt."""
    status: Status | None = None
    answer: str | None = None
    reason: str = ""
    started: float = 0.0
    ended: float | None = None
    expects: AnswerType | None = None
    """What it is to answer with, if that is not just text."""
    value: Any = None
    begun: tuple[int, ...] = ()
    """Ids with which a program has begun the next turn."""
    scope: anyio.CancelScope | None = None
    """The branch's own cancel scope, in trees that are watched: nothing else can cancel a single branch."""

    @property
    def depth(self) -> int:
        """Levels between the root and this branch; 0 for the root."""
        return self.id.count(".")

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole context so far."""
        if not self.turns:
            return self.prompt
        ids = list(self.prompt)
        for turn in self.turns:
            ids += turn.sampled
            ids += turn.appended
        return tuple(ids)

    def append(self, ids: Sequence[int]) -> int:
        """Append ids that were not sampled, to the newest turn or, if there is none yet, to the prompt. Returns how many."""
        if self.turns:
            self.turns[-1] = replace(self.turns[-1], appended=(*self.turns[-1].appended, *ids))
        else:
            self.prompt += tuple(ids)
        return len(ids)

    def record(self, call: ToolCall) -> None:
        """Add a call that has ended to the newest turn, in call order."""
        calls = sorted((*self.turns[-1].calls, call), key=lambda each: each.number)
        self.turns[-1] = replace(self.turns[-1], calls=tuple(calls))

    def end(self, status: Status, answer: str | None = None, reason: str = "") -> None:
        """How the branch ended; the last word stands."""
        self.status, self.answer, self.reason = status, answer, reason

    def cancel(self) -> None:
        """End this branch and its clones. Its parent receives a typed result and goes on."""
        if self.scope is not None:
            self.scope.cancel()

    def freeze(self, otherwise: Status, now: float) -> Branch:
        """The record of this branch at time `now`, its clones already frozen. A branch that has not ended gets the status `otherwise`."""
        turns = list(self.turns)
        if self.discarded or self.discarded_prefilled:
            turns.append(Turn((), (), StopReason.FAILED, discarded=self.discarded, discarded_prefilled=self.discarded_prefilled))
        return Branch(
            id=self.id,
            prompt=self.prompt,
            turns=tuple(turns),
            status=self.status or otherwise,
            answer=self.answer,
            reason=self.reason,
            objective=self.objective,
            seconds=(now if self.ended is None else self.ended) - self.started,
            media=self.media,
            role=self.role,
            trainable=self.trainable,
            value=self.value,
        )


@dataclass(frozen=True, slots=True)
class Role:
    """Who a clone can be instead of a clone of the model itself. What is None is as for other clones.

    policy       what samples it: another model, or another engine. It must be serving (entered) while trees grow
    chat         that model's chat format; needed with `policy` where the tokenizer is another one
    system       its instructions
    tools        the tools that it holds
    description  for the model that calls it
    trainable    do its tokens train? Only the policy that learns can be trained: False where `policy` is another one
    """

    policy: Policy | None = None
    chat: ChatFormat | None = None
    sampling: Sampling | None = None
    system: str | None = None
    tools: Sequence[Tool] | None = None
    description: str = ""
    trainable: bool = True

    def __post_init__(self) -> None:
        if self.policy is not None and self.trainable:
            raise ConfigError("a role with a policy of its own is not trained: say trainable=False")


def chats_of(roles: Mapping[str, Role]) -> dict[str, ChatFormat]:
    """The formats of the roles that have another one than the model."""
    return {name: role.chat for name, role in roles.items() if role.chat is not None}


Approval = Callable[[str, str, str], Awaitable[bool]]
"""May this call be made? Given the branch's id, the tool's name and the arguments as JSON."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all branches of one tree share, or all clones of one role. Options: see `Runtime`; `group` names the tree in requests."""

    policy: Policy
    chat: ChatFormat
    budget: Budget
    store: ContextStore
    sampling: Sampling
    slots: Slots
    seed: int
    group: str
    max_turn_tokens: int
    result_characters: int
    attempts: int | None
    clone_system: str
    watched: bool = False
    always_show_budget: bool = True
    tools: Tools = field(default_factory=Tools)
    caller: ToolCaller = call_tool
    roles: Mapping[str, Role] = field(default_factory=dict)
    role: str = ""
    trainable: bool = True
    approve: Approval | None = None
    emit: Callable[[Event], None] | None = None
    middleware: Sequence[Middleware] = ()

    @property
    def context(self) -> int | None:
        """Tokens that one branch's context may hold: the smaller of the budget's and the policy's limits; None without either."""
        limits = [limit for limit in (self.budget.context, self.policy.context) if limit is not None]
        return min(limits) if limits else None

    def may_spawn(self, depth: int) -> bool:
        """Whether a branch at this depth is offered `spawn_clone`."""
        limits = self.budget
        deepest = MAX_LEVELS if limits.depth is None else min(limits.depth, MAX_LEVELS)
        return depth < deepest and limits.clones != 0 and limits.width != 0

    def schemas(self, depth: int) -> list[dict[str, Any]]:
        """The tools that a branch at this depth is offered, as chat templates take them."""
        spawn = SPAWN_SCHEMA if not self.roles else tool_schema({name: role.description for name, role in self.roles.items()})
        return [*([spawn] if self.may_spawn(depth) else []), *(tool.schema for tool in self.tools.held(depth).values())]

    def of(self, name: str) -> Setting:
        """The setting of clones of a role."""
        role = self.roles[name]
        return replace(
            self,
            policy=role.policy or self.policy,
            chat=role.chat or self.chat,
            sampling=role.sampling or self.sampling,
            clone_system=self.clone_system if role.system is None else role.system,
            tools=self.tools if role.tools is None else Tools(role.tools),
            role=name,
            trainable=role.trainable and self.trainable,
        )

    def growth(
        self,
        name: str,
        prompt: Sequence[int],
        ledger: Ledger,
        objective: str = "",
        now: float = 0.0,
        media: tuple[Segment, ...] = (),
        expects: AnswerType | None = None,
    ) -> Growth:
        """A new branch called `name`, with no turns yet."""
        scope = anyio.CancelScope() if self.watched else None
        return Growth(name, tuple(prompt), ledger, objective, media, self.role, self.trainable, started=now, expects=expects, scope=scope)

    def notice(self, ledger: Ledger) -> str:
        """What tells a branch to answer now."""
        return "\n".join(filter(None, [OUT_OF_BUDGET_NOTICE, self.left(ledger, final=True)]))

    def left(self, ledger: Ledger, final: bool = False) -> str:
        """The line that says what may still be spent."""
        return left_line(ledger.sampleable(final), ledger.left("clones"), ledger.left("tool_calls"))

    def prompt(self, messages: Sequence[Message], ledger: Ledger, depth: int, expects: AnswerType | None = None) -> list[int]:
        """A branch's prompt ids. The last message ends with what to answer with, if that is of a type, and with what is left."""
        *before, last = messages
        return self.chat.render([*before, replace(last, content=self.content(last.content, ledger, depth, expects))], self.schemas(depth))

    def content(self, text: str, ledger: Ledger, depth: int, expects: AnswerType | None = None) -> str:
        """The last message of a prompt. What is left is told to branches without tools only by `always_show_budget`."""
        left = self.left(ledger) if self.always_show_budget or self.schemas(depth) else ""
        return "\n".join(filter(None, [text, expects.instruction if expects is not None else "", left]))


def seed_of(seed: int, branch: str, turn: int) -> int:
    """The seed of one sample, from the tree's seed and the sample's place in the tree."""
    digest = hashlib.blake2b(f"{seed}/{branch}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
