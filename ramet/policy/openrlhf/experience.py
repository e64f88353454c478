"""Experience: minibatches of rows as OpenRLHF's batches, dealt to the trainers so that all have as many steps to make.

A row's sampled token t stands at index t - 1 of what OpenRLHF calls actions, since the first token of a row is never sampled.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from ramet.policy.openrlhf.settings import ClusterConfig
from ramet.policy.training.advantages import gae
from ramet.policy.training.rows import TrainingRow, batches
from ramet.policy.training.update import Targets

WEIGHT = "weight"
"""Name, in an experience's `info`, of each row's weight in the loss (B,)."""


@dataclass(frozen=True)
class Dealt:
    """The batches of an update.

    experiences  those of the first trainer, then those of the second, ..., each in the order of the minibatches
    steps        batches of each minibatch; the same for every trainer
    tokens       sampled tokens of each minibatch, over all trainers
    """

    experiences: list[Experience]
    steps: list[int]
    tokens: list[int]


def deal(minibatches: Sequence[Sequence[TrainingRow]], trainers: int, tokens: int, pad: int) -> Dealt:
    """Rows to trainers, the longest first, each to the one that has least; batches of at most `tokens` padded tokens.

    A trainer with fewer batches than another gets empty ones, because a step of one is a step of all.
    """
    per_trainer: list[list[Experience]] = [[] for _ in range(trainers)]
    steps = []
    for rows in minibatches:
        shares: list[list[TrainingRow]] = [[] for _ in range(trainers)]
        loads = [(0, place) for place in range(trainers)]
        for row in sorted(rows, key=lambda row: -len(row.ids)):
            load, place = loads[0]
            shares[place].append(row)
            heapq.heapreplace(loads, (load + len(row.ids), place))
        made = [[_experience(batch, share) for batch in batches([r.ids for r in share], tokens, pad)] for share in shares]
        most = max(map(len, made))
        steps.append(most)
        for trainer, found in zip(per_trainer, made, strict=True):
            trainer += found + [_empty(pad) for _ in range(most - len(found))]
    return Dealt([e for trainer in per_trainer for e in trainer], steps, [sum(sum(row.mask) for row in rows) for rows in minibatches])


def _experience(batch: Any, rows: Sequence[TrainingRow]) -> Experience:
    targets = Targets.from_rows(batch, rows)
    return Experience(
        sequences=batch.ids,
        attention_mask=batch.spread([[1] * len(row.ids) for row in rows], torch.long),
        action_mask=targets.mask[:, 1:],
        rollout_log_probs=targets.behaviour[:, 1:],
        advantages=targets.advantages[:, 1:].contiguous(),
        info={WEIGHT: targets.weights[:, 0].contiguous()},
    )


def _empty(pad: int) -> Experience:
    nothing = torch.zeros(1, 1)
    return Experience(
        sequences=torch.full((1, 2), pad),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        action_mask=torch.zeros(1, 1, dtype=torch.bool),
        rollout_log_probs=nothing,
        advantages=nothing,
        info={WEIGHT: torch.zeros(1)},
    )


def targets_of(experience: Experience) -> Targets:
    """The targets of a batch, one entry an action (B, T - 1)."""
    weights = experience.info[WEIGHT][:, None].expand(experience.action_mask.shape)
    return Targets(experience.action_mask, experience.rollout_log_probs, experience.advantages, weights)


class TreeExperience(RemoteExperienceMaker):
    """Deals minibatches of rows. Where there is a critic, the rows' advantages are their trees' rewards, and GAE under the critic's
    values takes their place, whitened over the update's sampled tokens.
    """

    def __init__(self, cluster: ClusterConfig, tokens: int, *groups: Any) -> None:
        super().__init__(*groups)
        self._cluster, self._tokens = cluster, tokens

    def make_experience_batch(self, rollout_samples: Sequence[Sequence[TrainingRow]]) -> Dealt:
        """`rollout_samples` are the rows of every minibatch."""
        dealt = deal(rollout_samples, self._cluster.trainers, self._tokens, self.tokenizer.pad_token_id or 0)
        if self.critic_model_group is not None:
            self._evaluate(dealt.experiences)
        return dealt

    def _evaluate(self, made: list[Experience]) -> None:
        refs = self._dispatch_forward(
            self.critic_model_group,
            False,
            sequences=[e.sequences for e in made],
            action_mask=[e.action_mask for e in made],
            attention_mask=[e.attention_mask for e in made],
        )
        for experience, values in zip(made, self._flatten_results(refs, 1), strict=True):
            evaluate(experience, values.float(), self._cluster.gamma, self._cluster.lam)
        mask = torch.cat([e.action_mask.flatten() for e in made])
        advantages = torch.cat([e.advantages.flatten() for e in made])[mask]
        mean, spread = advantages.mean(), advantages.std(correction=0).clamp(min=1e-4)
        for experience in made:
            experience.advantages = (experience.advantages - mean) / spread * experience.action_mask


def evaluate(experience: Experience, values: torch.Tensor, gamma: float, lam: float) -> None:
    """Set values, returns and advantages of a batch whose advantages are rewards; `values` (B, T - 1), one an action."""
    mask = experience.action_mask
    experience.values = values * mask
    experience.returns = torch.zeros_like(values)
    advantages = torch.zeros_like(values)
    for i in range(len(mask)):
        if mask[i].any():
            reward = float(experience.advantages[i, 0])
            found = gae(experience.values[i, mask[i]].tolist(), reward, gamma, lam)
            advantages[i, mask[i]], experience.returns[i, mask[i]] = (torch.tensor(v, dtype=values.dtype) for v in found)
    experience.advantages = advantages
