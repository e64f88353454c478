"""The Ray actors of a run: engines that sample, and DeepSpeed processes that train the policy and, if there is one, the critic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import deepspeed
import ray
import torch
from openrlhf.models import Actor
from openrlhf.models.utils import compute_entropy
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.trainer.ray.ppo_critic import CriticModelActor
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync

from ramet.errors import PolicyError
from ramet.policy.engines.vllm import cpu_settings
from ramet.policy.models.load import without_dropout
from ramet.policy.openrlhf import cpu
from ramet.policy.openrlhf.experience import targets_of
from ramet.policy.openrlhf.settings import RunSpec
from ramet.policy.openrlhf.weights import BUCKET, buckets, send
from ramet.policy.training.loss import SUMS, LossSums
from ramet.policy.training.update import TrainConfig, update_loss

cpu.activate()

WORKER = "ramet.policy.openrlhf.worker.BucketWorker"
"""Given by name: it is imported by an engine's worker process, which has vLLM and must not load DeepSpeed."""


def undecorated(actor: Any) -> Any:
    """The class that OpenRLHF wrapped with `ray.remote`."""
    return actor.__ray_metadata__.modified_class.__ray_actor_class__


class TreeRollout(undecorated(RolloutRayActor)):  # type: ignore[misc]
    """A vLLM engine on which trees grow."""

    spec: ClassVar[RunSpec]

    async def __init__(self, *args: Any, **named: Any) -> None:  # type: ignore[misc]
        named |= {"dtype": self.spec.dtype, "worker_extension_cls": WORKER}
        if self.spec.cluster.cpu:
            named |= {**cpu_settings(2**30), "worker_extension_cls": f"{cpu.__name__}.{cpu.CPUWorker.__name__}"}
            del named["gpu_memory_utilization"]
        await super().__init__(*args, **named)
        self._policy = self.executor.policy(self)

    async def pause_generation(self) -> None:
        """Stop sampling and drop cached prefixes, until `resume_generation`."""
        await self._policy.pause()

    async def update_bucket(self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, last: bool) -> None:
        """Have the engine's workers receive one bucket of weights; see `weights.send`."""
        await self.llm.collective_rpc("update_bucket", args=(names, shapes, dtype, last))

    async def resume_generation(self, version: int = 0) -> int:
        """Continue sampling, with weights of this version. Returns the tokens recomputed for weight changes since the engine started."""
        await self._policy.resume(version)
        return self._policy.recomputed


def _adapt(strategy: Any, spec: RunSpec) -> None:
    """Let DeepSpeed compute in float32, if the run does."""
    if spec.dtype == "float32":
        strategy.param_dtype = strategy.args.ds.param_dtype = cpu.FLOAT32


class _Steps:
    """Optimiser steps of several batches each. OpenRLHF's own loops allow neither a fixed number of steps nor given batches."""

    _batches: list[Experience]

    def append(self, experience: Experience) -> None:
        """Add a batch to those of the next update."""
        self.__dict__.setdefault("_batches", []).append(experience)

    def _optimise(self, engine: Any, loss_of: Any, steps: list[int], epochs: int, rate: float) -> list[float]:
        """Make `epochs` passes over the appended batches, with one step per entry of `steps`, the number of its batches.

        The loss of a step is `loss_of(experience, minibatch)` summed over its batches and over the trainers. Returns the gradient norm
        of each step. Raises `PolicyError` if a gradient is not finite.
        """
        trainers = torch.distributed.get_world_size()
        norms = []
        for _ in range(epochs):
            batches = iter(self._batches)
            for minibatch, count in enumerate(steps):
                finite = True
                for number in range(count):
                    experience = next(batches).to_device(torch.cuda.current_device())
                    engine.set_gradient_accumulation_boundary(number == count - 1)
                    loss = loss_of(experience, minibatch)
                    finite = finite and bool(torch.isfinite(loss.detach()))
                    # DeepSpeed averages over trainers.
                    engine.backward(loss * trainers, scale_wrt_gas=False)
                if not _all_finite(engine, finite):
                    raise PolicyError("a gradient is not finite; lower the learning rate and resume from the last checkpoint")
                for group in engine.optimizer.param_groups:
                    group["lr"] = rate
                engine.step()
                norms.append(float(engine.get_global_grad_norm() or 0.0))
        self._batches = []
        return norms


