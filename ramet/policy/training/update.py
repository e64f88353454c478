"""One update, whichever trainer makes it: its settings, its rewards and credit, its minibatches of rows, its loss.

The local trainer and the cluster trainer differ in who samples and who holds the weights. What an update is stands
here, once. torch is imported where it computes: the settings and rewards of an update are read without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from ramet.agents.actor import seed_of
from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.runtime import Job, Runtime
from ramet.agents.tree import Status, Task, Tree
from ramet.errors import ConfigError, PolicyError, RametError, RewardError, first_line
from ramet.policy.training.advantages import ESTIMATORS, REPAIRS, ScoredTree, selfcest
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
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
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


@dataclass(frozen=True, slots=True)
class Reward:
    """What a tree earned: its score in [0, 1], its penalties by name, and the reward that they make."""

    score: float
    penalties: Mapping[str, float]
    reward: float


AGAIN = 3
"""How often a tree that the backend failed is grown anew."""
TaskSampler = Callable[[int], Sequence[tuple[Task, Budget]]]
"""The tasks of an update and the budget of each."""
RewardFunction = Callable[[Task, Tree], Reward]
Metrics = dict[str, float | int]
Group = tuple[Task, list[Tree]]


def jobs_of(drawn: Sequence[tuple[Task, Budget]], update: int, group_size: int, seed: int) -> list[Job]:
    """The trees of an update, each with a seed of its own; their keys are (group, number in the group)."""
    return [
        Job(task, budget, seed_of(seed, f"train/{update}/{g}", n), (g, n))
        for g, (task, budget) in enumerate(drawn)
        for n in range(group_size)
    ]


def grouped(drawn: Sequence[tuple[Task, Budget]], trees: Mapping[tuple[object, ...], Tree], group_size: int) -> list[Group]:
    """The finished trees by task, in the order of `drawn`, whatever the order in which they finished."""
    return [(task, [trees[g, n] for n in range(group_size)]) for g, (task, _) in enumerate(drawn)]


async def grow(runtime: Runtime, jobs: Sequence[Job], in_flight: int) -> dict[tuple[object, ...], Tree]:
    """The trees of the jobs by their keys, none of which the backend has failed (`whole`)."""
    async with runtime.run_many(jobs, in_flight, AGAIN) as finished:
        return {job.key: whole(tree) async for job, tree in finished}


def whole(tree: Tree) -> Tree:
    """The tree, unless the backend failed a branch of it: what such a tree earns says nothing about the policy. Raises `PolicyError`."""
    if tree.failed:
        times = f"{tree.regrown + 1} times, the last with"
        raise PolicyError(f"task {tree.task_id} failed {times}: {tree.failed}; see to the backend, and run again to resume")
    return tree


def judged(judge: RewardFunction, task: Task, tree: Tree) -> Reward:
    """What `judge` says. Raises `RewardError` for whatever it raises that is not ours, and for what is no number."""
    try:
        verdict = judge(task, tree)
    except RametError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise RewardError(f"the reward of task {task.id} raised {said}; fix the reward function") from error
    if not isinstance(verdict, Reward):
        raise RewardError(f"the reward of task {task.id} is a {type(verdict).__name__}, not a Reward; fix the reward function")
    for name, value in {"reward": verdict.reward, "score": verdict.score, **verdict.penalties}.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(f"the {name} of task {task.id} is {value!r}, which is no finite number; fix the reward function")
    return verdict


def advantages_of(
    groups: Sequence[Group], verdicts: Sequence[Sequence[Reward]], estimator: str, chat: ChatFormat, clone_scale: float = 1.0
) -> list[list[list[float]]]:
    """Per group, tree and branch: the advantage. The penalty named `REPAIRS` is the root's alone, for the estimator "selfcest"."""
    estimate = partial(selfcest, clone_scale=clone_scale) if estimator == "selfcest" else ESTIMATORS[estimator]

    def texts(tree: Tree) -> tuple[str, ...]:
        if estimator != "selfcest":
            return ()
        return tuple(chat.text([i for turn in branch.turns for i in turn.sampled]) for branch in tree.branches)

    return [
        estimate([ScoredTree(tree, v.reward, v.penalties.get(REPAIRS, 0.0), texts(tree)) for tree, v in zip(trees, judged_, strict=True)])
        for (_, trees), judged_ in zip(groups, verdicts, strict=True)
    ]


