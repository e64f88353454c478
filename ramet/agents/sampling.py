"""The interface between the runtime and a policy: `SampleRequest` in, `Sample` out, in token ids.

It is defined here because branches use it and `ramet.agents` imports nothing above itself. The backends are in `ramet.policy`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from ramet.agents.tree import Segment, StopReason
from ramet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy; top_k 0 and top_p 1 truncate nothing. Raises `ConfigError` for other ranges."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is 0 (greedy) or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is above 0 and at most 1 (all tokens), not {self.top_p}")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ConfigError(f"top_k is a number of tokens, or 0 for all, not {self.top_k}")


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One turn to sample.

    prompt      the branch's whole context
    max_tokens  the grant: no token past it is generated
    stop_ids    ids that end the turn; the one that does is part of the sample
    seed        of this request alone: it determines the tokens, whatever else is sampled at the same time
    sampling    how tokens are sampled
    group       an identifier of the tree; requests of one group share prefixes
    media       what the placeholders in the prompt stand for, in order; empty for text
    branch      id of the branch that asks: "0" is the root, "0.2" its third clone
    role        of that branch; "" for the model itself
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int = 0
    sampling: Sampling = Sampling()
    group: str = ""
    media: tuple[Segment, ...] = ()
    branch: str = "0"
    role: str = ""

    @property
    def depth(self) -> int:
        """Levels between the root and the branch; 0 for the root."""
        return self.branch.count(".")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled turn.

    ids        sampled token ids, the stop id included
    logprobs   natural-log probability of each id under the sampling distribution, after temperature and truncation
    stop       why the sample ended
    prefilled  prompt tokens that were computed
    cached     prompt tokens that were reused
    version    version of the weights that sampled the first token
    updates    for each change of weights during the sample, the number of tokens sampled before it
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason
    prefilled: int = 0
    cached: int = 0
    version: int = 0
    updates: tuple[int, ...] = ()


@dataclass(slots=True)
class Partial:
    """What a sample has produced so far. The backend fills it in, so that a sample that never returns can still be charged.

    `ids` and `logprobs` grow by one per token; `prefilled` and `cached` are set once the prompt has been computed. A backend whose
    weights change during a sample sets `version` and `updates`, as in `Sample`.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prefilled: int = 0
    cached: int = 0
    version: int | None = None
    updates: list[int] = field(default_factory=list)


class Policy(Protocol):
    """Something that samples tokens with one set of weights."""

    @property
    def version(self) -> int:
        """The version of the weights that a request made now would be sampled with."""

    @property
    def context(self) -> int | None:
        """The longest context in tokens, prompt and sample together, that the backend accepts; None if it has no limit."""

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn, keeping `partial` up to date. Cancelling the await aborts the generation.

        Raises `TransientPolicyError` for a failure that a retry may mend, and `PolicyError` for one that it will not.
        """


SampleFunction = Callable[[SampleRequest, Partial], Awaitable[Sample]]
"""`Policy.sample`, or what stands in its place."""
Middleware = Callable[[SampleRequest, Partial, SampleFunction], Awaitable[Sample]]
"""What a user puts between branches and their policy: it gets each request and what samples it, and returns the sample.

It may look, wait, refuse by a `PolicyError`, ask again, or change how is sampled. The prompt it may not change: what is trained on is
what was sampled.
"""


ATTEMPTS = 4
"""How often a sample is attempted that fails transiently, unless the policy says otherwise."""


def attempts_of(policy: Policy) -> int:
    """How often a sample from this policy is attempted if it fails transiently: its `attempts`, if it has one."""
    return int(getattr(policy, "attempts", ATTEMPTS))


class PolicyWrapper:
    """A policy that forwards everything to another one. Subclasses override what they change."""

    def __init__(self, policy: Policy):
        self._policy = policy

    @property
    def version(self) -> int:
        """The wrapped policy's weight version."""
        return self._policy.version

    @property
    def attempts(self) -> int:
        """As often as the wrapped policy is attempted."""
        return attempts_of(self._policy)

    @property
    def context(self) -> int | None:
        """The wrapped policy's longest context in tokens, or None."""
        return self._policy.context

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn from the wrapped policy."""
        return await self._policy.sample(request, partial)
