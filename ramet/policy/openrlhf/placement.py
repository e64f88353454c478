"""Placement and memory of a run, from its model's configuration: which process runs on which GPU, and whether it fits.

Exact: parameters (the model is built on torch's meta device), keys and values. Modelled: activations and logits, by the formulas below;
kernels and allocators need more, for which the share `ROOM` of every GPU is kept free. With P parameters, N trainers, bytes:

    weights      2 P            (zero_stage 3: 2 P / N, and two layers or the embedding at a time)
    gradients    4 P / N, summed in float32, as much again during the step, and DeepSpeed's bucket
    optimiser    12 P / N       (offload: in the host's memory)
    reference    2 P            (zero_stage 3: 2 P / N), where train.kl_coef is not 0
    activations  2 T L h, and one layer's 2 T (6 h + 2 q + 2 k + 3 f)          (gradient_checkpointing = false: L times that)
    logits       14 T V, and 24 T V with a reference (what tests/cluster/test_memory.py measures)

for T tokens of a batch, L layers of width h, q and k the widths of queries and of keys, f that of the MLP, V tokens of vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramet.errors import CheckpointError, ConfigError, first_line
from ramet.policy.openrlhf.settings import ClusterConfig
from ramet.policy.training.update import TrainConfig

GIB = 2**30
ROOM = 0.06
"""Share of a GPU that is left for kernels, the communication library and what an allocator cannot use."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket at its default."""
ENGINE_GIB = 2.0
"""Of an engine beside weights, keys and values: its activations and graphs."""


@dataclass(frozen=True)
class ModelDimensions:
    """The dimensions of a model that its memory depends on.

    parameters      of the whole model
    layer           parameters of the largest block: a layer, or the embedding
    hidden, mlp     widths of the residual stream and of the MLP
    queries, keys   widths of all query heads and of all key heads
    kv              bytes of keys and values per token, in bfloat16
    """

    parameters: int
    layer: int
    layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    vocabulary: int
    kv: int

    @classmethod
    def from_config(cls, model: Path) -> ModelDimensions:
        """From a model directory, of which only `config.json` is read. Raises `CheckpointError`."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True)
            with torch.device("meta"):
                built: Any = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{model} has no configuration of a language model ({first_line(error)})") from error
        text = config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head
        blocks = [sum(p.numel() for p in block.parameters()) for block in built.model.layers]
        return cls(
            sum(p.numel() for p in built.parameters()), max(*blocks, text.vocab_size * text.hidden_size), text.num_hidden_layers,
            text.hidden_size, text.num_attention_heads * head, keys, text.intermediate_size, text.vocab_size,
            2 * 2 * text.num_hidden_layers * keys,
        )  # fmt: skip


@dataclass(frozen=True)
class GpuGroup:
    """GPUs with the same contents.

    bytes    needed on each GPU, by what they are for
    offered  bytes available on each
    remedy   what to change if they do not suffice
    """

    name: str
    gpus: int
    bytes: dict[str, float]
    offered: float
    remedy: str

    @property
    def needed(self) -> float:
        """Bytes needed on each GPU."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Placement:
    """The placement of a run, and the memory that it needs.

    nodes     GPUs by role ("engine", "trainer", "critic") on each node
    sync      bytes sent to every engine after an update
    rows      rows of full length whose keys and values fit an engine at the same time
    host      bytes of host memory per node for an offloaded optimiser
    problems  what does not fit, with the numbers and a remedy
    """

    dimensions: ModelDimensions
    parts: list[GpuGroup]
    nodes: list[dict[str, int]]
    sync: int
    rows: int
    host: float
    problems: list[str] = field(default_factory=list)


