"""The command-line flags with which OpenRLHF is started for a run."""

from __future__ import annotations

from pathlib import Path

from ramet.errors import ConfigError
from ramet.policy.openrlhf.settings import ClusterConfig, RunSpec

AGENT = Path(__file__).with_name("agent.py")
"""The file from which OpenRLHF's engines load their agent."""

STOP = ".stop"
"""A file in the run folder: while it exists, the run saves a checkpoint after its current update and stops."""


def flags(spec: RunSpec, context: int) -> list[str]:
    """The flags of `openrlhf.cli.train_ppo_ray`. `context` is the length of the longest row, in tokens.

    Raises `ConfigError` for settings that the cluster trainer does not support.
    """
    train, cluster = spec.train, spec.cluster
    if train.lora_rank:
        raise ConfigError("the openrlhf trainer does not support LoRA: set train.lora_rank to 0")
    if spec.dtype == "float32" and not cluster.cpu:
        raise ConfigError("the openrlhf trainer computes in bfloat16 on GPUs: set dtype to bfloat16")
    if train.tasks * train.group_size < cluster.trainers:
        raise ConfigError(f"{train.tasks} tasks of {train.group_size} trees are fewer than {cluster.trainers} trainers; raise train.tasks")
    state = spec.directory / "openrlhf"
    nodes, gpus = cluster.shape
    values: dict[str, object] = {
        "actor.model_name_or_path": spec.model,
        "train.agent_func_path": AGENT,
        "actor.num_nodes": nodes,
        "actor.num_gpus_per_node": gpus,
        "vllm.num_engines": cluster.engines,
        "vllm.tensor_parallel_size": cluster.tensor_parallel_size,
        "vllm.gpu_memory_utilization": cluster.gpu_memory_utilization,
        "vllm.enable_prefix_caching": True,
        "vllm.enforce_eager": cluster.cpu,
        "vllm.sync_backend": "gloo" if cluster.cpu else "nccl",
        "ds.zero_stage": cluster.zero_stage,
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": cluster.attn_implementation,
        "ds.adam_offload": cluster.offload,
        "ds.grad_accum_dtype": "fp32",
        "actor.gradient_checkpointing_enable": cluster.gradient_checkpointing,
        "data.max_len": context,
        "rollout.batch_size": train.tasks,
        "rollout.n_samples_per_prompt": train.group_size,
        "rollout.temperature": train.temperature,
        # Micro-batches are cut by tokens; DeepSpeed only needs to know that there are several.
        "train.micro_batch_size": 1,
        "train.batch_size": 2 * cluster.trainers,
        "train.max_epochs": train.epochs,
        "train.seed": spec.seed,
        "actor.eps_clip_low_high": (train.clip_low, train.clip_high),
        "actor.adam.lr": train.learning_rate,
        "actor.adam.betas": (0.9, 0.99),
        "actor.adam.weight_decay": train.weight_decay,
        "actor.max_norm": train.max_grad_norm,
        # The trainer sets the learning rate of every update.
        "actor.lr_scheduler": "constant",
        "algo.advantage.estimator": "gae" if cluster.critic else "reinforce",
        # Makes engines return log-probabilities of the sampling distribution.
        "algo.advantage.is_correction_level": "token",
        # ramet's own loss has the KL divergence from the reference, over the whole vocabulary.
        "algo.kl.init_coef": 0,
        "ckpt.path": state,
        "ckpt.output_dir": state / "last",
        "ckpt.load_enable": True,
        "ckpt.max_num": 2,
    }
    if cluster.critic:
        values |= {
            "critic.model_name_or_path": spec.model,
            "critic.num_nodes": nodes,
            "critic.num_gpus_per_node": gpus,
            "critic.adam.lr": cluster.critic_learning_rate,
            "critic.max_norm": train.max_grad_norm,
            "critic.lr_scheduler": "constant",
            "critic.value_clip": cluster.value_clip,
            "algo.advantage.gamma": cluster.gamma,
            "algo.advantage.lambd": cluster.lam,
        }
    words = []
    for name, value in values.items():
        if value is not False:
            arguments = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{name}", *map(str, arguments)]
    return words


def needs(cluster: ClusterConfig) -> dict[str, int]:
    """Resources of the run by Ray's names: placement groups take a CPU with every GPU, and the controller one more."""
    return {"GPU": cluster.gpus, "CPU": cluster.gpus + 1}