def minibatches(groups: Sequence[Group], advantages: Sequence[Sequence[Sequence[float]]], config: TrainConfig) -> list[list[TrainingRow]]:
    """The rows of each optimiser step: whole groups, dealt out in turn. A tree's weight is 1/trees, whatever its fan-out."""
    from ramet.policy.training.rows import rows_of

    made = []
    for part in range(config.minibatches):
        chosen = range(part, len(groups), config.minibatches)
        trees = [(tree, a) for g in chosen for tree, a in zip(groups[g][1], advantages[g], strict=True)]
        weight = 1.0 / (len(trees) * config.length_scale) if trees else 0.0
        made.append([row for tree, a in trees for row in rows_of(tree, a, weight)])
    return made


@dataclass(frozen=True, slots=True)
class Targets:
    """What a batch of rows is trained towards. All (B, T), one entry a token id.

    mask        where a token was sampled
    behaviour   its log-probability under the weights that sampled it
    """

    mask: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, rows: Sequence[TrainingRow]) -> Targets:
        """Of the rows that `batch` was made from."""
        import torch

        chosen = [rows[i] for i in batch.members]
        mask = batch.spread([row.mask for row in rows], torch.bool)

        def alike(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=mask.device)[:, None].expand(mask.shape)

        behaviour = batch.spread([row.logprobs for row in rows])
        return cls(mask, behaviour, alike([row.advantage for row in chosen]), alike([row.weight for row in chosen]))


def update_loss(logprobs: torch.Tensor, entropy: torch.Tensor, kl: torch.Tensor, targets: Targets, config: TrainConfig) -> LossSums:
    """The loss of a batch; the model's side (B, T) as `rows.token_logprobs` gives it."""
    from ramet.policy.training.loss import policy_loss

    t = targets
    clip = (config.clip_low, config.clip_high)
    return policy_loss(logprobs, t.behaviour, t.advantages, t.weights, t.mask, entropy, kl, clip, config.kl_coef, config.dual_clip)


def loss_metrics(sums: Mapping[str, float], config: TrainConfig) -> Metrics:
    """Of the sums of `LossSums` over an update: averages over sampled tokens."""
    tokens = max(sums["tokens"], 1.0)
    return {
        "loss": sums["loss"] / config.epochs,
        "clip_fraction": sums["clipped"] / tokens,
        "behaviour_log_ratio": sums["log_ratio"] / tokens,
        "kl_to_reference": sums["kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
    }


def nothing_sampled(what: str, why: str) -> str:
    """One line on trees for which nothing could be sampled: which, and for want of what (`Tree.starved`)."""
    return (
        f"nothing was sampled for {what}: {why}; raise that limit (budget.context, where it is the budget's context), take a model that "
        "reads more, or make the tasks shorter"
    )


def check_sampled(metrics: Metrics, why: str) -> None:
    """Raises `ConfigError` where nothing could be sampled for any tree of a run's first update, for want of `why`.

    Later ones, whose tasks may all be too long by chance, only count such trees as `starved`.
    """
    if metrics["update"] == 0 and metrics["starved"] == 1:
        raise ConfigError(nothing_sampled("any tree of the first update", why))


def starved(groups: Sequence[Group]) -> list[str]:
    """For each tree that nothing could be sampled for, the limit."""
    return [tree.starved for _, trees in groups for tree in trees if tree.starved]


def summary(
    update: int, groups: Sequence[Group], judged_: Sequence[Sequence[Reward]], advantages: Sequence[Sequence[Sequence[float]]]
) -> Metrics:
    """What was sampled for an update: means over trees, how many were given up and grown anew, and the groups that teach nothing."""
    trees, verdicts = [tree for _, of in groups for tree in of], [v for of in judged_ for v in of]
    count = len(trees)
    found: Metrics = {
        "update": update,
        "reward": sum(v.reward for v in verdicts) / count,
        "accuracy": sum(v.score for v in verdicts) / count,
        "spawn_rate": sum(tree.spawned for tree in trees) / count,
        "clones": sum(tree.usage.clones for tree in trees) / count,
        "generated": sum(tree.usage.generated for tree in trees) / count,
        "critical_path": sum(tree.usage.critical_path for tree in trees) / count,
        "prefilled": sum(tree.usage.prefilled for tree in trees) / count,
        "cached": sum(tree.usage.cached for tree in trees) / count,
    }
    for name in sorted({name for v in verdicts for name in v.penalties}):
        found[f"penalty_{name}"] = sum(v.penalties.get(name, 0.0) for v in verdicts) / count
    for status in Status:
        found[f"status_{status.value.replace(' ', '_')}"] = sum(tree.root.status is status for tree in trees) / count
    found["regrown"] = sum(tree.regrown for tree in trees)
    found["starved"] = len(starved(groups)) / count
    found["zero_advantage_groups"] = sum(all(a == 0 for tree in group for a in tree) for group in advantages)
    return found
