"""Experience: minibatches of rows as OpenRLHF's batches, distributed so that all trainers have the same number of batches.

The token at index t of a row is OpenRLHF's action t - 1, since the first token of a row is never sampled.
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
"""The key, in an experience's `info`, of the weight of each row in the loss, (B,)."""


@dataclass(frozen=True)
class Dealt:
    """The batches of an update.

    experiences  those of the first trainer, then of the second, and so on, each in the order of the minibatches
    steps        batches of each minibatch; the same for every trainer
    tokens       sampled tokens of each minibatch, of all trainers together
    """

    experiences: list[Experience]
    steps: list[int]
    tokens: list[int]


def deal(minibatches: Sequence[Sequence[TrainingRow]], trainers: int, tokens: int, pad: int) -> Dealt:
    """Distribute rows, the longest first, each to the trainer with the fewest tokens; then batch them as `rows.batches` does.

    A trainer with fewer batches than another gets empty ones, because all trainers must make each step together.

    tokens  of a batch with its padding, at most
    pad     the padding id
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
        dealt = [[_experience(batch, share) for batch in batches([r.ids for r in share], tokens, pad)] for share in shares]
        count = max(map(len, dealt))
        steps.append(count)
        for trainer, experiences in zip(per_trainer, dealt, strict=True):
            trainer += experiences + [_empty(pad) for _ in range(count - len(experiences))]
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
    """The targets of a batch, one entry per action, (B, T - 1)."""
    weights = experience.info[WEIGHT][:, None].expand(experience.action_mask.shape)
    return Targets(experience.action_mask, experience.rollout_log_probs, experience.advantages, weights)


class TreeExperience(RemoteExperienceMaker):
    """Distributes minibatches of rows among the trainers.

    With a critic, the advantages of the rows that it is given are the rewards of their trees; they are replaced by GAE under the critic's
    values, whitened over the update's sampled tokens.
    """

    def __init__(self, cluster: ClusterConfig, tokens: int, *groups: Any) -> None:
        super().__init__(*groups)
        self._cluster, self._tokens = cluster, tokens

    def make_experience_batch(self, rollout_samples: Sequence[Sequence[TrainingRow]]) -> Dealt:
        """The batches of an update; `rollout_samples` are the rows of each minibatch."""
        dealt = deal(rollout_samples, self._cluster.trainers, self._tokens, self.tokenizer.pad_token_id or 0)
        if self.critic_model_group is not None:
            self._evaluate(dealt.experiences)
        return dealt

    def _evaluate(self, experiences: list[Experience]) -> None:
        refs = self._dispatch_forward(
            self.critic_model_group,
            False,
            sequences=[e.sequences for e in experiences],
            action_mask=[e.action_mask for e in experiences],
            attention_mask=[e.attention_mask for e in experiences],
        )
        for experience, values in zip(experiences, self._flatten_results(refs, 1), strict=True):
            evaluate(experience, values.float(), self._cluster.gamma, self._cluster.lam)
        mask = torch.cat([e.action_mask.flatten() for e in experiences])
        advantages = torch.cat([e.advantages.flatten() for e in experiences])[mask]
        mean, spread = advantages.mean(), advantages.std(correction=0).clamp(min=1e-4)
        for experience in experiences:
            experience.advantages = (experience.advantages - mean) / spread * experience.action_mask


def evaluate(experience: Experience, values: torch.Tensor, gamma: float, lam: float) -> None:
    """Replace the advantages of a batch, which are rewards, by GAE; set its values and returns too. `values` (B, T - 1), one per action."""
    mask = experience.action_mask
    experience.values = values * mask
    experience.returns = torch.zeros_like(values)
    advantages = torch.zeros_like(values)
    for i in range(len(mask)):
        if mask[i].any():
            reward = float(experience.advantages[i, 0])
            estimates = gae(experience.values[i, mask[i]].tolist(), reward, gamma, lam)
            advantages[i, mask[i]], experience.returns[i, mask[i]] = (torch.tensor(v, dtype=values.dtype) for v in estimates)
    experience.advantages = advantages
