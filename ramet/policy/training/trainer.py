"""The local trainer: sample trees, score them, one policy update, again.

One iteration:

1. `draw` gives the update's tasks with their budgets; each is rolled out `group_size` times.
2. `judge` scores each tree; `credit` turns a group's rewards into one advantage per branch.
3. Rows of whole groups are dealt into `minibatches`; each gets one AdamW step per epoch. The number of
   optimiser steps is fixed, whatever the fan-out. A tree's weight is 1/trees, whatever its fan-out. The model computes
   as it does when it samples: nothing is dropped out.
4. The sampling engine is told the new weight version.

Every random choice is a function of the configured seed and the update's number, and an update starts
from nothing but weights and optimiser state, so a run that was killed continues, from its last
checkpoint, the curve that it was on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ramet.agents import drain
from ramet.agents.chat import ChatFormat
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.prefixes import FreshCache
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Sampling
from ramet.errors import ConfigError, Drained, PolicyError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from ramet.policy.models.lora import adapt
from ramet.policy.models.masters import Masters
from ramet.policy.training.identity import identity
from ramet.policy.training.loss import SUMS
from ramet.policy.training.rows import TrainingRow, batches, token_logprobs
from ramet.policy.training.runlog import RunLog
from ramet.policy.training.update import (
    Group,
    Metrics,
    RewardFunction,
    Targets,
    TaskSampler,
    TrainConfig,
    advantages_of,
    check_sampled,
    grouped,
    grow,
    jobs_of,
    judged,
    learning_rate,
    loss_metrics,
    minibatches,
    starved,
    summary,
    update_loss,
)


class Trainer:
    """Trains one model in place. `directory` receives `metrics.jsonl`, `checkpoints/` and TensorBoard events.

    A model in bfloat16 samples and computes gradients in it; what is stepped, stored and left in its place at the end is float32.
    `job` names what `draw` and `judge` depend on besides their code; a checkpoint of another job, or of another draw or judge
    (`identity`), is not resumed. `always_show_budget`: see `Runtime`. `policy` samples, by
    default an `HFPolicy` of the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        chat: ChatFormat,
        draw: TaskSampler,
        judge: RewardFunction,
        config: TrainConfig,
        directory: Path,
        seed: int = 0,
        job: str = "",
        always_show_budget: bool = True,
        policy: HFPolicy | None = None,
    ):
        self._identity = {
            "seed": seed, "config": config.model_dump(), "job": job, "tasks": identity(draw), "reward function": identity(judge)
        }  # fmt: skip
        self.model, self.tokenizer, self.chat = model.eval(), tokenizer, chat
        self.draw, self.judge, self.config, self.seed = draw, judge, config, seed
        self.directory = directory
        self._always_show_budget = always_show_budget
        self.policy = policy or HFPolicy(model, max_batch=config.max_batch)
        self._reference = _frozen_copy(model) if config.kl_coef else None
        if config.lora_rank:
            adapt(model, config.lora_rank, seed)
        self._masters = Masters(model)
        self._weights = list(self._masters.weights.values())
        # Biases and the scales of norms do not decay.
        decays: list[dict[str, Any]] = [{"params": [w for w in self._weights if w.ndim > 1]}]
        decays.append({"params": [w for w in self._weights if w.ndim <= 1], "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(decays, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        self.start = 0
        self.log = RunLog(directory)
        self._starved = ""

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; metrics past it are dropped. Returns the next update."""
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
        """Run the updates that are left. `report` gets each update's metrics.

        Asked to stop (`ramet.agents.drain`), it ends the update, saves a checkpoint and raises `Drained`.
        """
        with self.log:
            async with self.policy:
                self.policy.refresh(self.start)
                for update in range(self.start, self.config.updates):
                    metrics = await self.update(update)
                    self.log.write(metrics)
                    check_sampled(metrics, self._starved)
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
        """One iteration by itself, serving the policy for as long as it takes."""
        async with self.policy:
            return await self.update(update)

    def save(self, step: int) -> Path:
        path = save_checkpoint(self.checkpoints, step, self._masters, self.tokenizer, self.optimizer, self._identity)
        prune_checkpoints(self.checkpoints, keep=2)
        self.log.forget_rollouts(step)
        return path

    async def update(self, update: int) -> Metrics:
        """One iteration; returns its metrics."""
        started = time.perf_counter()
        groups = await self.rollout(update)
        self._starved = next(iter(starved(groups)), "")
        sampled = time.perf_counter()
        verdicts = [[judged(self.judge, task, tree) for tree in trees] for task, trees in groups]
        advantages = advantages_of(groups, verdicts, self.config.estimator, self.chat, self.config.clone_scale)
        metrics = summary(update, groups, verdicts, advantages)
        metrics |= self._optimise(update, minibatches(groups, advantages, self.config))
        self.policy.refresh(update + 1)
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = time.perf_counter() - sampled
        return metrics

    async def rollout(self, update: int) -> list[Group]:
        """The update's groups, in the order of `draw` whatever the order in which trees finished."""
        drawn = list(self.draw(update))
        jobs = jobs_of(drawn, update, self.config.group_size, self.seed)
        whole = self.log.rollouts / f"{update:06d}.jsonl"
        draft = whole.with_suffix(".draft")
        # Half an update is sampled again as a whole: in other batches, the rest of it would differ in the last bits.
        draft.unlink(missing_ok=True)
        with Journal(whole if whole.exists() else draft, fingerprint(self._identity, update)) as journal:
            policy = JournaledPolicy(self.policy, journal)
            sampling = Sampling(temperature=self.config.temperature)
            runtime = Runtime(FreshCache(policy), self.chat, sampling, always_show_budget=self._always_show_budget)
            trees = await grow(runtime, jobs, 4 * self.config.max_batch)
        if draft.exists():
            draft.replace(whole)
        return grouped(drawn, trees, self.config.group_size)

    def _optimise(self, update: int, parts: list[list[TrainingRow]]) -> Metrics:
        """The update's fixed number of optimiser steps. Returns loss metrics, averaged over sampled tokens."""
        config = self.config
        rate = learning_rate(config, update)
        for setting in self.optimizer.param_groups:
            setting["lr"] = rate
        sums = dict.fromkeys(SUMS, 0.0)
        norms, fed, padded = [], 0, 0
        for _ in range(config.epochs):
            for rows in parts:
                for batch_sums, real, all_ in self._backward(rows):
                    fed, padded = fed + real, padded + all_
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
            "trained_tokens": fed,
            "padding": 1 - fed / max(padded, 1),
        }

    def _backward(self, rows: list[TrainingRow]) -> list[tuple[dict[str, float], int, int]]:
        results = []
        for batch in batches([row.ids for row in rows], self.config.batch_tokens, self.tokenizer.pad_token_id or 0):
            chosen = [rows[i] for i in batch.members]
            batch = replace(batch, ids=batch.ids.to(self.policy.device))
            ids = batch.ids
            inputs = self.policy.training_inputs(ids, [row.ids for row in chosen], [row.media for row in chosen])
            logprobs, entropy, kl = token_logprobs(self.model, ids, self.config.temperature, self._reference, inputs)
            sums = update_loss(logprobs, entropy, kl, Targets.of(batch, rows), self.config)
            sums.loss.backward()
            self._masters.collect()
            results.append((sums.values(), sum(len(row.ids) for row in chosen), ids.numel()))
        return results


def _frozen_copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()


def run_trainer(trainer: Trainer, report: Callable[[Metrics], None] | None = None) -> None:
    """Resume and train to the end, from synchronous code."""
    trainer.resume()
    drain.run(trainer.train, report)
