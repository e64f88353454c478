"""What happens in a tree, as it happens: see `Runtime.stream`.

`branch` is the id of the branch that an event belongs to: "0" is the root, "0.2" its third clone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ramet.agents.tree import Status, StopReason, ToolResult, Tree


@dataclass(frozen=True, slots=True)
class BranchStarted:
    """A context was opened; `prompt_tokens` long."""

    branch: str
    objective: str
    role: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokensSampled:
    """The next tokens of a turn, as the backend gives them; `text` is a view of them alone."""

    branch: str
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class TurnSampled:
    """A turn is whole: its text, how it ended, and what the branch may still spend, by currency."""

    branch: str
    text: str
    stop: StopReason
    left: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CallMade:
    """A call is about to be made; `arguments` is JSON."""

    branch: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A tool's call ended. (Of `spawn_clone`, each clone's end is a `BranchEnded`.)"""

    branch: str
    name: str
    result: ToolResult
    seconds: float


@dataclass(frozen=True, slots=True)
class BranchEnded:
    """A context was closed: how, with which answer, and what its whole sub-tree had spent."""

    branch: str
    status: Status
    answer: str | None
    reason: str
    spent: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TreeEnded:
    """The last event of every stream."""

    tree: Tree

    @property
    def branch(self) -> str:
        """The root."""
        return "0"


Event = BranchStarted | TokensSampled | TurnSampled | CallMade | CallEnded | BranchEnded | TreeEnded
