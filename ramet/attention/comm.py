"""What ranks say to one another: gather, shift, exchange. Every call is collective, asynchronous, and padded by its caller.

    work = group.gather(x)      # [..] on every rank -> work.wait() [ranks, ..], the same on every rank
    work = group.shift(x)       # rank r gets the x of rank r - 1
    work = group.exchange(xs)   # one tensor per rank, sent to it -> the tensors that were meant for this one

Two implementations: `DistributedGroup` over a torch.distributed process group (gloo or NCCL, usually one dimension of a
DeviceMesh), and `simulated`, which runs the ranks as threads of one process, one at a time. In a simulation a rank's own
work is timed alone (`Traffic.seconds`), as if on a machine of its own; what its bytes would cost is for the caller to say.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ramet.errors import RankAborted

_T = TypeVar("_T")


@dataclass
class Traffic:
    """What one rank received from others in bytes, in how many collectives; in a simulation, how long it worked."""

    received: int = 0
    calls: int = 0
    seconds: float = 0.0


class Work(Protocol):
    """A collective on its way. Buffers handed in must stay as they are until `wait` has returned."""

    def wait(self) -> Any: ...


class RankGroup(Protocol):
    """One rank's view of the ranks that share a sequence."""

    rank: int
    size: int
    traffic: Traffic

    def gather(self, x: Tensor) -> Work:
        """x has the same shape on every rank; waits for [size, *x.shape]."""
        ...

    def shift(self, x: Tensor, like: Tensor) -> Work:
        """Send x to the next rank; waits for the tensor of the previous one, which has the shape of `like`."""
        ...

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        """Send parts[r] to rank r; waits for a list of what each rank sent here, of shapes `like`."""
        ...


@dataclass
class CompletedWork:
    """A collective that has its result already."""

    result: Any

    def wait(self) -> Any:
        return self.result


@dataclass
class SingleRank:
    """A group of one."""

    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def gather(self, x: Tensor) -> Work:
        return CompletedWork(x[None])

    def shift(self, x: Tensor, like: Tensor) -> Work:
        return CompletedWork(x)

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        return CompletedWork(list(parts))


class DistributedGroup:
    """A torch.distributed process group. `DistributedGroup(mesh.get_group("sequence"))`, or without one the default group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()

    def gather(self, x: Tensor) -> Work:
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        self._count(x.nbytes * (self.size - 1))
        handle = dist.all_gather_single(out.view(self.size * x.shape[0], *x.shape[1:]) if x.dim() else out, x, self._group, async_op=True)
        return _Pending([handle], out, x)

    def shift(self, x: Tensor, like: Tensor) -> Work:
        if self.size == 1:
            return CompletedWork(x)
        x, out = x.contiguous(), torch.empty_like(like)
        self._count(out.nbytes)
        peer = [dist.get_global_rank(self._group, r % self.size) if self._group else r % self.size for r in (self.rank + 1, self.rank - 1)]
        sends = [dist.P2POp(dist.isend, x, peer[0], self._group)] if x.numel() else []
        receives = [dist.P2POp(dist.irecv, out, peer[1], self._group)] if out.numel() else []
        return _Pending(dist.batch_isend_irecv(sends + receives) if sends or receives else [], out, x)

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        sizes_in, sizes_out = [p.numel() for p in parts], [int(torch.Size(s).numel()) for s in like]
        x = torch.cat([p.reshape(-1) for p in parts])
        out = x.new_empty(sum(sizes_out))
        self._count(out.nbytes - sizes_out[self.rank] * out.element_size())
        handle = dist.all_to_all_single(out, x, sizes_out, sizes_in, self._group, async_op=True)
        return _Pending([handle], [p.view(s) for p, s in zip(out.split(sizes_out), like, strict=True)], x)

    def _count(self, received: int) -> None:
        self.traffic.received += received
        self.traffic.calls += 1


@dataclass
class _Pending:
    handles: Sequence[Any]
    result: Any
    sent: Tensor

    def wait(self) -> Any:
        for handle in self.handles:
            handle.wait()
        return self.result


class _Hub:
    """Where simulated ranks meet. One rank runs at a time: it holds the baton except while it waits for others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.condition = threading.Condition()
        self.running: int | None = None
        self.posted: dict[int, dict[int, Any]] = {}
        self.taken: dict[int, int] = {}
        self.failed = False


class _Simulated:
    def __init__(self, hub: _Hub, rank: int) -> None:
        self._hub, self.rank, self.size = hub, rank, hub.size
        self.traffic = Traffic()
        self._calls = 0
        self._since = 0.0

    def acquire(self) -> None:
        with self._hub.condition:
            self._hub.condition.wait_for(lambda: self._hub.running is None or self._hub.failed)
            if self._hub.failed:
                raise RankAborted
            self._hub.running = self.rank
        self._since = time.perf_counter()

    def release(self) -> None:
        self.traffic.seconds += time.perf_counter() - self._since
        with self._hub.condition:
            self._hub.running = None
            self._hub.condition.notify_all()

    def _post(self, x: Any) -> int:
        call, self._calls = self._calls, self._calls + 1
        self.traffic.calls += 1
        with self._hub.condition:
            self._hub.posted.setdefault(call, {})[self.rank] = x
            self._hub.condition.notify_all()
        return call

    def all_posted(self, call: int) -> dict[int, Any]:
        if len(self._hub.posted[call]) < self.size:
            self.release()
            with self._hub.condition:
                self._hub.condition.wait_for(lambda: len(self._hub.posted[call]) == self.size or self._hub.failed)
            self.acquire()
        with self._hub.condition:
            posted = self._hub.posted[call]
            self._hub.taken[call] = self._hub.taken.get(call, 0) + 1
            if self._hub.taken[call] == self.size:
                del self._hub.posted[call], self._hub.taken[call]
        return posted

    def gather(self, x: Tensor) -> Work:
        self.traffic.received += x.nbytes * (self.size - 1)
        return _Meeting(self, self._post(x), lambda posted: torch.stack([posted[r] for r in range(self.size)]))

    def shift(self, x: Tensor, like: Tensor) -> Work:
        self.traffic.received += like.nbytes if self.size > 1 else 0
        return _Meeting(self, self._post(x), lambda posted: posted[(self.rank - 1) % self.size])

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        self.traffic.received += sum(torch.Size(s).numel() for r, s in enumerate(like) if r != self.rank) * parts[0].element_size()
        return _Meeting(self, self._post(list(parts)), lambda posted: [posted[r][self.rank] for r in range(self.size)])


@dataclass
class _Meeting:
    rank: _Simulated
    call: int
    take: Callable[[dict[int, Any]], Any]

    def wait(self) -> Any:
        return self.take(self.rank.all_posted(self.call))


def simulated(size: int, function: Callable[[RankGroup], _T]) -> list[_T]:
    """Run `function(group)` for each rank as a thread of this process, one at a time; results in rank order.

    The first exception of any rank stops the others and is raised. The caller's gradient mode and context variables
    hold in every rank.
    """
    hub = _Hub(size)
    results: dict[int, _T] = {}
    errors: list[BaseException] = []
    grad = torch.is_grad_enabled()

    def run(group: _Simulated) -> None:
        try:
            group.acquire()
            try:
                with torch.set_grad_enabled(grad):
                    results[group.rank] = function(group)
            finally:
                group.release()
        except RankAborted:
            pass
        except BaseException as error:
            errors.append(error)
            with hub.condition:
                hub.failed = True
                hub.condition.notify_all()

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, _Simulated(hub, rank)), name=f"rank-{rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
