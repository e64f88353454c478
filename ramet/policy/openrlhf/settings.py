"""Settings of the cluster trainer: the section `[openrlhf]` of a run's configuration, and the description of a run for its actors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ramet.agents.equipment import Equipment
from ramet.agents.journal import fingerprint
from ramet.agents.transcripts import LIMIT
from ramet.errors import PartLost
from ramet.policy.training.identity import identity
from ramet.policy.training.update import LearningProblem, TrainConfig
from ramet.schema import Section

FREE = ("address", "restarts", "gpu_memory")
"""Settings with which a run may go on that began with others: they change nothing of what it computes."""
_Count = Annotated[int, Field(ge=1)]


class ClusterConfig(Section):
    """How a run is placed on GPUs, and how sampling and training are synchronised."""

    trainers: _Count = 4
    """GPUs that train, each with a shard of the optimiser."""
    engines: _Count = 4
    """vLLM engines that sample."""
    tensor_parallel_size: _Count = 1
    """GPUs of each engine."""
    gpus_per_node: _Count = 8
    """GPUs of every node."""
    gpu_memory: Annotated[float, Field(gt=0)] = 80.0
    """GiB of one GPU, for `--plan`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of a GPU's memory that an engine takes."""
    zero_stage: Literal[2, 3] = 3
    """ZeRO stage of DeepSpeed: 2 shards gradients and optimiser, 3 the weights too."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass, instead of keeping them."""
    attn_implementation: Literal["flash_attention_2", "sdpa", "eager"] = "flash_attention_2"
    """Attention implementation in training, by its name in transformers."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """Updates that sampling may be ahead of the weights; 0: sample, train, sample."""
    critic: bool = False
    """PPO with a critic and GAE instead of `train.estimator`."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate of the critic."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of GAE."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Lambda of GAE."""
    value_clip: Annotated[float, Field(gt=0)] = 0.5
    """Clip of the critic's loss."""
    address: str = ""
    """Address of a Ray cluster's job server, such as http://head:8265; without one, Ray is started on this machine."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """Times that a run begins again from its last checkpoint after a part of it was lost."""
    cpu: bool = False
    """Without CUDA, for development."""

    @model_validator(mode="after")
    def _fits_nodes(self) -> ClusterConfig:
        if self.trainers > self.gpus_per_node and self.trainers % self.gpus_per_node:
            raise ValueError(f"{self.trainers} trainers do not fill nodes of {self.gpus_per_node} GPUs; take a multiple of it, or fewer")
        if self.gpus_per_node % self.tensor_parallel_size:
            each = f"engines of {self.tensor_parallel_size} GPUs"
            raise ValueError(f"{each} do not fill a node of {self.gpus_per_node}, and none may span two")
        return self

    @property
    def gpus(self) -> int:
        """GPUs of the whole run; the critic, if there is one, takes as many as the trainers of the policy."""
        return self.trainers * (2 if self.critic else 1) + self.engines * self.tensor_parallel_size

    @property
    def shape(self) -> tuple[int, int]:
        """(number of nodes, GPUs per node) of the trainers."""
        nodes = max(self.trainers // self.gpus_per_node, 1)
        return nodes, self.trainers // nodes


def part_lost(error: BaseException | None) -> bool:
    """Does an error, ours or vLLM's, say that a part of a run has died?"""
    # Where vLLM is not imported there can be no error of its.
    vllm = sys.modules.get("vllm.v1.engine.exceptions")
    return isinstance(error, PartLost) or (vllm is not None and isinstance(error, vllm.EngineDeadError))


@dataclass(frozen=True)
class RunSpec:
    """One run, as every actor of it receives it.

    train               the settings of an update
    cluster             the settings of the cluster trainer
    directory           the run folder, which every node must be able to read and write
    model               directory of the initial weights
    chat                name of the chat format, as in `ramet.policy.models.tokenizer.load_tokenizer`
    dtype               "bfloat16" or "float32": the type in which engines and trainers compute
    fingerprint         differs between runs that must not resume each other
    always_show_budget  as in `ramet.agents.runtime.Runtime`
    build_problem       called with a function that counts the tokens of a text; returns the learning problem
    build_equipment     called where trees grow; returns what they have beside the policy
    transcripts         bytes of trees to keep in the run folder
    """

    train: TrainConfig
    cluster: ClusterConfig
    directory: Path
    model: Path
    chat: Any
    dtype: str
    seed: int
    fingerprint: str
    always_show_budget: bool
    build_problem: Callable[[Callable[[str], int]], LearningProblem]
    build_equipment: Callable[[], Equipment] = Equipment
    transcripts: int = LIMIT

    def identified(self, problem: LearningProblem) -> RunSpec:
        """A copy whose fingerprint also covers the problem that was built: the code of its task sampler and reward function."""
        code = (identity(problem.sample_tasks), identity(problem.reward_function)) if problem.compared else ()
        return replace(self, fingerprint=fingerprint(self.fingerprint, problem.fingerprint, *code))
