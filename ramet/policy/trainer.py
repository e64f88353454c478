"""The local trainer: sample trees, score them, one policy update, again.

One iteration:

1. `draw` gives the update's tasks with their budgets; each is rolled out `group_size` times.
2. `judge` scores each tree; `credit` turns a group's rewards into one advantage per branch.
3. Rows of whole groups are dealt into `minibatches`; each gets one AdamW step per epoch. The number of
   optimiser steps is fixed, whatever the fan-out. A tree's weight is 1/trees, whatever its fan-out.
4. The sampling engine is told the new weight version.

Every random choice is a function of the configured seed and the update's number, and an update starts
from nothing but weights and optimiser state, so a run that was killed continues, from its last
checkpoint, the curve that it was on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import torch
from pydantic import BaseModel, ConfigDict, Field

from ramet.agents import drain
from ramet.agents.actor import seed_of
from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.journal import Journal, fingerprint
from ramet.agents.resume import JournaledPolicy
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Status, Task, Tree
from ramet.errors import ConfigError, PolicyError, RametError, RewardError, StorageError, first_line
from ramet.policy.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from ramet.policy.credit import ESTIMATORS, ScoredTree
from ramet.policy.hf import HFPolicy
from ramet.policy.lora import adapt, trainable
from ramet.policy.loss import policy_loss
from ramet.policy.rows import Row, batches, rows_of, token_logprobs

_Count = Annotated[int, Field(ge=1)]


class TrainConfig(BaseModel):
    """One training run. Tokens are counted as sampled or fed, without padding.

    tasks           groups per update
    group_size      trees per task
    minibatches     optimiser steps per epoch of an update
    decay           share of the learning rate that is lost, linearly, between the warm-up and the last update
    lora_rank       0: all weights are trained; else adapters of this rank
    length_scale    tokens; divides the summed loss of a tree. A constant, so it sets the size of the
                    gradient before clipping and nothing else
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    updates: _Count = 100
    tasks: Annotated[int, Field(ge=1)] = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    minibatches: _Count = 2
    epochs: _Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 10
    decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    kl: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    estimator: Literal["team", "standardised", "branch_mean", "reference"] = "team"
    lora_rank: Annotated[int, Field(ge=0)] = 0
    length_scale: _Count = 64
    batch_tokens: _Count = 1024
    checkpoint_every: _Count = 20
    max_batch: _Count = 128


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a tree earned: its score in [0, 1], its penalties by name, and the reward that they make."""

    score: float
    penalties: Mapping[str, float]
    reward: float


def learning_rate(config: TrainConfig, update: int) -> float:
    """The learning rate of update number `update`, from 0 on: a linear warm-up, then linear decay."""
    if update < config.warmup:
        return config.learning_rate * (update + 1) / config.warmup
    return config.learning_rate * (1 - config.decay * (update - config.warmup) / max(config.updates - config.warmup, 1))


Draw = Callable[[int], Sequence[tuple[Task, Budget]]]
Judge = Callable[[Task, Tree], Verdict]
Metrics = dict[str, float | int]


class Trainer:
    """Trains one model in place. `directory` receives `metrics.jsonl`, `checkpoints/` and TensorBoard events.

    `job` names what `draw` and `judge` do; a checkpoint of another job is not resumed. `tell_all`: see `Runtime`. `policy` samples, by
    default an `HFPolicy` of the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        chat: ChatFormat,
        draw: Draw,
        judge: Judge,
        config: TrainConfig,
        directory: Path,
        seed: int = 0,
        job: str = "",
        tell_all: bool = True,
        policy: HFPolicy | None = None,
    ):
        self._identity = {"seed": seed, "config": config.model_dump(), "job": job}
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.draw, self.judge, self.config, self.seed = draw, judge, config, seed
        self.directory = directory
        self._tell_all = tell_all
        self.policy = policy or HFPolicy(model, max_batch=config.max_batch)
        self._reference = _frozen_copy(model) if config.kl else None
        if config.lora_rank:
            adapt(model, config.lora_rank, seed)
        self._weights = list(trainable(model).values())
        self.optimizer = torch.optim.AdamW(self._weights, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        self.start = 0
        self._metrics = directory / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Journals of the samples of every update since the last checkpoint, so that these are not sampled again."""
        return self.directory / "rollouts"

    def resume(self) -> int:
        """Load the last checkpoint, if there is one; metrics past it are dropped. Returns the next update."""
        path = latest_checkpoint(self.checkpoints)
        if path is not None:
            state = load_checkpoint(path, self.model, self.optimizer)
            if any(state.get(name) != value for name, value in self._identity.items()):
                raise ConfigError(f"{self.directory} holds a run with another seed or configuration; choose another --name or remove it")
            self.start = state["step"]
        kept = [line for line in self._lines() if json.loads(line)["update"] < self.start]
        if self._metrics.exists():
            draft = self._metrics.with_name("metrics.draft")
            _write(draft, "".join(line + "\n" for line in kept), "w")
            draft.replace(self._metrics)
        return self.start

    def _lines(self) -> list[str]:
        """Complete lines of metrics.jsonl; a line cut by a crash is left out."""
        if not self._metrics.exists():
            return []
        lines = []
        for line in self._metrics.read_text().splitlines():
            try:
                json.loads(line)
            except ValueError:
                break
            lines.append(line)
        return lines

    async def train(self, report: Callable[[Metrics], None] | None = None) -> None:
        """Run the updates that are left. `report` gets each update's metrics.

        Asked to stop (`ramet.agents.drain`), it ends the update, saves a checkpoint and raises `Drained`.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.directory.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self.start)
        try:
            async with self.policy:
                self.policy.refresh(self.start)
                for update in range(self.start, self.config.updates):
                    metrics = await self.update(update)
                    _write(self._metrics, json.dumps(metrics) + "\n", "a")
                    for name, value in metrics.items():
                        writer.add_scalar(name, value, update)
                    done = update + 1
                    stopping = drain.requested() and done < self.config.updates
                    if done % self.config.checkpoint_every == 0 or done == self.config.updates or stopping:
                        self.save(done)
                    if report is not None:
                        report(metrics)
                    if stopping:
                        raise drain.Drained
        finally:
            writer.close()

    async def update_in_service(self, update: int) -> Metrics:
        """One iteration by itself, serving the policy for as long as it takes."""
        async with self.policy:
            return await self.update(update)

    def save(self, step: int) -> Path:
        path = save_checkpoint(self.checkpoints, step, self.model, self.tokenizer, self.optimizer, self._identity)
        prune_checkpoints(self.checkpoints, keep=2)
        for journal in self.rollouts.glob("*.jsonl"):
            if int(journal.stem) < step:
                journal.unlink()
        return path

    async def update(self, update: int) -> Metrics:
        """One iteration; returns its metrics."""
        started = time.perf_counter()
        groups = await self.rollout(update)
        sampled = time.perf_counter()
        verdicts = [[self._judged(task, tree) for tree in trees] for task, trees in groups]
        estimate = ESTIMATORS[self.config.estimator]
        scored: list[list[ScoredTree]] = []
        for (_, trees), judged in zip(groups, verdicts, strict=True):
            scored.append([ScoredTree(tree, v.reward, texts=self._texts(tree)) for tree, v in zip(trees, judged, strict=True)])
        advantages = [estimate(group) for group in scored]
        metrics: Metrics = {"update": update, **_summary([tree for _, trees in groups for tree in trees], [v for j in verdicts for v in j])}
        metrics["idle_groups"] = sum(all(a == 0 for tree in group for a in tree) for group in advantages)
        metrics |= self._optimise(update, [trees for _, trees in groups], advantages)
        self.policy.refresh(update + 1)
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = time.perf_counter() - sampled
        return metrics

    def _judged(self, task: Task, tree: Tree) -> Verdict:
        try:
            return self.judge(task, tree)
        except RametError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            raise RewardError(f"the reward of task {task.id} raised {said}; fix the reward function") from error

    def _texts(self, tree: Tree) -> tuple[str, ...]:
        if self.config.estimator != "reference":
            return ()
        return tuple(self.chat.text([i for turn in branch.turns for i in turn.sampled]) for branch in tree.branches)

    async def rollout(self, update: int) -> list[tuple[Task, list[Tree]]]:
        """The update's groups, in the order of `draw` whatever the order in which trees finished."""
        drawn = list(self.draw(update))
        jobs = [
            Job(task, budget, seed_of(self.seed, f"train/{update}/{g}", n), (g, n))
            for g, (task, budget) in enumerate(drawn)
            for n in range(self.config.group_size)
        ]
        trees: dict[tuple[object, ...], Tree] = {}
        whole = self.rollouts / f"{update:06d}.jsonl"
        draft = whole.with_suffix(".draft")
        # Half an update is sampled again as a whole: in other batches, the rest of it would differ in the last bits.
        draft.unlink(missing_ok=True)
        with Journal(whole if whole.exists() else draft, fingerprint(self._identity, update)) as journal:
            policy = JournaledPolicy(self.policy, journal)
            runtime = Runtime(policy, self.chat, Sampling(temperature=self.config.temperature), tell_all=self._tell_all)
            async with runtime.run_many(jobs, in_flight=4 * self.config.max_batch) as finished:
                async for job, tree in finished:
                    if tree.root.status is Status.FAILED:
                        raise PolicyError(f"task {job.task.id} failed: {tree.error}")
                    trees[job.key] = tree
        if draft.exists():
            draft.replace(whole)
        return [(task, [trees[g, n] for n in range(self.config.group_size)]) for g, (task, _) in enumerate(drawn)]

    def _optimise(self, update: int, groups: list[list[Tree]], advantages: list[list[list[float]]]) -> Metrics:
        """The update's fixed number of optimiser steps. Returns loss metrics, averaged over sampled tokens."""
        config = self.config
        rate = learning_rate(config, update)
        for setting in self.optimizer.param_groups:
            setting["lr"] = rate
        parts = [range(part, len(groups), config.minibatches) for part in range(config.minibatches)]
        minibatches = []
        for part in parts:
            trees = [(tree, a) for g in part for tree, a in zip(groups[g], advantages[g], strict=True)]
            weight = 1.0 / (len(trees) * config.length_scale) if trees else 0.0
            minibatches.append([row for tree, a in trees for row in rows_of(tree, a, weight)])
        sums = dict.fromkeys(("loss", "tokens", "clipped", "log_ratio", "kl", "entropy"), 0.0)
        norms, fed, padded = [], 0, 0
        self.model.train()
        for _ in range(config.epochs):
            for rows in minibatches:
                for batch_sums, real, all_ in self._backward(rows):
                    fed, padded = fed + real, padded + all_
                    for name in sums:
                        sums[name] += batch_sums[name]
                norm = torch.nn.utils.clip_grad_norm_(self._weights, config.gradient_clip)
                if not torch.isfinite(norm):
                    raise PolicyError(
                        f"the gradient of update {update} is not finite; lower learning_rate and resume from the last checkpoint"
                    )
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                norms.append(float(norm))
        self.model.eval()
        tokens = max(sums["tokens"], 1.0)
        return {
            "loss": sums["loss"] / config.epochs,
            "clip_fraction": sums["clipped"] / tokens,
            "behaviour_log_ratio": sums["log_ratio"] / tokens,
            "kl_to_reference": sums["kl"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "gradient_norm": sum(norms) / len(norms),
            "learning_rate": rate,
            "optimizer_steps": len(norms),
            "trained_tokens": fed,
            "padding": 1 - fed / max(padded, 1),
        }

    def _backward(self, rows: list[Row]) -> list[tuple[dict[str, float], int, int]]:
        results = []
        for batch in batches([row.ids for row in rows], self.config.batch_tokens, self.tokenizer.pad_token_id or 0):
            chosen = [rows[i] for i in batch.members]
            ids = batch.ids.to(self.policy.device)
            mask = batch.spread([row.mask for row in rows], torch.bool).to(ids.device)
            behaviour = batch.spread([row.logprobs for row in rows]).to(ids.device)
            advantages = torch.tensor([row.advantage for row in chosen], device=ids.device)[:, None].expand(ids.shape)
            weights = torch.tensor([row.weight for row in chosen], device=ids.device)[:, None].expand(ids.shape)
            inputs = self.policy.training_inputs(ids, [row.ids for row in chosen], [row.media for row in chosen])
            logprobs, entropy, kl = token_logprobs(self.model, ids, self.config.temperature, self._reference, inputs)
            sums = policy_loss(
                logprobs, behaviour, advantages, weights, mask, entropy, kl,
                (self.config.clip_low, self.config.clip_high), self.config.kl,
            )  # fmt: skip
            sums.loss.backward()
            values = {name: float(getattr(sums, name).detach()) for name in ("loss", "tokens", "clipped", "log_ratio", "kl", "entropy")}
            results.append((values, sum(len(row.ids) for row in chosen), ids.numel()))
        return results


def _summary(trees: Sequence[Tree], verdicts: Sequence[Verdict]) -> Metrics:
    """Means over trees."""
    count = len(trees)
    summary: Metrics = {
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
        summary[f"penalty_{name}"] = sum(v.penalties.get(name, 0.0) for v in verdicts) / count
    for status in Status:
        summary[f"status_{status.value.replace(' ', '_')}"] = sum(tree.root.status is status for tree in trees) / count
    return summary


def _frozen_copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space and run again to resume") from error


def run_trainer(trainer: Trainer, report: Callable[[Metrics], None] | None = None) -> None:
    """Resume and train to the end, from synchronous code."""
    trainer.resume()
    anyio.run(trainer.train, report)
