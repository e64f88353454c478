"""Methods added to an engine's worker process, so that it receives weights in buckets; on CPUs, `cpu.CPUWorker`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap

from ramet.errors import PolicyError
from ramet.policy.openrlhf.weights import receive


class BucketWorker(WorkerWrap):
    """OpenRLHF's worker extension, which connects the worker with the first trainer, with weights in buckets."""

    def update_bucket(self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, last: bool) -> None:
        """Receive and load one bucket. Raises `PolicyError` if its dtype is not the engine's: sampling would differ from training."""
        weights = receive(names, shapes, dtype, self._model_update_group, self.device)
        if dtype != self.model_config.dtype:
            raise PolicyError(f"{names[0]} is {dtype} in training and {self.model_config.dtype} in the engine")
        self.model_runner.model.load_weights(weights=weights)
