"""The methods by name: how a sequence is laid out on hosts, and how one layer attends.

dense                  one host, the yardstick
ring, zigzag, ulysses  exact on any number of hosts
star, apb, spava       approximate in the context, exact for the query; see `plan`
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
    """A method and its settings.

    anchor, passing  rows, of spava and apb; None: the published shares of the context
    scorer           how spava ranks what it passes on; apb too where it has no retaining heads
    backend          see `kernels`
    """

    name: Name = "spava"
    anchor: int | None = None
    passing: int | None = None
    scorer: str = "mean"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"unknown attention method {self.name!r}; there are {', '.join(NAMES)}")
        scorer(self.scorer)

    @property
    def exact(self) -> bool:
        return self.name in ("dense", "ring", "zigzag", "ulysses")

    def plan(self, context: int, query: int, hosts: int) -> BlockPlan | ShardedPlan:
        """Lay out a sequence. One host takes the dense path whatever the method; lengths beyond the context are cut to it."""
        if self.name == "dense" and hosts > 1:
            raise ConfigError("dense attention runs on one host; use ring, zigzag or ulysses to share it exactly")
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
        seen: Selections | None = None,
    ) -> Tensor:
        """One layer on one rank: [Hq, T, D] for local rows q [Hq, T, D], k and v [Hk, T, D]."""
        if isinstance(plan, BlockPlan):
            return anchored(plan, group, LocalRows(q, k, v), scale, scorer(self.scorer), scores, self.backend, seen)
        return (ulysses if self.name == "ulysses" else ring)(plan, group, q, k, v, scale, self.backend)