def place(dimensions: ModelDimensions, train: TrainConfig, cluster: ClusterConfig, context: int) -> Placement:
    """Place a run whose longest row has `context` tokens."""
    gpu = cluster.gpu_memory * GIB
    usable = gpu * (1 - ROOM)
    policy = _training(dimensions, train, cluster, context)
    parts = [GpuGroup("trainer", cluster.trainers, policy, usable, _REMEDY)]
    if cluster.critic:
        critic = {**policy, "reference": 0.0, "logits": 0.0}
        parts.append(GpuGroup("critic", cluster.trainers, critic, usable, _REMEDY))
    offered = gpu * cluster.gpu_memory_utilization
    fixed = 2 * dimensions.parameters / cluster.tensor_parallel_size + ENGINE_GIB * GIB
    left = max(offered - fixed, 0.0) * cluster.tensor_parallel_size
    rows = int(left / dimensions.kv) // context
    one = {"weights": 2 * dimensions.parameters / cluster.tensor_parallel_size, "engine": ENGINE_GIB * GIB}
    one["keys and values"] = max(context * dimensions.kv / cluster.tensor_parallel_size, left / cluster.tensor_parallel_size)
    remedy = "raise openrlhf.tensor_parallel_size, or lower budget.context"
    parts.append(GpuGroup("engine", cluster.engines * cluster.tensor_parallel_size, one, offered, remedy))
    problems = [
        f"a GPU of the {part.name} needs {part.needed / GIB:.1f} GiB of {part.offered / GIB:.1f} ("
        + ", ".join(f"{name} {size / GIB:.1f}" for name, size in part.bytes.items() if size)
        + f"): {part.remedy}"
        for part in parts
        if part.needed > part.offered * (1 + 1e-9)
    ]
    trainers = max(node.get("trainer", 0) + node.get("critic", 0) for node in _nodes(cluster))
    host = 12 * dimensions.parameters / cluster.trainers * trainers if cluster.offload else 0.0
    return Placement(dimensions, parts, _nodes(cluster), 2 * dimensions.parameters, rows, host, problems)


_REMEDY = "raise openrlhf.trainers, set openrlhf.zero_stage to 3, offload or gradient_checkpointing to true, or lower train.batch_tokens"


def _training(dimensions: ModelDimensions, train: TrainConfig, cluster: ClusterConfig, context: int) -> dict[str, float]:
    """Bytes on each GPU that trains the policy, by what they are for."""
    p, n = dimensions.parameters, cluster.trainers
    # A row that is longer than a batch is a batch by itself.
    t = max(train.batch_tokens, context)
    sharded = cluster.zero_stage == 3
    weights = 2 * p / n + 2 * 2 * dimensions.layer if sharded else 2 * p
    layer = 2 * t * (6 * dimensions.hidden + 2 * dimensions.queries + 2 * dimensions.keys + 3 * dimensions.mlp)
    kept = 2 * t * dimensions.layers * dimensions.hidden + layer if cluster.gradient_checkpointing else dimensions.layers * layer
    return {
        "weights": weights,
        "gradients": 8 * p / n + 2 * min(BUCKET, p),
        "optimiser": 0.0 if cluster.offload else 12 * p / n,
        "reference": 0.0 if not train.kl_coef else 2 * p / n if sharded else 2 * p,
        "activations": kept,
        "logits": t * dimensions.vocabulary * (24 if train.kl_coef else 14),
    }


def _nodes(cluster: ClusterConfig) -> list[dict[str, int]]:
    """GPUs by role on each node, in the order in which they are requested from Ray: engines, trainers, critics."""
    requests = [("engine", cluster.tensor_parallel_size)] * cluster.engines + [("trainer", 1)] * cluster.trainers
    requests += [("critic", 1)] * (cluster.trainers if cluster.critic else 0)
    nodes: list[dict[str, int]] = []
    for role, gpus in requests:
        node = next((node for node in nodes if sum(node.values()) + gpus <= cluster.gpus_per_node), None)
        if node is None:
            node = {}
            nodes.append(node)
        node[role] = node.get(role, 0) + gpus
    return nodes


def check_fits(placement: Placement) -> None:
    """Raises `ConfigError`, with the numbers, if a run does not fit."""
    if placement.problems:
        raise ConfigError("the run does not fit: " + "; ".join(placement.problems))
