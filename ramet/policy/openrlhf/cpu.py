"""CPU mode: what OpenRLHF 0.11 needs in order to run without CUDA. It is slow, and meant for development and tests.

It is active only for a run with `openrlhf.cpu = true`, which sets the environment variable `CPU_MODE` for its processes.

| OpenRLHF assumes | here |
|---|---|
| `torch.cuda` devices, streams, synchronisation | the CPU; synchronisation does nothing |
| a mesh of CUDA devices | a mesh of CPUs |
| weights broadcast by NCCL | broadcast by gloo |
| an engine that takes weights bucket by bucket | all at once: the CPU engine packs weights for its kernels while it loads them |
| bfloat16 or float16 | float32 as well, which CPUs compute faster |
| flash-attn, imported even if unused | empty modules; packing and ring attention, which call it, do not work |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ramet.policy.engines.vllm import repack
from ramet.policy.openrlhf.weights import receive

CPU_MODE = "RAMET_OPENRLHF_CPU"
ENVIRONMENT = {CPU_MODE: "1", "DS_ACCELERATOR": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment variables of every process of a run in CPU mode."""
FLOAT32 = "fp32"
"""The name of float32 that is added to OpenRLHF's names of types."""


class _Device(str):
    """The CPU as a device. Formatted, as in f"cuda:{device}", it gives the number 0; the resulting name is never used."""

    def __format__(self, spec: str) -> str:
        return "0"


class Gloo:
    """The part of vLLM's NCCL communicator that OpenRLHF uses: broadcasts, in a process group apart from that of training."""

    def __init__(self, host: str, port: int, rank: int, world: int) -> None:
        wait = timedelta(minutes=10)
        distributed: Any = torch.distributed
        store = distributed.TCPStore(host, port, world, rank == 0, wait, wait_for_workers=False)
        self._group = distributed.ProcessGroupGloo(store, rank, world, wait)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        """Send the tensor of rank `src` to all ranks, in place; returns when it has arrived. `stream` is ignored."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()


def without_flash_attention() -> None:
    """Put empty modules in the place of flash-attn, so that OpenRLHF can be imported without it."""
    used = {"": (), "bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"), "utils": ()}

    def missing(*args: Any, **named: Any) -> None:
        raise NotImplementedError("flash-attn is not available in CPU mode")

    for name, functions in {**used, "utils.distributed": ("all_gather",)}.items():
        module = ModuleType(f"flash_attn.{name}".rstrip("."))
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        for function in functions:
            setattr(module, function, missing)
        sys.modules[module.__name__] = module


def activate() -> None:
    """Adapt torch and OpenRLHF in this process, if it is in CPU mode. Call it before OpenRLHF creates anything."""
    if not os.environ.get(CPU_MODE) or getattr(torch.cuda, "ramet_cpu", False):
        return
    import openrlhf.trainer.ray.ppo_actor as policy
    import openrlhf.utils.deepspeed.deepspeed as strategy
    import openrlhf.utils.distributed_util as communication
    import openrlhf.utils.utils as types

    cuda: Any = torch.cuda
    cuda.ramet_cpu = True
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(cuda, name, lambda *args, **named: None)
    cuda.current_device = lambda: _Device("cpu")

    mesh, dtype_of = strategy.init_device_mesh, types.convert_to_torch_dtype
    strategy.init_device_mesh = lambda kind, *args, **named: mesh("cpu", *args, **named)
    types.convert_to_torch_dtype = lambda name: torch.float32 if name == FLOAT32 else dtype_of(name)

    def connect(host: str, port: int, rank: int, world: int, device: Any) -> Gloo:
        return Gloo(host, port, rank, world)

    communication.stateless_init_process_group = policy.stateless_init_process_group = connect


class CPUWorker:
    """Methods added to an engine's worker, instead of OpenRLHF's `WorkerWrap`: weights are broadcast by gloo and loaded together."""

    model_runner: Any
    model_config: Any

    def init_process_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str, use_ray: bool
    ) -> None:
        """Join the group in which the first trainer broadcasts weights. The parameters are those of OpenRLHF's method."""
        self._weights: list[tuple[str, torch.Tensor]] = []
        self._weights_group = Gloo(master_address, master_port, torch.distributed.get_rank() + rank_offset, world_size)

    def update_bucket(self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, last: bool) -> None:
        """Receive one bucket; after the last one, load them all."""
        self._weights += receive(names, shapes, dtype, self._weights_group, "cpu")
        if last:
            self.model_runner.reload_weights(weights_iterator=iter(self._weights))
            repack(self.model_runner.model)
            self._weights = []
