"""The attention methods by name: how each lays out a sequence on ranks, and how it computes attention in one layer.

dense                  exact attention on one rank, the reference
ring, zigzag, ulysses  exact attention on any number of ranks; see `exact`
star, apb, spava       approximate in the context, exact for the query given the cached keys; see `plan` and `anchored`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ramet.attention import plan as plans
from ramet.attention.anchored import LocalRows, Selections, anchored
from ramet.attention.comm import RankGroup
from ramet.attention.exact import ring, ulysses
from ramet.attention.plan import BlockPlan, ShardedPlan
from ramet.attention.select import scorer
from ramet.errors import ConfigError

Name = Literal["dense", "ring", "zigzag", "ulysses", "star", "apb", "spava"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Method:
    """A method and its settings. Raises `ConfigError` for a name or scorer that does not exist.

    anchor, passing  lengths in rows, for spava and apb; None: the published shares of the context
    scorer           how spava ranks the rows that it may pass on (see `select`); apb uses it only without retaining heads
    backend          attention kernel; see `kernels`
    """

    name: Name = "spava"
    anchor: int | None = None
    passing: int | None = None
    scorer: str = "mean"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"unknown attention method {self.name!r}; choose one of {', '.join(NAMES)}")
        scorer(self.scorer)

    @property
    def exact(self) -> bool:
        """Whether the method computes exact causal attention. Only exact methods have a backward pass."""
        return self.name in ("dense", "ring", "zigzag", "ulysses")

    def plan(self, context: int, query: int, hosts: int) -> BlockPlan | ShardedPlan:
        """The layout of `context` and `query` rows on `hosts` ranks. A single rank computes dense attention whatever the method.

        An anchor longer than the context is shortened to it. Raises `ConfigError` for dense attention on several ranks.
        """
        if self.name == "dense" and hosts > 1:
            raise ConfigError("dense attention runs on one host; use ring, zigzag or ulysses to distribute exact attention")
        if hosts == 1 or self.exact:
            return ShardedPlan(context + query, hosts, zigzag=self.name == "zigzag")
        anchor = None if self.anchor is None else min(self.anchor, context)
        if self.name == "star":
            return plans.star(context, query, hosts)
        return (plans.apb if self.name == "apb" else plans.spava)(context, query, hosts, anchor, self.passing)

    def attend(
        self,
        plan: BlockPlan | ShardedPlan,
        group: RankGroup,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        scores: Tensor | None = None,
        selections: Selections | None = None,
    ) -> Tensor:
        """Attention output [Hq, T, D] of one layer for the local rows q [Hq, T, D], k and v [Hk, T, D], which are rotated.

        scores      importance [Hk, T] of the local rows, taken instead of the scorer's (APB's retaining heads)
        selections  receives the selected rows of each block; only block layouts fill it
        """
        if isinstance(plan, BlockPlan):
            return anchored(plan, group, LocalRows(q, k, v), scale, scorer(self.scorer), scores, self.backend, selections)
        return (ulysses if self.name == "ulysses" else ring)(plan, group, q, k, v, scale, self.backend)
