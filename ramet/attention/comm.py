"""Communication among the ranks that share a sequence: gather, shift and exchange. All calls are collective and asynchronous.

    work = group.gather(x)             # all-gather: work.wait() is [ranks, *x.shape], the same on every rank
    work = group.shift(x, like)        # ring step: rank r receives the x of rank r - 1
    work = group.exchange(xs, shapes)  # all-to-all: sends xs[r] to rank r, and receives what each rank sent to this one

There are two implementations: `DistributedGroup`, over a torch.distributed process group (gloo or NCCL, usually one dimension of a
DeviceMesh), and `simulated`, which runs the ranks as threads of one process, one at a time. A simulation measures the time that each
rank computes by itself (`Traffic.seconds`), as if it had a machine of its own; the time that its bytes would travel is not included.
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
    """The communication of one rank.

    received  bytes received from other ranks
    calls     collective operations
    seconds   time computed, in seconds; measured in a simulation only
    """

    received: int = 0
    calls: int = 0
    seconds: float = 0.0


class Work(Protocol):
    """A collective operation in progress. Tensors handed to it must not be changed until `wait` has returned."""

    def wait(self) -> Any:
        """Block until the operation is done, and return its result."""
        ...


class RankGroup(Protocol):
    """One rank's view of the group of ranks that share a sequence.

    rank     this rank, from 0
    size     number of ranks
    traffic  this rank's communication so far
    """

    rank: int
    size: int
    traffic: Traffic

    def gather(self, x: Tensor) -> Work:
        """Gather x, which has the same shape on every rank. The result is [size, *x.shape], the same on every rank."""
        ...

    def shift(self, x: Tensor, like: Tensor) -> Work:
        """Send x to the next rank, cyclically. The result is the previous rank's tensor, of the shape and type of `like`."""
        ...

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        """Send parts[r] to rank r. The result is a list of the tensors that each rank sent to this one, of the shapes `like`."""
        ...


@dataclass
class CompletedWork:
    """An operation that is already complete."""

    result: Any

    def wait(self) -> Any:
        """Return the result."""
        return self.result


@dataclass
class SingleRank:
    """A group of one rank, which communicates with itself only."""

    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic)

    def gather(self, x: Tensor) -> Work:
        """See `RankGroup`: x with a leading dimension of 1."""
        return CompletedWork(x[None])

    def shift(self, x: Tensor, like: Tensor) -> Work:
        """See `RankGroup`: x itself."""
        return CompletedWork(x)

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        """See `RankGroup`: the one part."""
        return CompletedWork(list(parts))


class DistributedGroup:
    """A group over a torch.distributed process group, by default the global one: `DistributedGroup(mesh.get_group("sequence"))`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()

    def gather(self, x: Tensor) -> Work:
        """See `RankGroup`: an all-gather."""
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        self._count(x.nbytes * (self.size - 1))
        handle = dist.all_gather_single(out.view(self.size * x.shape[0], *x.shape[1:]) if x.dim() else out, x, self._group, async_op=True)
        return _Pending([handle], out, x)

    def shift(self, x: Tensor, like: Tensor) -> Work:
        """See `RankGroup`: a send to the next rank and a receive from the previous one; empty tensors are not sent."""
        if self.size == 1:
            return CompletedWork(x)
        x, out = x.contiguous(), torch.empty_like(like)
        self._count(out.nbytes)
        peer = [dist.get_global_rank(self._group, r % self.size) if self._group else r % self.size for r in (self.rank + 1, self.rank - 1)]
        sends = [dist.P2POp(dist.isend, x, peer[0], self._group)] if x.numel() else []
        receives = [dist.P2POp(dist.irecv, out, peer[1], self._group)] if out.numel() else []
        return _Pending(dist.batch_isend_irecv(sends + receives) if sends or receives else [], out, x)

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        """See `RankGroup`: an all-to-all of the flattened parts."""
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
    """Operations of torch.distributed in progress. `sent` keeps the buffers alive that they read."""

    handles: Sequence[Any]
    result: Any
    sent: Tensor

    def wait(self) -> Any:
        for handle in self.handles:
            handle.wait()
        return self.result


class _Hub:
    """The state that simulated ranks share. One rank runs at a time, and gives way only while it waits for others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.condition = threading.Condition()
        self.running: int | None = None
        self.posted: dict[int, dict[int, Any]] = {}
        self.taken: dict[int, int] = {}
        self.failed = False


class _SimulatedGroup:
    """One simulated rank. A collective is posted by every rank under its number, and is complete when all have posted."""

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
        """What each rank posted for collective number `call`, once all have. The last rank to take it removes it."""
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
        return _SimulatedWork(self, self._post(x), lambda posted: torch.stack([posted[r] for r in range(self.size)]))

    def shift(self, x: Tensor, like: Tensor) -> Work:
        self.traffic.received += like.nbytes if self.size > 1 else 0
        return _SimulatedWork(self, self._post(x), lambda posted: posted[(self.rank - 1) % self.size])

    def exchange(self, parts: Sequence[Tensor], like: Sequence[tuple[int, ...]]) -> Work:
        self.traffic.received += sum(torch.Size(s).numel() for r, s in enumerate(like) if r != self.rank) * parts[0].element_size()
        return _SimulatedWork(self, self._post(list(parts)), lambda posted: [posted[r][self.rank] for r in range(self.size)])


@dataclass
class _SimulatedWork:
    """A simulated collective: `take` makes this rank's result of what all have posted."""

    rank: _SimulatedGroup
    call: int
    take: Callable[[dict[int, Any]], Any]

    def wait(self) -> Any:
        return self.take(self.rank.all_posted(self.call))


def simulated(size: int, function: Callable[[RankGroup], _T]) -> list[_T]:
    """Run `function(group)` for each of `size` ranks, as threads of this process that take turns. Returns the results in rank order.

    If a rank raises, the others are stopped and its exception is raised. Every rank inherits the caller's gradient mode and context
    variables.
    """
    hub = _Hub(size)
    results: dict[int, _T] = {}
    errors: list[BaseException] = []
    grad = torch.is_grad_enabled()

    def run(group: _SimulatedGroup) -> None:
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
        threading.Thread(target=contextvars.copy_context().run, args=(run, _SimulatedGroup(hub, rank)), name=f"rank-{rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
