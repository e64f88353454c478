"""One policy update, shared by all trainers: its settings, rewards, advantages, minibatches of rows and loss.

The local trainer and the cluster trainer differ in who samples and who holds the weights; what an update computes is
defined here, once; what a tree earns, in `ramet.policy.training.reward`. torch is imported only by the functions that compute
with it: settings and rewards work without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.growth import seed_of
from ramet.agents.runtime import Job, Runtime
from ramet.agents.tree import Status, Task, Tree
from ramet.errors import ConfigError, PolicyError
from ramet.policy.training.advantages import ESTIMATORS, REPAIRS, ScoredTree, selfcest
from ramet.policy.training.reward import Reward, RewardConfig, RewardFunction
from ramet.schema import Section

if TYPE_CHECKING:
    import torch

    from ramet.policy.training.loss import LossSums
    from ramet.policy.training.rows import Batch, TrainingRow

_Count = Annotated[int, Field(ge=1)]


class TrainConfig(Section):
    """One training run. Tokens are counted as sampled or fed, without padding."""

    model_config = ConfigDict(allow_inf_nan=False)

    updates: _Count = 100
    """Updates of the whole run."""
    tasks: Annotated[int, Field(ge=1)] = 32
    """Groups per update, each of one task."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Trees per task."""
    minibatches: _Count = 2
    """Optimiser steps per epoch of an update."""
    epochs: _Count = 1
    """Passes over the trees of an update."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate of AdamW at the end of the warm-up."""
    warmup: Annotated[int, Field(ge=0)] = 10
    """Updates during which the learning rate rises linearly."""
    lr_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the learning rate that is lost, linearly, between the warm-up and the last update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    """The probability ratio counts from 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """The probability ratio counts to 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the probability ratio where the advantage is negative; by default none."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the KL divergence from the initial weights, per token."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature in training."""
    estimator: Literal["rloo", "grpo", "branch_mean", "selfcest"] = "rloo"
    """How a tree's reward becomes the advantage of its tokens."""
    clone_scale: Annotated[float, Field(gt=0)] = 1.0
    """Of the estimator `selfcest`: a clone's reward in units of its root's."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """0: all weights are trained; else adapters of this rank."""
    length_scale: _Count = 64
    """Tokens; divides the summed loss of a tree. A constant, so it sets the size of the gradient before clipping and nothing else."""
    batch_tokens: _Count = 1024
    """Tokens of a forward pass in training, at most; longer trees go alone."""
    checkpoint_every: _Count = 20
    """Updates between checkpoints."""
    max_batch: _Count = 128
    """Samples that the backend decodes at the same time, at most."""

    @model_validator(mode="after")
    def _steps_have_groups(self) -> TrainConfig:
        if self.minibatches > self.tasks:
            raise ValueError(f"minibatches are made of whole groups: {self.minibatches} of {self.tasks} tasks would leave some empty")
        return self

    @model_validator(mode="after")
    def _scale_has_clones_with_rewards(self) -> TrainConfig:
        if self.clone_scale != 1.0 and self.estimator != "selfcest":
            raise ValueError(f"clone_scale belongs to the estimator selfcest; {self.estimator} gives clones no reward of their own")
        return self


def learning_rate(config: TrainConfig, update: int) -> float:
    """The learning rate of update number `update`, from 0 on: a linear warm-up, then linear decay."""
    if update < config.warmup:
        return config.learning_rate * (update + 1) / config.warmup
    return config.learning_rate * (1 - config.lr_decay * (update - config.warmup) / max(config.updates - config.warmup, 1))


MAX_REGROWTHS = 3
"""How many more times a tree is grown after the backend failed one of its branches."""
TaskSampler = Callable[[int], Sequence[tuple[Task, Budget]]]
"""Given the number of an update, returns its tasks, each with the budget of its trees. Must be a function of that number alone."""
Metrics = dict[str, float | int]
Group = tuple[Task, list[Tree]]
"""A task and its `group_size` trees."""


@dataclass(frozen=True, slots=True)
class LearningProblem:
    """What a run trains for: the tasks of its updates and the reward of a tree.

    fingerprint  differs where the data or settings that the two functions read differ; their own code is compared besides
    rewarding    how the reward function is called; its `function` is not read
    compared     whether the code of the two functions is compared when a run is resumed; if not, whoever starts the run has done so
    """

    sample_tasks: TaskSampler
    reward_function: RewardFunction
    fingerprint: str = ""
    rewarding: RewardConfig = field(default_factory=RewardConfig)
    compared: bool = True


def tree_jobs(tasks: Sequence[tuple[Task, Budget]], update: int, group_size: int, seed: int) -> list[Job]:
    """The trees to grow for an update, each with its own seed. A job's key is (group, number within the group)."""
    return [
        Job(task, budget, seed_of(seed, f"train/{update}/{g}", n), (g, n))
        for g, (task, budget) in enumerate(tasks)
        for n in range(group_size)
    ]


