"""CPU mode: what OpenRLHF 0.11 needs in order to run without CUDA. For development and tests; it proves that the parts fit, and is slow.

Nothing of it is active unless a run asks for it (`openrlhf.cpu`), which sets `ASKED` for the processes of that run.

| OpenRLHF assumes | here |
|---|---|
| `torch.cuda` devices, streams, synchronisation | the CPU; nothing to wait for |
| a mesh of CUDA devices | of CPUs |
| weights broadcast by NCCL | by gloo |
| an engine that takes weights bucket by bucket | all at once: the CPU engine packs them for its kernels when they are loaded |
| bfloat16 or float16 | float32 as well, which CPUs compute faster |
| flash-attn, imported whether it is used or not | nothing of it; packing and ring attention, which call it, do not work |
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

ASKED = "RAMET_OPENRLHF_CPU"
ENVIRONMENT = {ASKED: "1", "DS_ACCELERATOR": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For every process of a run in CPU mode."""
FLOAT32 = "fp32"
"""Name of float32 among OpenRLHF's types."""


class _Device(str):
    """The CPU as a device; its number where a name like cuda:0 is made of it, of which nothing is asked."""

    def __format__(self, spec: str) -> str:
        return "0"


class Gloo:
    """What OpenRLHF uses of vLLM's NCCL communicator: broadcasts in a group of its own, apart from the training's."""

    def __init__(self, host: str, port: int, rank: int, world: int) -> None:
        wait = timedelta(minutes=10)
        distributed: Any = torch.distributed
        store = distributed.TCPStore(host, port, world, rank == 0, wait, wait_for_workers=False)
        self._group = distributed.ProcessGroupGloo(store, rank, world, wait)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()


def without_flash_attention() -> None:
    """Let OpenRLHF be imported without flash-attn."""
    used = {"": (), "bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"), "utils": ()}

    def missing(*args: Any, **named: Any) -> None:
        raise NotImplementedError("flash-attn is not there in CPU mode")

    for name, functions in {**used, "utils.distributed": ("all_gather",)}.items():
        module = ModuleType(f"flash_attn.{name}".rstrip("."))
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        for function in functions:
            setattr(module, function, missing)
        sys.modules[module.__name__] = module


def activate() -> None:
    """Adapt torch and OpenRLHF in this process, if the run asks for it. Before OpenRLHF makes anything."""
    if not os.environ.get(ASKED) or getattr(torch.cuda, "ramet_cpu", False):
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
    """What an engine's worker is given, in the place of OpenRLHF's `WorkerWrap`: weights by gloo, loaded together."""

    model_runner: Any
    model_config: Any

    def init_process_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str, use_ray: bool
    ) -> None:
        self._weights: list[tuple[str, torch.Tensor]] = []
        self._weights_group = Gloo(master_address, master_port, torch.distributed.get_rank() + rank_offset, world_size)

    def update_bucket(self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, last: bool) -> None:
        """One bucket; the last one makes them all take effect."""
        self._weights += receive(names, shapes, dtype, self._weights_group, "cpu")
        if last:
            self.model_runner.reload_weights(weights_iterator=iter(self._weights))
            repack(self.model_runner.model)
            self._weights = []
