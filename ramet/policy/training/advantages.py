"""Advantage estimators: from the rewards of a group of trees to one advantage per branch.

A group is several trees of one task. An estimator takes the trees of a group with their rewards and returns, for
each tree, one advantage per branch, in the order of `tree.branches`. With the loss of `ramet.policy.training.loss`
the estimate of the policy gradient is the mean over trees of

    sum over branches b of A_b * sum over sampled tokens t of grad log pi(a_bt | h_bt)

Every estimator is compared with the exact gradient on an enumerable game in `tests/policy/test_credit.py`;
the biased ones show the bias that their docstrings state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ramet.agents.tree import Branch, Tree
from ramet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ScoredTree:
    """A tree and its reward, with what the estimator `selfcest` needs besides.

    repair_penalty  part of the root's reward that its clones do not share (selfcest only)
    texts           the sampled text of each branch, in branch order; empty unless the gate is used
    """

    tree: Tree
    reward: float
    repair_penalty: float = 0.0
    texts: tuple[str, ...] = ()


Estimator = Callable[[Sequence[ScoredTree]], list[list[float]]]
"""From the trees of a group to the advantage of every branch, indexed by tree and branch."""


def rloo(group: Sequence[ScoredTree]) -> list[list[float]]:
    """REINFORCE with a leave-one-out baseline: every branch gets its tree's reward less the mean of the other trees' of the task.

    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, arXiv:2402.14740.
    Unbiased: the baseline of a tree does not depend on its own actions. It equals n/(n-1) times the
    reward less the whole group's mean, so a group of equal rewards gives zero. No division by a
    standard deviation, which would weigh tasks by how their rewards are spread.
    """
    rewards = np.array([item.reward for item in group], dtype=np.float64)
    if len(rewards) < 2:
        raise ConfigError("a group needs at least two trees for a baseline; raise group_size")
    advantages = _centred(rewards) * len(rewards) / (len(rewards) - 1)
    return [[float(a)] * len(item.tree.branches) for a, item in zip(advantages, group, strict=True)]


def _centred(rewards: np.ndarray) -> np.ndarray:
    """Rewards less their mean; exactly 0 where they are equal, though the mean of equal numbers may be rounded."""
    return np.zeros_like(rewards) if np.ptp(rewards) == 0 else rewards - rewards.mean()


SPREAD_FLOOR = 0.02
"""Reward units below which a difference between trees counts as none, for `grpo`."""


def grpo(group: Sequence[ScoredTree]) -> list[list[float]]:
    """Advantages standardised within the group, as in GRPO (DeepSeekMath, arXiv:2402.03300): `rloo` over the standard deviation.

    The deviation is the unbiased one (n - 1) of the group's rewards, plus `SPREAD_FLOOR`. Since the baseline is that of `rloo`, the
    advantages are n/(n-1) times those with the group's mean.
    A task that every tree solves, and where they differ in cost alone, then teaches as loudly as one that
    is won or lost: without it the choice to work alone on easy tasks is drowned by the noise of hard ones.
    Biased: the spread depends on the tree's own actions, and tasks weigh by the inverse of it, so it follows
    another objective than the mean reward. For pairs that is close to the probability of the better reward.
    """
    spread = float(np.std([item.reward for item in group], ddof=1)) if len(group) > 1 else 0.0
    return [[a / (spread + SPREAD_FLOOR) for a in advantages] for advantages in rloo(group)]


def branch_mean(group: Sequence[ScoredTree]) -> list[list[float]]:
    """`rloo`, each branch weighted by 1/N for a tree of N branches.

    Lower variance for wide trees; biased: it follows the gradient of no objective, since a tree's
    log-probability gradient is scaled by a function of its own actions (how many clones it started).
    """
    return [[a / len(advantages) for a in advantages] for advantages in rloo(group)]


REPAIRS = "repairs"
"""The name of a penalty that the root alone pays, for repaired tool calls. ramet repairs none; a reward function may charge it."""
GATE_TOKENS = 192
"""Generated tokens past which SELFCEST's gate expects a clone to have stated an answer."""
_ANSWER = re.compile(r"answer:", re.IGNORECASE)


def gated(branch: Branch, text: str) -> bool:
    """Whether SELFCEST's gate withholds a clone's reward: it generated more than `GATE_TOKENS` tokens without "answer:"."""
    return branch.generated > GATE_TOKENS and _ANSWER.search(text) is None


def ratio(root_reward: float, clone_reward: float) -> float:
    """SELFCEST's factor of a clone: clip(clone_reward / root_reward, -1.5, 1.5).

    The magnitude of the root's reward is at least 1e-8, its sign is kept, and 0 counts as positive.
    """
    sign = -1.0 if root_reward < 0 else 1.0
    return min(max(clone_reward / (sign * max(abs(root_reward), 1e-8)), -1.5), 1.5)


def selfcest(group: Sequence[ScoredTree], clone_scale: float = 1.0) -> list[list[float]]:
    """The estimator of the SELFCEST release ("General learned delegation by clones", arXiv:2602.13262), for comparison.

    Given the same rewards, its advantages are those of the release to the bit, defects included. Of a root with reward r:
    (r - mean) / (std + 1e-6), with the unbiased standard deviation of the group. Of a clone: the root's advantage times
    `ratio(r, clone reward)`, where the clone reward is 0 if `gated`, and otherwise r without the repair penalty, times `clone_scale`
    (1/2.5 in the release's mathematics). Biased: the ratio depends on the clone's own output, through the gate, and on where the zero
    of the reward lies. Raises `ConfigError` for a group of one tree, and without the texts of all branches.
    """
    rewards = np.array([item.reward for item in group], dtype=np.float64)
    if len(rewards) < 2:
        raise ConfigError("a group needs at least two trees for a standard deviation; raise group_size")
    root_advantages = _centred(rewards) / (rewards.std(ddof=1) + 1e-6)
    result = []
    for advantage, item in zip(root_advantages.tolist(), group, strict=True):
        branches = item.tree.branches
        if len(item.texts) != len(branches):
            raise ConfigError("the estimator selfcest needs the text of every branch")
        per_branch = [advantage]
        for branch, text in zip(branches[1:], item.texts[1:], strict=True):
            clone_reward = 0.0 if gated(branch, text) else (item.reward + item.repair_penalty) * clone_scale
            per_branch.append(advantage * ratio(item.reward, clone_reward))
        result.append(per_branch)
    return result


def gae(values: Sequence[float], reward: float, gamma: float = 1.0, lam: float = 1.0) -> tuple[list[float], list[float]]:
    """(advantages, returns) of a row's sampled tokens under a critic: generalised advantage estimation.

    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv:1506.02438, equation 16.

    `values` are the critic's estimates before each sampled token; the reward comes after the last. Only sampled tokens are steps: the
    tokens between two sampled spans are skipped. With `lam` 1 unbiased for any critic, with less biased by the critic's error.
    """
    advantages, next_value, next_advantage = [0.0] * len(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        step_reward = reward if t == len(values) - 1 else 0.0
        advantages[t] = step_reward + gamma * next_value - values[t] + gamma * lam * next_advantage
        next_value, next_advantage = values[t], advantages[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


ESTIMATORS: dict[str, Estimator] = {"rloo": rloo, "grpo": grpo, "branch_mean": branch_mean, "selfcest": selfcest}
"""By the name that `train.estimator` gives."""
