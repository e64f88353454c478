"""Penalties: the cost of a tree's usage, as named terms that are subtracted from its score.

The reward is the score less the sum of the penalties, or a fixed value for a failure. A higher score never earns less: at the same cost
it earns the difference more, and a tree with any positive score earns at least as much as a tree that scored 0, whatever both cost
(`scored`). Each penalty is logged separately.

The presets follow the release of SELFCEST (General learned delegation by clones, Li et al. 2026, arXiv 2602.13262), for comparison. Its
formulas replace the rule above, which does not hold for them. One quantity is counted differently: where the release counts the tags of
calls that the root wrote, these count the root's turns that started clones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ramet.agents.tree import Branch, Tree
from ramet.errors import RewardError
from ramet.schema import Section

PRICED = ("generated", "critical_path", "prefilled", "clones")
_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(Section):
    """Reward units per token (or clone) of a tree's `Usage`."""

    preset: Literal["none", "selfcest", "selfcest_maths"] = "none"
    """none: the score less the prices. selfcest: after the SELFCEST release's reward for arithmetic and questions, S - P_r - P_c - P_t,
    which can be negative. selfcest_maths: its reward for mathematics, max(0, S - min(P_r + P_c, 0.5)). Prices come off these too."""
    generated: _Price = 0.0
    """Price of a generated token, over all branches."""
    critical_path: _Price = 0.0
    """Price of a generated token on the longest chain."""
    prefilled: _Price = 0.0
    """Price of a prompt token that the backend computes."""
    clones: _Price = 0.0
    """Price of a clone."""
    failure: Annotated[float, Field(le=0, allow_inf_nan=False)] | Literal["priced"] = "priced"
    """The reward of a tree that scored 0, whatever it cost. "priced": it pays as any other, so where nothing succeeds, failing
    cheaply is what is learned."""

    @model_validator(mode="after")
    def _release_prices_failures(self) -> Prices:
        if self.preset != "none" and self.failure != "priced":
            raise ValueError(f'the preset {self.preset} has its own rule for failures; set failure to "priced", or preset to "none"')
        return self

    def penalties(self, tree: Tree) -> dict[str, float]:
        """The priced terms by name. Those of "selfcest_maths" as they are before they are bounded."""
        priced = {name: getattr(self, name) * getattr(tree.usage, name) for name in PRICED if getattr(self, name)}
        release = {} if self.preset == "none" else selfcest_penalties(tree)
        if self.preset == "selfcest_maths":
            del release["calls"]
        return priced | release

    def reward(self, tree: Tree, score: float, penalties: Mapping[str, float]) -> float:
        """What the tree earns for its score and its `penalties`. Raises `RewardError`, naming the tree, for anything that is not finite."""
        if self.preset == "none":
            return scored(tree, score, penalties, self.failure)
        _check_finite(tree, score, penalties)
        own = sum(penalties[name] for name in PRICED if name in penalties)
        if self.preset == "selfcest_maths":
            return max(0.0, score - min(penalties["root_length"] + penalties["clone_length"], 0.5)) - own
        return score - penalties["root_length"] - penalties["clone_length"] - penalties["calls"] - own


def scored(tree: Tree, score: float, penalties: Mapping[str, float], failure: float | Literal["priced"] = "priced") -> float:
    """The reward. Raises `RewardError`, naming the tree, for anything that is not finite.

    Prices take all that a score is worth at most. Were they to take more, saying nothing would beat an answer that is partly
    right: it scores nothing, and costs less.
    """
    _check_finite(tree, score, penalties)
    cost = sum(penalties.values())
    if score > 0:
        return max(score - cost, 0.0)
    return score - cost if failure == "priced" else failure


def _check_finite(tree: Tree, score: float, penalties: Mapping[str, float]) -> None:
    if not (math.isfinite(score) and math.isfinite(sum(penalties.values()))):
        raise RewardError(
            f"the reward of task {tree.task_id} is not finite (score {score}, penalties {dict(penalties)}); fix the reward function"
        )


def saturating(n: int, threshold: int, scale: float, limit: float) -> float:
    """P(n; T, s, m): 0 up to the threshold, then rising towards m."""
    return 0.0 if n <= threshold else limit * (1 - math.exp(-(n - threshold) / scale))


def selfcest_penalties(tree: Tree) -> dict[str, float]:
    """Root length, clone length (the worst turn's longest clone) and calls, by the release's formulas.

    A call is a turn of the root that started clones.
    """
    root = tree.root
    calls = sum(1 for turn in root.turns if turn.clones)
    longest = [max(sum(len(t.sampled) for t in clone.turns) for clone in turn.clones) for turn in root.turns if turn.clones]
    return {
        "root_length": saturating(_sampled(root), 512, 256, 0.3),
        "clone_length": max((saturating(n, 512, 512, 0.2) for n in longest), default=0.0),
        "calls": max(0.0, 0.1 * calls - 0.2),
    }


def _sampled(branch: Branch) -> int:
    return sum(len(turn.sampled) for turn in branch.turns)
