"""The controller of a run: one actor that requests trees from the engines and updates from the trainers, and writes the run folder."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from openrlhf.trainer.ppo_trainer import BasePPOTrainer

from ramet.errors import ConfigError, Drained, PartLost, PolicyError, RametError, StorageError
from ramet.policy.models.checkpoint import TRAINER, checkpoint_path, prune_checkpoints
from ramet.policy.models.tokenizer import load_tokenizer
from ramet.policy.openrlhf import cpu
from ramet.policy.openrlhf.experience import TreeExperience
from ramet.policy.openrlhf.flags import STOP
from ramet.policy.openrlhf.samples import TreeSamples
from ramet.policy.openrlhf.settings import RunSpec, part_lost
from ramet.policy.training.loss import SUMS
from ramet.policy.training.runlog import RunLog
from ramet.policy.training.update import (
    Metrics,
    check_sampled,
    compute_advantages,
    learning_rate,
    limits_reached,
    loss_metrics,
    minibatches,
    rollout_metrics,
)

WATCH_SECONDS = 2.0
"""Seconds between two checks that all actors are alive."""
NOTICE_SECONDS = 30.0
"""Seconds that Ray takes at most to notice that a node is gone."""


class TreeTrainer(BasePPOTrainer):
    """Runs the updates. While one is trained, the trees of up to `staleness` later updates grow."""

    spec: RunSpec

    def __init__(
        self,
        pretrain: str,
        strategy: Any,
        actor_model_group: Any,
        critic_model_group: Any,
        reward_model_group: Any,
        reference_model_group: Any,
        vllm_engines: Any,
        **generate_kwargs: Any,
    ) -> None:
        cpu.activate()
        super().__init__(strategy, actor_model_group, critic_model_group, reward_model_group, reference_model_group, vllm_engines, None)
        self.samples_generator: Any = None
        self.log = RunLog(self.spec.directory, self.spec.transcripts)
        self._recomputed = 0
        self._limit_reached = ""

    def get_max_steps(self) -> int:
        """Optimiser steps of the run. OpenRLHF calls it before anything is trained, so mistakes in the run's settings are found here."""
        spec = self.spec
        tokenizer, self.chat = load_tokenizer(spec.model, spec.chat)
        groups = (self.actor_model_group, self.critic_model_group, None, None)
        self.tokenizer = tokenizer
        chats = spec.build_equipment().chats()
        self.log.texts = lambda tree: tree.texts(self.chat, chats)
        self.experience_maker = TreeExperience(spec.cluster, spec.train.batch_tokens, *groups, self.kl_ctl, self.strategy, tokenizer)
        problem = spec.build_problem(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        self.spec = spec = spec.identified(problem)
        self.samples_generator = TreeSamples(self.strategy, self.vllm_engines, spec, self.log.rollouts, problem, self._some_done)
        # An engine that does not start would leave the trainers waiting for it.
        self._all([engine.get_num_unfinished_requests.remote() for engine in self.vllm_engines])
        return spec.train.updates * spec.train.minibatches * spec.train.epochs

    def fit(self, global_step: int = 0) -> None:
        """Run the remaining updates. When a stop is requested, saves a checkpoint and raises `Drained`."""
        train, staleness = self.spec.train, self.spec.cluster.staleness
        start = self._resumed()
        self.log.resume(start)
        if start:
            self._sync(start)
            if not self._checkpoint(start).exists():
                self._export(start)
        stop = self.spec.directory / STOP
        with self.log:
            for update in range(start, train.updates):
                for ahead in range(update, min(update + staleness + 1, train.updates)):
                    self.samples_generator.begin(ahead)
                metrics = self._update(update)
                self.log.write(metrics)
                check_sampled(metrics, self._limit_reached)
                done = update + 1
                stopping = stop.exists() and done < train.updates
                if done % train.checkpoint_every == 0 or done == train.updates or stopping:
                    self._save(done)
                if stopping:
                    raise Drained

    def _update(self, update: int) -> Metrics:
        train, cluster = self.spec.train, self.spec.cluster
        started = time.perf_counter()
        groups, judged = self.samples_generator.collect(update)
        try:
            rewards = [[future.result() for future in of_group] for of_group in judged]
        except RametError as error:
            self.log.keep(update, groups, None, str(error))
            raise
        self.log.keep(update, groups, rewards)
        self._limit_reached = next(iter(limits_reached(groups)), "")
        sampled = time.perf_counter()
        if cluster.critic:
            advantages = [
                [[reward.reward] * len(tree.branches) for tree, reward in zip(trees, group_rewards, strict=True)]
                for (_, trees), group_rewards in zip(groups, rewards, strict=True)
            ]
        else:
            advantages = compute_advantages(groups, rewards, train.estimator, self.chat, train.clone_scale)
        metrics = rollout_metrics(update, groups, rewards, advantages)
        steps = minibatches(groups, advantages, train)
        versions = [v for rows in steps for row in rows for v in row.versions if v >= 0]
        if update - min(versions) > cluster.staleness:
            raise PolicyError(
                f"update {update} has tokens of weight version {min(versions)}, older than openrlhf.staleness allows; report this bug"
            )
        metrics["staleness"] = update - sum(versions) / len(versions)
        metrics["staleness_max"] = update - min(versions)

        dealt = self.experience_maker.make_experience_batch(steps)
        rate = learning_rate(train, update)
        models = [self.actor_model_group, *([self.critic_model_group] if cluster.critic else [])]
        self._all([ref for group in models for ref in group.async_run_method_batch("append", experience=dealt.experiences)])
        refs = self.actor_model_group.async_run_method("fit", steps=dealt.steps, rate=rate)
        if cluster.critic:
            refs += self.critic_model_group.async_run_method("fit", steps=dealt.steps, tokens=dealt.tokens)
        results = self._all(refs)
        policy_results = results[: cluster.trainers]
        metrics |= loss_metrics({name: sum(result[name] for result in policy_results) for name in SUMS}, train)
        metrics |= {"gradient_norm": policy_results[0]["gradient_norm"], "learning_rate": rate}
        metrics["optimizer_steps"] = train.minibatches * train.epochs
        if cluster.critic:
            metrics["critic_loss"] = sum(result["critic_loss"] for result in results[cluster.trainers :])
        trained = time.perf_counter()
        recomputed = self._sync(update + 1)
        metrics["recomputed"] = (recomputed - self._recomputed) / sum(len(trees) for _, trees in groups)
        self._recomputed = recomputed
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = trained - sampled
        metrics["seconds_syncing"] = time.perf_counter() - trained
        return metrics

    def _sync(self, version: int) -> int:
        """Send the trainers' weights to the engines. Returns the tokens that all engines have recomputed after such changes so far."""
        self._all([engine.pause_generation.remote() for engine in self.vllm_engines])
        self._all(self.actor_model_group.async_run_method("broadcast_to_vllm"))
        return sum(self._all([engine.resume_generation.remote(version) for engine in self.vllm_engines]))

    def _checkpoint(self, step: int) -> Path:
        return checkpoint_path(self.spec.directory / "checkpoints", step)

    def _save(self, step: int) -> None:
        """Save DeepSpeed's states, the critic's first since a run resumes from the policy's, then the weights as a model directory."""
        tag = f"global_step{step}"
        for states in (self.spec.directory / "openrlhf").glob("_*"):
            # OpenRLHF deletes old states before it writes a new one: leave it only the last complete state, which it keeps.
            last = (states / "latest").read_text(encoding="utf-8") if (states / "latest").exists() else ""
            for other in states.iterdir():
                if other.is_dir() and other.name != last:
                    shutil.rmtree(other)
        if self.critic_model_group is not None:
            self._all(self.critic_model_group.async_run_method("save_checkpoint", tag=tag))
        state = {"step": step, "fingerprint": self.spec.fingerprint}
        self._all(self.actor_model_group.async_run_method("save_checkpoint", tag=tag, client_states=state))
        self._export(step)
        self.log.forget_rollouts(step)

    def _export(self, step: int) -> None:
        """The weights as a model directory among the run's checkpoints."""
        exported, target = self.spec.directory / "openrlhf" / "export", self._checkpoint(step)
        shutil.rmtree(exported, ignore_errors=True)
        self._all(self.actor_model_group.async_run_method("export", str(exported)))
        try:
            state = {"step": step, "seed": self.spec.seed, "fingerprint": self.spec.fingerprint, "trainer": "openrlhf"}
            (exported / TRAINER).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            exported.rename(target)
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot write checkpoint {target}: {reason}; free space and run again to resume") from error
        prune_checkpoints(target.parent, keep=2)

    def _resumed(self) -> int:
        """The number of the next update, from DeepSpeed's last complete state. Raises `ConfigError` if that is of another run."""
        states = self._all(self.actor_model_group.async_run_method("get_checkpoint_states"))[0]
        if states and states["fingerprint"] != self.spec.fingerprint:
            raise ConfigError(
                f"{self.spec.directory} holds a run with another seed, configuration, tasks or reward function; "
                "choose another --name or remove it"
            )
        return int(states["step"]) if states else 0

    def _some_done(self, refs: list[Any]) -> dict[Any, Any]:
        """Wait for at least one of Ray's references; the values of all that are done. Raises `PartLost` if an actor of the run has died."""
        while not ray.wait(refs, num_returns=1, timeout=WATCH_SECONDS)[0]:
            self._watch()
        values: dict[Any, Any] = {}
        failed: BaseException | None = None
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            try:
                values[ref] = ray.get(ref)
            except Exception as error:
                failed = failed or error
        # Values are returned first; a reference that failed fails again at the next call.
        if failed is not None and not values:
            self._explain(failed)
            raise failed
        return values

    def _explain(self, error: BaseException) -> None:
        """Raise `PartLost` if an actor's death caused the error: its peers may fail before Ray reports it, so that is waited for."""
        cause = getattr(error, "cause", None)
        if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(cause, RametError) and not part_lost(cause):
            until = time.monotonic() + NOTICE_SECONDS
            while time.monotonic() < until:
                self._watch()
                time.sleep(WATCH_SECONDS)

    def _all(self, refs: list[Any]) -> list[Any]:
        """Wait for all of Ray's references; their values, in order. Trees that finish meanwhile are kept."""
        values: dict[Any, Any] = {}
        while left := [ref for ref in refs if ref not in values]:
            finished = self._some_done([*left, *self.samples_generator.growing])
            values |= {ref: finished.pop(ref) for ref in left if ref in finished}
            self.samples_generator.keep(finished)
        return [values[ref] for ref in refs]

    def _watch(self) -> None:
        # An actor that exchanges weights or gradients with a dead one waits for ever.
        groups = [group._actor_handlers for group in (self.actor_model_group, self.critic_model_group) if group is not None]
        for handle in [*self.vllm_engines, *(handle for group in groups for handle in group)]:
            actor = ray._private.state.actors(handle._actor_id.hex())
            if actor.get("State") == "DEAD":
                raise PartLost(f"{actor.get('ActorClassName', 'an actor')} (process {actor.get('Pid')}) has died")
