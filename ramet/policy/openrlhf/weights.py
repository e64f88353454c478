"""Sending the trainers' weights to the engines, in buckets.

A call to every engine costs more than sending the bytes of a small parameter, and a model has hundreds. Parameters of one dtype are
therefore sent together, concatenated in a flat buffer: per bucket one concurrent call to every engine, and one broadcast. Engines
receive the exact bits. Tied parameters are one parameter, and sent once.

With ZeRO-3 a bucket is gathered, sent, and released before the next, so besides its shard a trainer holds one bucket twice
(gathered, and in the first trainer the buffer), and an engine holds it once. A parameter larger than a bucket is sent alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

BUCKET = 2**28
"""Bytes of a bucket."""

Named = list[tuple[str, torch.Tensor]]
"""Parameters with their names."""


def buckets(parameters: Iterable[tuple[str, torch.Tensor]], size: int = BUCKET) -> list[Named]:
    """The parameters in groups of one dtype and at most `size` bytes; a larger parameter is a group by itself.

    The groups are the same on every trainer, whatever its shards.
    """
    full: list[Named] = []
    open_: dict[torch.dtype, Named] = {}
    room: dict[torch.dtype, int] = {}
    for name, parameter in parameters:
        dtype = parameter.dtype
        needed = math.prod(shape_of(parameter)) * dtype.itemsize
        if dtype in open_ and needed > room[dtype]:
            full.append(open_.pop(dtype))
        if dtype not in open_:
            open_[dtype], room[dtype] = [], size
        open_[dtype].append((name, parameter))
        room[dtype] -= needed
    return [*full, *open_.values()]


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, of which a trainer holds a shard under ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def send(parameters: Named, last: bool, group: Any, engines: list[Any]) -> None:
    """Broadcast one gathered bucket to the actors of all engines, and wait until they have loaded it. Raises what they raise.

    Their `update_bucket(names, shapes, dtype, last)` is called; `last` says that no bucket of this update follows.
    """
    import ray

    names = [name for name, _ in parameters]
    shapes = [shape_of(parameter) for _, parameter in parameters]
    tensors = [parameter.detach().reshape(-1) for _, parameter in parameters]
    flat = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    calls = [engine.update_bucket.remote(names, shapes, flat.dtype, last) for engine in engines]
    _broadcast(group, flat)
    ray.get(calls)


def receive(names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, group: Any, device: Any) -> Named:
    """Receive a bucket in an engine's worker. The parameters are views of one buffer on `device`."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    _broadcast(group, flat)
    return [(name, part.view(tuple(shape))) for name, part, shape in zip(names, flat.split(sizes), shapes, strict=True)]


def _broadcast(group: Any, flat: torch.Tensor) -> None:
    # On the stream that writes and reads the buffer: by default vLLM's communicator would use another.
    group.broadcast(flat, src=0, stream=torch.cuda.current_stream() if flat.is_cuda else None)