def group_trees(tasks: Sequence[tuple[Task, Budget]], trees: Mapping[tuple[object, ...], Tree], group_size: int) -> list[Group]:
    """The finished trees, given by the key of their job, as one group per task, in the order of `tasks`."""
    return [(task, [trees[g, n] for n in range(group_size)]) for g, (task, _) in enumerate(tasks)]


async def grow_trees(
    runtime: Runtime, jobs: Sequence[Job], in_flight: int, report: Callable[[Job, Tree], object] | None = None
) -> dict[tuple[object, ...], Tree]:
    """Grow the trees, at most `in_flight` at a time; returns them by the key of their job. Raises as `require_complete`.

    `report` is called with each tree as soon as it is finished.
    """
    trees: dict[tuple[object, ...], Tree] = {}
    async with runtime.run_many(jobs, in_flight, MAX_REGROWTHS) as finished:
        async for job, tree in finished:
            trees[job.key] = require_complete(tree)
            if report is not None:
                report(job, tree)
    return trees


def require_complete(tree: Tree) -> Tree:
    """The tree itself. Raises `PolicyError` if the backend failed one of its branches: its reward would say nothing about the policy."""
    if tree.failed:
        attempts = f"{tree.regrown + 1} times, the last with"
        raise PolicyError(f"task {tree.task_id} failed {attempts}: {tree.failed}; fix the backend, and run again to resume")
    return tree


def compute_advantages(
    groups: Sequence[Group], rewards: Sequence[Sequence[Reward]], estimator: str, chat: ChatFormat, clone_scale: float = 1.0
) -> list[list[list[float]]]:
    """The advantage of every branch, indexed by group, tree and branch; `rewards` are indexed by group and tree.

    The estimator "selfcest" alone reads the sampled text, and lets the root alone pay the penalty named `REPAIRS`.
    """
    estimate = partial(selfcest, clone_scale=clone_scale) if estimator == "selfcest" else ESTIMATORS[estimator]

    def texts(tree: Tree) -> tuple[str, ...]:
        if estimator != "selfcest":
            return ()
        return tuple(chat.text([i for turn in branch.turns for i in turn.sampled]) for branch in tree.branches)

    def scored(tree: Tree, reward: Reward) -> ScoredTree:
        return ScoredTree(tree, reward.reward, reward.penalties.get(REPAIRS, 0.0), texts(tree))

    return [
        estimate([scored(tree, reward) for tree, reward in zip(trees, group_rewards, strict=True)])
        for (_, trees), group_rewards in zip(groups, rewards, strict=True)
    ]


def minibatches(groups: Sequence[Group], advantages: Sequence[Sequence[Sequence[float]]], config: TrainConfig) -> list[list[TrainingRow]]:
    """The rows of each optimiser step: whole groups, dealt out in turn. A tree's weight is 1/trees, whatever its fan-out."""
    from ramet.policy.training.rows import rows_of

    steps = []
    for step in range(config.minibatches):
        members = range(step, len(groups), config.minibatches)
        trees = [(tree, a) for g in members for tree, a in zip(groups[g][1], advantages[g], strict=True)]
        weight = 1.0 / (len(trees) * config.length_scale) if trees else 0.0
        steps.append([row for tree, a in trees for row in rows_of(tree, a, weight)])
    return steps


@dataclass(frozen=True, slots=True)
class Targets:
    """What the loss of a batch is computed from besides the model's outputs. All (B, T), one entry per token id.

    mask        bool, True where a token was sampled
    behaviour   the log-probability of each sampled token under the weights that sampled it
    advantages  of each row, repeated along it
    weights     of each row's terms in the loss, repeated along it
    """

    mask: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def from_rows(cls, batch: Batch, rows: Sequence[TrainingRow]) -> Targets:
        """The targets of `batch`; `rows` are all the rows that were given to `batches`."""
        import torch

        members = [rows[i] for i in batch.members]
        mask = batch.spread([row.mask for row in rows], torch.bool)

        def along_row(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=mask.device)[:, None].expand(mask.shape)

        behaviour = batch.spread([row.logprobs for row in rows])
        return cls(mask, behaviour, along_row([row.advantage for row in members]), along_row([row.weight for row in members]))


