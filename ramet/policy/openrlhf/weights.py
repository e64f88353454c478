"""Weights on their way from the trainers to the engines, in buckets.

A call to every engine costs more than the bytes of a small parameter, and a model has hundreds. So parameters of one type travel
together, end to end in a flat buffer: for a bucket, one call to every engine, all at the same time, and one broadcast. What
arrives is what was sent, to the last bit. Parameters that a model ties are one, and sent once.

With ZeRO-3 a bucket is gathered, sent, and let go before the next, so besides its shard a trainer holds one bucket twice
(gathered, and in the first trainer the buffer), and an engine one once; of a parameter larger than a bucket, no more than it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

BUCKET = 2**28
"""Bytes of a bucket."""

Named = list[tuple[str, torch.Tensor]]


def buckets(parameters: Iterable[tuple[str, torch.Tensor]], size: int = BUCKET) -> list[Named]:
    """The parameters in groups of one type and at most `size` bytes; a larger parameter is a group by itself.

    The same on every trainer, whatever its shards are.
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
    """Of the whole parameter, of which ZeRO-3 leaves a trainer a shard."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def send(parameters: Named, last: bool, group: Any, engines: list[Any]) -> None:
    """Broadcast one bucket, gathered, to the actors of all engines, and wait until they have it. Raises what they raise.

    They are called as `update_bucket(names, shapes, dtype, last)`; after the last bucket the weights are whole.
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
    """In an engine's worker: the parameters of a bucket, views of one buffer."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    _broadcast(group, flat)
    return [(name, part.view(tuple(shape))) for name, part, shape in zip(names, flat.split(sizes), shapes, strict=True)]


def _broadcast(group: Any, flat: torch.Tensor) -> None:
    # In the order of what writes and reads the buffer: vLLM's communicator would choose another stream by itself.
    group.broadcast(flat, src=0, stream=torch.cuda.current_stream() if flat.is_cuda else None)
