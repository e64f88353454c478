"""Weights from a trainer to engines: what arrives is what was sent, in few calls, and little of it is gathered at a time."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-openrlhf")

import deepspeed
import ray
from test_parity import TRAIN, cluster_policy

from ramet.policy.openrlhf import actors
from ramet.policy.openrlhf.cpu import Gloo
from ramet.policy.openrlhf.weights import receive

SIZE = 2**17


class Engine:
    """An engine's worker without its model: it keeps what it is sent."""

    def __init__(self) -> None:
        self._weights: dict[str, torch.Tensor] = {}
        self._last: list[bool] = []
        self._resets = 0

    def connect(self, port: int, rank: int, world: int) -> None:
        self._group = Gloo("127.0.0.1", port, rank, world)

    def reset_prefix_cache(self) -> None:
        self._resets += 1

    def update_bucket(self, names: Any, shapes: Any, dtype: torch.dtype, last: bool) -> None:
        self._weights |= receive(names, shapes, dtype, self._group, "cpu")
        self._last.append(last)

    def found(self) -> tuple[dict[str, torch.Tensor], list[bool], int]:
        """What came since it was asked last: weights, which calls were the last ones, and how often the cache was dropped."""
        found = self._weights, self._last, self._resets
        self._weights, self._last, self._resets = {}, [], 0
        return found


class Watched:
    """A group that remembers how many bytes of sharded parameters were gathered whenever something was sent."""

    def __init__(self, group: Gloo, model: Any) -> None:
        self._group, self._model = group, model
        self.sent: list[int] = []
        self.gathered: list[int] = []

    def broadcast(self, flat: torch.Tensor, src: int, stream: Any) -> None:
        sharded = [p for p in self._model.parameters() if hasattr(p, "ds_shape")]
        self.gathered.append(sum(p.numel() * p.dtype.itemsize for p in sharded))
        self.sent.append(flat.numel() * flat.dtype.itemsize)
        self._group.broadcast(flat, src, stream)


@pytest.fixture(scope="module")
def engines() -> Any:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor cannot import a test
    try:
        yield [ray.remote(Engine).remote() for _ in range(2)]
    finally:
        ray.shutdown()


def connected(engines: list[Any]) -> Gloo:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refs = [engine.connect.remote(port, rank, len(engines) + 1) for rank, engine in enumerate(engines, 1)]
    group = Gloo("127.0.0.1", port, 0, len(engines) + 1)
    ray.get(refs)
    return group


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_engines_have_the_weights_to_the_last_bit(engines, tmp_path: Path, monkeypatch: Any, zero_stage: int) -> None:
    actor = cluster_policy(TRAIN, tmp_path, monkeypatch, zero_stage)
    monkeypatch.setattr(actors, "BUCKET", SIZE)
    model = actor.actor.model.module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert len(expected) == 38 and "lm_head.weight" not in expected, "which is tied to the embeddings"
    group = Watched(connected(engines), model)
    actor.vllm_engines, actor.trainer._model_update_group = engines, group
    actor.broadcast_to_vllm()
    for weights, last, resets in ray.get([engine.found.remote() for engine in engines]):
        assert weights.keys() == expected.keys() and resets == 1
        assert all(torch.equal(weights[name].view(torch.int32), p.view(torch.int32)) for name, p in expected.items())
        assert last == [False] * (len(group.sent) - 1) + [True] and len(last) < 38 / 1.5
    largest = max(p.numel() * 4 for p in expected.values())
    assert max(group.sent) == largest > SIZE and all(size in (largest, min(size, SIZE)) for size in group.sent)
    if zero_stage == 3:
        assert max(group.gathered) == largest, "no more is gathered than what is sent"