def update_loss(logprobs: torch.Tensor, entropy: torch.Tensor, kl: torch.Tensor, targets: Targets, config: TrainConfig) -> LossSums:
    """The loss of a batch. `logprobs`, `entropy` and `kl` (B, T) are the model's, as `rows.token_logprobs` returns them."""
    from ramet.policy.training.loss import policy_loss

    t = targets
    clip = (config.clip_low, config.clip_high)
    return policy_loss(logprobs, t.behaviour, t.advantages, t.weights, t.mask, entropy, kl, clip, config.kl_coef, config.dual_clip)


def loss_metrics(sums: Mapping[str, float], config: TrainConfig) -> Metrics:
    """Averages over sampled tokens, from the sums of `LossSums` over an update; `loss` is the mean over epochs of the summed loss."""
    tokens = max(sums["tokens"], 1.0)
    return {
        "loss": sums["loss"] / config.epochs,
        "clip_fraction": sums["clipped"] / tokens,
        "behaviour_log_ratio": sums["log_ratio"] / tokens,
        "kl_to_reference": sums["kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
    }


def nothing_sampled_message(trees: str, limit: str) -> str:
    """The line that says that nothing could be sampled for `trees`, because of `limit` (`Tree.starved`)."""
    return (
        f"nothing was sampled for {trees}: {limit}; raise that limit (budget.context, where it is the budget's context), use a model with "
        "a longer context, or make the tasks shorter"
    )


def check_sampled(metrics: Metrics, limit: str) -> None:
    """Raises `ConfigError` if nothing could be sampled for any tree of a run's first update, because of `limit`.

    In later updates, where all tasks may be too long by chance, such trees are only counted (`starved`).
    """
    if metrics["update"] == 0 and metrics["starved"] == 1:
        raise ConfigError(nothing_sampled_message("any tree of the first update", limit))


def limits_reached(groups: Sequence[Group]) -> list[str]:
    """The limits that left no token to sample, one for each tree without a sampled token."""
    return [tree.starved for _, trees in groups for tree in trees if tree.starved]


def rollout_metrics(
    update: int, groups: Sequence[Group], rewards: Sequence[Sequence[Reward]], advantages: Sequence[Sequence[Sequence[float]]]
) -> Metrics:
    """Metrics of what was sampled for an update: means over trees, but for the counts `regrown` and `zero_advantage_groups`.

    `rewards` are indexed by group and tree, `advantages` by group, tree and branch.
    """
    trees = [tree for _, group_trees in groups for tree in group_trees]
    tree_rewards = [reward for group_rewards in rewards for reward in group_rewards]
    count = len(trees)
    metrics: Metrics = {
        "update": update,
        "reward": sum(reward.reward for reward in tree_rewards) / count,
        "accuracy": sum(reward.score for reward in tree_rewards) / count,
        "spawn_rate": sum(tree.spawned for tree in trees) / count,
        "clones": sum(tree.usage.clones for tree in trees) / count,
        "generated": sum(tree.usage.generated for tree in trees) / count,
        "critical_path": sum(tree.usage.critical_path for tree in trees) / count,
        "prefilled": sum(tree.usage.prefilled for tree in trees) / count,
        "cached": sum(tree.usage.cached for tree in trees) / count,
    }
    for name in sorted({name for reward in tree_rewards for name in reward.penalties}):
        metrics[f"penalty_{name}"] = sum(reward.penalties.get(name, 0.0) for reward in tree_rewards) / count
    for name in sorted({name for reward in tree_rewards for name in reward.parts}):
        metrics[f"part_{name}"] = sum(reward.parts.get(name, 0.0) for reward in tree_rewards) / count
    for status in Status:
        metrics[f"status_{status.value.replace(' ', '_')}"] = sum(tree.root.status is status for tree in trees) / count
    metrics["regrown"] = sum(tree.regrown for tree in trees)
    metrics["starved"] = len(limits_reached(groups)) / count
    metrics["zero_advantage_groups"] = sum(all(a == 0 for tree in group for a in tree) for group in advantages)
    return metrics