def _all_finite(engine: Any, losses: bool) -> bool:
    """Whether the losses and gradient shards of all trainers are finite. DeepSpeed would make the step, or skip it silently."""
    shares = getattr(engine.optimizer, "averaged_gradients", {}).values()
    gradients = [g for share in shares for g in share or () if g is not None]
    flag = torch.tensor(float(losses and all(bool(torch.isfinite(g).all()) for g in gradients)), device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


class TreePolicy(_Steps, undecorated(PolicyModelActor)):  # type: ignore[misc]
    """A trainer of the policy."""

    spec: ClassVar[RunSpec]

    def init_model_from_pretrained(self, strategy: Any, pretrain: str, max_steps: int | None = None, vllm_engines: Any = None) -> None:
        """As OpenRLHF's, without dropout, and with the reference model if the loss has a KL term."""
        _adapt(strategy, self.spec)
        super().init_model_from_pretrained(strategy, pretrain, max_steps, vllm_engines)
        without_dropout(self.actor)
        self._reference = None
        if self.spec.train.kl_coef:
            reference = Actor(
                pretrain,
                attn_implementation=strategy.args.ds.attn_implementation,
                param_dtype=strategy.args.ds.param_dtype,
                ds_config=strategy.get_ds_eval_config(),
                temperature=self.spec.train.temperature,
            )
            self._reference = strategy.prepare(reference)
            self._reference.eval()

    def fit(self, kl_ctl: float = 0, *, steps: list[int], rate: float) -> dict[str, float]:
        """Train on the appended batches. Returns the sums of `LossSums` over this trainer's batches, and the mean gradient norm."""
        sums = dict.fromkeys(SUMS, 0.0)
        self.actor.train()

        def loss_of(experience: Experience, minibatch: int) -> torch.Tensor:
            batch_sums = tree_loss(self.actor, self._reference, experience, self.spec.train)
            for name, value in batch_sums.values().items():
                sums[name] += value
            return batch_sums.loss

        norms = self._optimise(self.actor.model, loss_of, steps, self.spec.train.epochs, rate)
        self.actor.eval()
        return {**sums, "gradient_norm": sum(norms) / len(norms)}

    def broadcast_to_vllm(self) -> None:
        """Send the weights to the engines, bucket by bucket. All trainers must call it, since each holds a shard."""
        engines = self.vllm_engines if torch.distributed.get_rank() == 0 else []
        resets = [engine.reset_prefix_cache.remote() for engine in engines]
        torch.cuda.empty_cache()
        frozen = getattr(self.actor, "is_vlm", False)  # a vision encoder is not trained
        parameters = [(name, p) for name, p in self.actor.model.module.named_parameters() if p.requires_grad or not frozen]
        parts = buckets(parameters, BUCKET)
        for number, part in enumerate(parts, 1):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in part]):
                if engines:
                    send(part, number == len(parts), self.trainer._model_update_group, engines)
                # Gathered parameters must not be released while they are sent.
                torch.cuda.synchronize()
        ray.get(resets)
        torch.cuda.empty_cache()
        torch_dist_barrier_and_cuda_sync()

    def export(self, path: str) -> None:
        """Write the weights as a model directory."""
        self.strategy.save_model(self.actor, self.tokenizer, path)

    def save_model(self) -> None:
        """Nothing: the run's last checkpoint is the final model."""


def tree_loss(actor: Any, reference: Any, experience: Experience, train: TrainConfig) -> LossSums:
    """The sums of ramet's loss over a batch, computed with OpenRLHF's models. Gradients flow to `actor`; `reference` may be None."""
    ids, mask, attention = experience.sequences, experience.action_mask, experience.attention_mask
    logprobs, output = actor(ids, mask, attention_mask=attention, return_output=True)
    with torch.no_grad():
        entropy = compute_entropy(output["logits"][:, :-1])
    kl = torch.zeros_like(logprobs)
    if reference is not None:
        with torch.no_grad():
            # No name for the logits: they would be kept until the loss is done.
            reference_logprobs = torch.log_softmax(
                reference(ids, mask, attention_mask=attention, return_output=True)[1]["logits"][:, :-1], -1
            )
        policy_logprobs = torch.log_softmax(output["logits"][:, :-1], -1)
        kl = (policy_logprobs.exp() * (policy_logprobs - reference_logprobs)).sum(-1)
    return update_loss(logprobs, entropy, kl, targets_of(experience), train)


class TreeCritic(_Steps, undecorated(CriticModelActor)):  # type: ignore[misc]
    """A trainer of the critic."""

    spec: ClassVar[RunSpec]

    def init_model_from_pretrained(self, strategy: Any, pretrain: str, max_steps: int) -> None:
        """As OpenRLHF's, without dropout, from the checkpoint that belongs to the policy's last one."""
        _adapt(strategy, self.spec)
        # A critic is saved before the policy, so it may be one checkpoint ahead; the run resumes from the policy's.
        states = Path(strategy.args.ckpt.path)
        committed, own = states / "_actor" / "latest", states / "_critic" / "latest"
        if committed.exists() and own.exists():
            own.write_text(committed.read_text(encoding="utf-8"), encoding="utf-8")
        super().init_model_from_pretrained(strategy, pretrain, max_steps)
        without_dropout(self.critic)

    def fit(self, *, steps: list[int], tokens: list[int]) -> dict[str, float]:
        """Train on the appended batches, towards their returns. Returns the loss summed over this trainer's batches.

        tokens  sampled tokens of each minibatch, of all trainers together
        """
        total = 0.0
        self.critic.train()

        def loss_of(experience: Experience, minibatch: int) -> torch.Tensor:
            nonlocal total
            mask = experience.action_mask
            values = self.critic(experience.sequences, action_mask=mask, attention_mask=experience.attention_mask)
            loss = self.trainer.critic_loss_fn(values, experience.values, experience.returns, mask, 1, tokens[minibatch])
            total += float(loss.detach())
            return loss

        self._optimise(self.critic, loss_of, steps, self.spec.train.epochs, self.spec.cluster.critic_learning_rate)
        self.critic.eval()
        return {"critic_loss": total / self.spec.train.epochs}
