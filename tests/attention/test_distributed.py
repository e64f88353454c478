"""The same code over gloo, in processes of its own, gives the bits that the simulation gives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ramet.attention.comm import DistributedGroup, RankGroup, simulated
from ramet.attention.exact import ring, ulysses
from ramet.attention.hf import attach, extend, prefill
from ramet.attention.methods import Method
from ramet.attention.plan import ShardedPlan
from tests.attention.oracle import tensors
from tests.attention.test_hf import ids, tiny

HOSTS = 4


def job(group: RankGroup) -> list[Tensor]:
    """Everything that communicates, once."""
    q, k, v = tensors(1, 4, 4, 37)
    results = []
    for function, zigzag in ((ring, False), (ring, True), (ulysses, False)):
        plan = ShardedPlan(37, group.size, zigzag)
        rows = plan.rows(group.rank)
        local = [x[:, rows].requires_grad_() for x in (q, k, v)]
        out = function(plan, group, *local, 0.3)
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), local)]
    model = tiny(kv_heads=4)
    attach(model)
    for name in ("spava", "apb", "star", "zigzag"):
        method = Method(name, anchor=4, passing=3)
        sequences, logits = prefill(model, group, method, [ids(1, 41), ids(2, 26)], [3, 5])
        results += [logits, extend(model, group, sequences, [[1], [2, 3]], method)]
    return [*results, torch.tensor([group.traffic.received, group.traffic.calls])]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=HOSTS, timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (HOSTS,), mesh_dim_names=("sequence",))
    torch.save(job(DistributedGroup(mesh.get_group("sequence"))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_processes_over_gloo_equal_the_simulation(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = simulated(HOSTS, job)
    finally:
        torch.set_num_threads(threads)
    mp.spawn(process, (str(tmp_path),), HOSTS)
    for rank in range(HOSTS):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected[rank], strict=True):
            assert torch.equal(ours, theirs)
