"""What the runtime asks of a policy: `SampleRequest` in, `Sample` out, in token ids.

It stands in `agents` because actors hold it and `agents` imports nothing above itself; the backends
are in `ramet.policy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from ramet.agents.tree import Segment, StopReason
from ramet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"a temperature of {self.temperature} cannot be sampled at; give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is a share above 0 and at most 1 (all tokens), not {self.top_p}")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ConfigError(f"top_k is a number of tokens, or 0 for all, not {self.top_k}")


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One turn to sample.

    prompt      the branch's whole context
    max_tokens  the grant: no token past it is generated
    stop_ids    ids that end the turn; the one that does is part of the sample
    seed        of this request alone: it fixes the tokens whatever else is sampled at the same time
    group       requests of one group share prefixes (a tree's id)
    media       what the placeholders in the prompt stand for, in order; empty for text
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int = 0
    sampling: Sampling = Sampling()
    group: str = ""
    media: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled turn. `logprobs` are under the sampling distribution, temperature and truncation included.

    version  of the weights that sampled the first token
    updates  for each change of weights while it was sampled: how many tokens came before it
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
    """Filled by the backend while it samples, so that a sample that never returns can be charged.

    `ids` and `logprobs` grow by one a token; `prefilled` is set when the prompt has been computed. A backend whose weights
    change while it samples says which sampled the first token (`version`) and where the others took over (`updates`).
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
        """The weight version that a request made now would be sampled with."""

    @property
    def context(self) -> int | None:
        """The longest context, prompt and sample together, that the backend takes; None if it has no limit."""

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn. Cancelling the await aborts the generation.

        Raises `TransientPolicyError` for what may pass, `PolicyError` for what will not.
        """


class PolicyWrapper:
    """A policy that passes on what it is asked to another one. Subclasses say what they do besides."""

    def __init__(self, policy: Policy):
        self._policy = policy

    @property
    def version(self) -> int:
        return self._policy.version

    @property
    def context(self) -> int | None:
        return self._policy.context

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        return await self._policy.sample(request, partial)
