"""The controller of a run: one actor that asks engines for trees and trainers for updates, and keeps the run folder."""

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
from ramet.policy.training.update import Metrics, advantages_of, check_sampled, learning_rate, loss_metrics, minibatches, starved, summary

WATCH_SECONDS = 2.0
NOTICE_SECONDS = 30.0
"""Ray takes that long to notice that a node is gone."""


class TreeTrainer(BasePPOTrainer):
    """Runs the updates. While one is trained, the trees of the next `staleness` ones may already grow."""

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
        self.log = RunLog(self.spec.directory)
        self._recomputed = 0
        self._starved = ""

    def get_max_steps(self) -> int:
        """Optimiser steps of the run. OpenRLHF asks before anything is trained, so what may be wrong with the run is found here."""
        spec = self.spec
        tokenizer, self.chat = load_tokenizer(spec.model, spec.chat)
        groups = (self.actor_model_group, self.critic_model_group, None, None)
        self.tokenizer = tokenizer
        self.experience_maker = TreeExperience(spec.cluster, spec.train.batch_tokens, *groups, self.kl_ctl, self.strategy, tokenizer)
        draw, judge = spec.recipe(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        self.spec = spec = spec.identified(draw, judge)
        self.samples_generator = TreeSamples(self.strategy, self.vllm_engines, spec, self.log.rollouts, draw, judge, self._some)
        # An engine that does not start would leave the trainers waiting for it.
        self._all([engine.get_num_unfinished_requests.remote() for engine in self.vllm_engines])
        return spec.train.updates * spec.train.minibatches * spec.train.epochs

    def fit(self, global_step: int = 0) -> None:
        """Run the updates that are left. Raises `Drained` if asked to stop."""
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
                check_sampled(metrics, self._starved)
                done = update + 1
                stopping = stop.exists() and done < train.updates
                if done % train.checkpoint_every == 0 or done == train.updates or stopping:
                    self._save(done)
                if stopping:
                    raise Drained

    def _update(self, update: int) -> Metrics:
        train, cluster = self.spec.train, self.spec.cluster
        started = time.perf_counter()
        groups, verdicts = self.samples_generator.collect(update)
        self._starved = next(iter(starved(groups)), "")
        sampled = time.perf_counter()
        if cluster.critic:
            advantages = [
                [[v.reward] * len(tree.branches) for tree, v in zip(found, of, strict=True)]
                for (_, found), of in zip(groups, verdicts, strict=True)
            ]
        else:
            advantages = advantages_of(groups, verdicts, train.estimator, self.chat, train.clone_scale)
        metrics = summary(update, groups, verdicts, advantages)
        parts = minibatches(groups, advantages, train)
        versions = [v for rows in parts for row in rows for v in row.versions if v >= 0]
        if update - min(versions) > cluster.staleness:
            raise PolicyError(f"update {update} has tokens of weights {min(versions)}: the bound on staleness does not hold; report this")
        metrics["staleness"] = update - sum(versions) / len(versions)
        metrics["staleness_max"] = update - min(versions)

        dealt = self.experience_maker.make_experience_batch(parts)
        rate = learning_rate(train, update)
        models = [self.actor_model_group, *([self.critic_model_group] if cluster.critic else [])]
        self._all([ref for group in models for ref in group.async_run_method_batch("append", experience=dealt.experiences)])
        refs = self.actor_model_group.async_run_method("fit", steps=dealt.steps, rate=rate)
        if cluster.critic:
            refs += self.critic_model_group.async_run_method("fit", steps=dealt.steps, tokens=dealt.tokens)
        found = self._all(refs)
        policies = found[: cluster.trainers]
        metrics |= loss_metrics({name: sum(part[name] for part in policies) for name in SUMS}, train)
        metrics |= {"gradient_norm": policies[0]["gradient_norm"], "learning_rate": rate}
        metrics["optimizer_steps"] = train.minibatches * train.epochs
        if cluster.critic:
            metrics["critic_loss"] = sum(part["critic_loss"] for part in found[cluster.trainers :])
        trained = time.perf_counter()
        recomputed = self._sync(update + 1)
        metrics["recomputed"] = (recomputed - self._recomputed) / sum(len(trees) for _, trees in groups)
        self._recomputed = recomputed
        metrics["seconds_sampling"] = sampled - started
        metrics["seconds_training"] = trained - sampled
        metrics["seconds_syncing"] = time.perf_counter() - trained
        return metrics

    def _sync(self, version: int) -> int:
        """Give the engines the trainers' weights. Returns tokens computed again because of it, since the engines began."""
        self._all([engine.pause_generation.remote() for engine in self.vllm_engines])
        self._all(self.actor_model_group.async_run_method("broadcast_to_vllm"))
        return sum(self._all([engine.resume_generation.remote(version) for engine in self.vllm_engines]))

    def _checkpoint(self, step: int) -> Path:
        return checkpoint_path(self.spec.directory / "checkpoints", step)

    def _save(self, step: int) -> None:
        """DeepSpeed's state, the critic's first: the policy's is what counts. Then the weights, for whoever uses them."""
        tag = f"global_step{step}"
        for states in (self.spec.directory / "openrlhf").glob("_*"):
            # OpenRLHF makes room before it writes: leave it nothing but the last whole state, which it keeps.
            last = (states / "latest").read_text(encoding="utf-8") if (states / "latest").exists() else ""
            for other in states.iterdir():
                if other.is_dir() and other.name != last:
                    shutil.rmtree(other)
        if self.critic_model_group is not None:
            self._all(self.critic_model_group.async_run_method("save_checkpoint", tag=tag))
        said = {"step": step, "fingerprint": self.spec.fingerprint}
        self._all(self.actor_model_group.async_run_method("save_checkpoint", tag=tag, client_states=said))
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
            said = error.strerror or error
            raise StorageError(f"cannot write checkpoint {target}: {said}; free space and run again to resume") from error
        prune_checkpoints(target.parent, keep=2)

    def _resumed(self) -> int:
        """The update to go on with: that of DeepSpeed's last whole state."""
        states = self._all(self.actor_model_group.async_run_method("get_checkpoint_states"))[0]
        if states and states["fingerprint"] != self.spec.fingerprint:
            said = "another seed, configuration, tasks or reward function"
            raise ConfigError(f"{self.spec.directory} holds a run with {said}; choose another --name or remove it")
        return int(states["step"]) if states else 0

    def _some(self, refs: list[Any]) -> dict[Any, Any]:
        """The values of those of Ray's references that are done, of one at least. Raises `PartLost` if an actor of the run has died."""
        while not ray.wait(refs, num_returns=1, timeout=WATCH_SECONDS)[0]:
            self._watch()
        values: dict[Any, Any] = {}
        failed: BaseException | None = None
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            try:
                values[ref] = ray.get(ref)
            except Exception as error:
                failed = failed or error
        # What is whole is kept first; what failed will fail again when it is asked for.
        if failed is not None and not values:
            self._explain(failed)
            raise failed
        return values

    def _explain(self, error: BaseException) -> None:
        """What exchanged weights or gradients with a dead actor may fail before the death is known: wait for that, and raise `PartLost`."""
        cause = getattr(error, "cause", None)
        if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(cause, RametError) and not part_lost(cause):
            until = time.monotonic() + NOTICE_SECONDS
            while time.monotonic() < until:
                self._watch()
                time.sleep(WATCH_SECONDS)

    def _all(self, refs: list[Any]) -> list[Any]:
        """The values of Ray's references, in their order. Trees that finish meanwhile are kept."""
        values: dict[Any, Any] = {}
        while left := [ref for ref in refs if ref not in values]:
            found = self._some([*left, *self.samples_generator.growing])
            values |= {ref: found.pop(ref) for ref in left if ref in found}
            self.samples_generator.keep(found)
        return [values[ref] for ref in refs]

    def _watch(self) -> None:
        # A dead actor leaves those that it exchanges weights or gradients with waiting for ever.
        groups = [group._actor_handlers for group in (self.actor_model_group, self.critic_model_group) if group is not None]
        for handle in [*self.vllm_engines, *(handle for group in groups for handle in group)]:
            found = ray._private.state.actors(handle._actor_id.hex())
            if found.get("State") == "DEAD":
                raise PartLost(f"{found.get('ActorClassName', 'an actor')} (process {found.get('Pid')}) has died")
