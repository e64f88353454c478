"""The local trainer: sample trees, compute their rewards, update the policy, repeat.

One update:

1. The task sampler returns the update's tasks with their budgets; `group_size` trees are grown for each.
2. The reward function grades each tree; an estimator (`advantages`) turns a group's rewards into one advantage per branch.
3. Rows of whole groups are dealt into `minibatches`; each gets one AdamW step per epoch. The number of
   optimiser steps and the weight of a tree, 1/trees, do not depend on the fan-out. The model computes
   as it does when it samples: without dropout.
4. The sampling policy gets the number of the new weight version, and drops what it had cached.

Every random choice is a function of the configured seed and the update's number, and an update depends on
weights and optimiser state alone, so a run that was killed continues the same curve from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ramet.agents import drain
from ramet.agents.chat import ChatFormat
from ramet.agents.equipment import Equipment
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Job
from ramet.agents.sampling import Sampling
from ramet.agents.transcripts import LIMIT
from ramet.agents.tree import Tree
from ramet.errors import ConfigError, Drained, PolicyError, RametError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from ramet.policy.models.lora import adapt
from ramet.policy.models.masters import Masters
from ramet.policy.training.identity import equipment_identity, identity
from ramet.policy.training.loss import SUMS
from ramet.policy.training.reward import Judge, KeptRewards, Reward, settled
from ramet.policy.training.rows import TrainingRow, batches, token_logprobs
from ramet.policy.training.runlog import RunLog
from ramet.policy.training.update import (
    Group,
    LearningProblem,
    Metrics,
    Targets,
    TrainConfig,
    check_sampled,
    compute_advantages,
    group_trees,
    grow_trees,
    learning_rate,
    limits_reached,
    loss_metrics,
    minibatches,
    rollout_metrics,
    tree_jobs,
    update_loss,
)


@dataclass(frozen=True, slots=True)
class Learner:
    """The policy that is trained, and what is needed to grow trees with it.

    policy              samples from the model, whose weights are changed in place
    tokenizer           saved beside the weights of each checkpoint; its padding id pads batches
    always_show_budget  as in `ramet.agents.runtime.Runtime`
    equipment           what trees have beside the policy: tools, roles, a program
    """

    policy: HFPolicy
    tokenizer: Any
    chat: ChatFormat
    always_show_budget: bool = True
    equipment: Equipment = field(default_factory=Equipment)


class Trainer:
    """Trains one model in place. `directory` receives `metrics.jsonl`, `checkpoints/`, TensorBoard events, and the trees of all updates
    as `trees.jsonl.gz`, up to `transcripts` bytes of them.

    A bfloat16 model samples and computes gradients in bfloat16; its optimiser steps and its checkpoints are float32, and so is the
    model itself after the last update. A checkpoint is resumed only by a trainer with the same seed, configuration and problem:
    the code of the task sampler, the reward function, the tools and the program is compared (`identity`) unless the problem says that it is
    compared already, and so is the problem's fingerprint.
    """

    def __init__(
        self, learner: Learner, problem: LearningProblem, config: TrainConfig, directory: Path, seed: int = 0, transcripts: int = LIMIT
    ):
        self.sample_tasks, self.reward_function, self._rewarding = problem.sample_tasks, problem.reward_function, problem.rewarding
        self._compared = problem.compared
        self._identity = {"seed": seed, "config": config.model_dump(), "data fingerprint": problem.fingerprint}
        self._equipment = self._serving = learner.equipment
        if problem.compared:
            self._identity |= {"tasks": identity(self.sample_tasks), "reward function": identity(self.reward_function)}
            if self._equipment != Equipment():
                self._identity["tools, roles or program"] = equipment_identity(self._equipment)
        self.policy, self.tokenizer, self.chat = learner.policy, learner.tokenizer, learner.chat
        self.model = self.policy.model.eval()
        self.config, self.seed, self.directory = config, seed, directory
        self._always_show_budget = learner.always_show_budget
        self._reference = _frozen_copy(self.model) if config.kl_coef else None
        if config.lora_rank:
            adapt(self.model, config.lora_rank, seed)
        self._masters = Masters(self.model)
        self._weights = list(self._masters.weights.values())
        # Biases and the scales of norms do not decay.
        decays: list[dict[str, Any]] = [{"params": [w for w in self._weights if w.ndim > 1]}]
        decays.append({"params": [w for w in self._weights if w.ndim <= 1], "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(decays, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        self.start = 0
        self.log = RunLog(directory, transcripts)
        self.log.texts = lambda tree: tree.texts(self.chat, self._equipment.chats())
        self._limit_reached = ""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.directory / "checkpoints"

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and drop the metrics of later updates. Returns the number of the next update.

        Raises `ConfigError` if the checkpoint is of another run, `CheckpointError` if it cannot be read.
        """
        path = latest_checkpoint(self.checkpoints)
        if path is not None:
            state = load_checkpoint(path, self._masters, self.optimizer)
            others = [name for name, value in self._identity.items() if state.get(name) != value]
            if others:
                raise ConfigError(f"{self.directory} holds a run with another {' and '.join(others)}; choose another --name or remove it")
            self.start = state["step"]
        self.log.resume(self.start)
        return self.start

    async def train(self, report: Callable[[Metrics], None] | None = None) -> None:
        """Run the remaining updates. `report` is called with the metrics of each.

        When a stop is requested (`ramet.agents.drain`), the update is finished, a checkpoint saved, and `Drained` raised.
        """
        with self.log:
            async with self.policy, self._equipment.serving() as self._serving:
                self.policy.refresh(self.start)
                for update in range(self.start, self.config.updates):
                    metrics = await self.update(update)
                    self.log.write(metrics)
                    check_sampled(metrics, self._limit_reached)
                    done = update + 1
                    stopping = drain.requested() and done < self.config.updates
                    if done % self.config.checkpoint_every == 0 or done == self.config.updates or stopping:
                        self.save(done)
                    if report is not None:
                        report(metrics)
                    if stopping:
                        raise Drained
                self._masters.hand_over()
                self.policy.refresh(self.config.updates)

    async def update_in_service(self, update: int) -> Metrics:
        """As `update`, for a policy that is not serving: it serves for this one update."""
        async with self.policy, self._equipment.serving() as self._serving:
            return await self.update(update)

    def save(self, step: int) -> Path:
        """Write the checkpoint of `step` finished updates, and keep the last two. Raises `StorageError` if the disk refuses."""
        path = save_checkpoint(self.checkpoints, step, self._masters, self.tokenizer, self.optimizer, self._identity)
        prune_checkpoints(self.checkpoints, keep=2)
        self.log.forget_rollouts(step)
        return path

    async def update(self, update: int) -> Metrics:
        """Make update number `update`, from sampling to the last optimiser step. Returns its metrics."""
        started = time.perf_counter()
        judge = Judge(self.reward_function, self._rewarding)
        judged: dict[tuple[object, ...], Future[Reward]] = {}
        with self._kept_rewards(update) as kept:
            groups = await self.rollout(
                update, lambda job, tree: judged.update({job.key: judge.submit(job.task, tree, kept, job.key)})
            )
            self._limit_reached = next(iter(limits_reached(groups)), "")
            sampled = time.perf_counter()
            # Only now, when the samples are complete in the journal, may a reward that failed end the run.
            try:
                rewards = [[await settled(judged[g, n]) for n in range(len(trees))] for g, (_, trees) in enumerate(groups)]
            except RametError as error:
                self.log.keep(update, groups, None, str(error))
                raise
        self.log.keep(update, groups, rewards)
        advantages = compute_advantages(groups, rewards, self.config.estimator, self.chat, self.config.clone_scale)
        metrics = rollout_metrics(update, groups, rewards, advantages)
        metrics |= self._optimise(update, minibatches(groups, advantages, self.config))
        self.policy.refresh(update + 1)
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = time.perf_counter() - sampled
        return metrics

    def _kept_rewards(self, update: int) -> AbstractContextManager[KeptRewards | None]:
        """The rewards of an update that are known; None where they are computed by code of ramet's, or of the caller's, alone."""
        if self._compared:
            return nullcontext()
        return KeptRewards(self.log.rewards / f"{update:06d}.jsonl", fingerprint(self._identity, identity(self.reward_function), update))

    async def rollout(self, update: int, report: Callable[[Job, Tree], object] | None = None) -> list[Group]:
        """Grow the trees of an update. Returns its groups in the order of the task sampler, whatever the order in which trees finish.

        `report` is called with each tree as soon as it is finished.
        """
        tasks = list(self.sample_tasks(update))
        jobs = tree_jobs(tasks, update, self.config.group_size, self.seed)
        finished = self.log.rollouts / f"{update:06d}.jsonl"
        draft = finished.with_suffix(".draft")
        # Half an update is sampled again as a whole: in other batches, the rest of it would differ in the last bits.
        draft.unlink(missing_ok=True)
        with Journal(finished if finished.exists() else draft, fingerprint(self._identity, update)) as journal:
            policy = JournaledPolicy(self.policy, journal)
            sampling = Sampling(temperature=self.config.temperature)
            equipment = self._serving.journaled(journal)
            runtime = equipment.runtime(policy, self.chat, sampling, always_show_budget=self._always_show_budget)
            trees = await grow_trees(runtime, jobs, 4 * self.config.max_batch, report)
        if draft.exists():
            draft.replace(finished)
        return group_trees(tasks, trees, self.config.group_size)

    def _optimise(self, update: int, steps: list[list[TrainingRow]]) -> Metrics:
        """Make one optimiser step per epoch for the rows of each of `steps`. Returns the metrics of the loss and the gradient."""
        config = self.config
        rate = learning_rate(config, update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = dict.fromkeys(SUMS, 0.0)
        norms, row_tokens, padded_tokens = [], 0, 0
        for _ in range(config.epochs):
            for rows in steps:
                for batch_sums, unpadded, padded in self._backward(rows):
                    row_tokens, padded_tokens = row_tokens + unpadded, padded_tokens + padded
                    for name in sums:
                        sums[name] += batch_sums[name]
                norm = torch.nn.utils.clip_grad_norm_(self._weights, config.max_grad_norm)
                if not torch.isfinite(norm):
                    raise PolicyError(
                        f"the gradient of update {update} is not finite; lower learning_rate and resume from the last checkpoint"
                    )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self._masters.publish()
                norms.append(float(norm))
        return {
            **loss_metrics(sums, config),
            "gradient_norm": sum(norms) / len(norms),
            "learning_rate": rate,
            "optimizer_steps": len(norms),
            "trained_tokens": row_tokens,
            "padding": 1 - row_tokens / max(padded_tokens, 1),
        }

    def _backward(self, rows: list[TrainingRow]) -> list[tuple[dict[str, float], int, int]]:
        """Add the gradient of the loss of the rows. Returns for each batch the sums of its loss, its tokens, and those with padding."""
        results = []
        for batch in batches([row.ids for row in rows], self.config.batch_tokens, self.tokenizer.pad_token_id or 0):
            members = [rows[i] for i in batch.members]
            batch = replace(batch, ids=batch.ids.to(self.policy.device))
            ids = batch.ids
            inputs = self.policy.training_inputs(ids, [row.ids for row in members], [row.media for row in members])
            logprobs, entropy, kl = token_logprobs(self.model, ids, self.config.temperature, self._reference, inputs)
            sums = update_loss(logprobs, entropy, kl, Targets.from_rows(batch, rows), self.config)
            sums.loss.backward()
            self._masters.collect()
            results.append((sums.values(), sum(len(row.ids) for row in members), ids.numel()))
        return results


def _frozen_copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()


def run_trainer(trainer: Trainer, report: Callable[[Metrics], None] | None = None) -> None:
    """Resume from the last checkpoint and train to the last update, from synchronous code."""
    trainer.resume()
    drain.run(trainer.train, report)
