"""The key-value cache of sequences whose rows are distributed over ranks.

A `SequenceShard` is one rank's share of one sequence. For each layer it holds a fixed part, which forks share, and a tail, which grows
on the rank that owns the generated rows and stays empty on the others. `ShardedCache` is the transformers `Cache` through which the
layers of a model fill the shards of one forward pass, in which sequences are packed one after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ramet.attention.plan import BlockPlan, ShardedPlan
from ramet.errors import ConfigError


class LayerCache:
    """One layer's share of a sequence: fixed `keys` and `values` [Hk, T, D], and a tail that can grow."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._tail = keys.new_empty(2, keys.shape[0], 0, keys.shape[2])
        self._length = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append rows, keys and values [Hk, n, D], to the tail. The tail's capacity doubles when it is full."""
        need = self._length + keys.shape[1]
        if need > self._tail.shape[2]:
            grown = self._tail.new_empty(2, keys.shape[0], max(need, 2 * self._tail.shape[2]), keys.shape[2])
            grown[:, :, : self._length] = self._tail[:, :, : self._length]
            self._tail = grown
        self._tail[0, :, self._length : need], self._tail[1, :, self._length : need] = keys, values
        self._length = need

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values [Hk, n, D] of the tail."""
        return self._tail[0, :, : self._length], self._tail[1, :, : self._length]

    def fork(self, tail: int) -> LayerCache:
        """A copy that shares the fixed part and has the first `tail` rows of the tail. Later appends to either do not affect the other."""
        forked = LayerCache(self.keys, self.values)
        forked._length = min(tail, self._length)
        forked._tail = self._tail[:, :, : forked._length].clone()
        return forked

    @property
    def rows(self) -> int:
        """Number of rows, fixed part and tail together."""
        return self.keys.shape[1] + self._length


@dataclass
class SequenceShard:
    """One rank's share of one sequence.

    plan           the layout; its context is distributed over the ranks and fixed, and later rows are the tail
    length         rows of the whole sequence, on all ranks
    next_position  position of the next row
    layers         this rank's keys and values, layer by layer
    after          for rows whose positions differ from their indices: the position [N] of a row that would follow each of them
    """

    plan: BlockPlan | ShardedPlan
    length: int
    next_position: int
    layers: list[LayerCache] = field(default_factory=list)
    after: Tensor | None = None

    def fork(self, length: int | None = None) -> SequenceShard:
        """A sequence that shares the context and is cut to its first `length` rows, by default all.

        Raises `ConfigError` for a length that does not include the whole context, or exceeds the sequence.
        """
        length = self.length if length is None else length
        if not self.plan.context <= length <= self.length:
            raise ConfigError(f"a sequence of {self.length} rows, {self.plan.context} of them context, cannot be cut to {length} rows")
        layers = [layer.fork(length - self.plan.context) for layer in self.layers]
        if self.after is None or length > len(self.after):
            return SequenceShard(self.plan, length, self.next_position - (self.length - length), layers, self.after)
        after = self.after[:length]  # the rows cut off may include a video, whose positions do not increase by one per row
        return SequenceShard(self.plan, length, int(after[-1]) if length else 0, layers, after)


class ShardedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the cache. In a prefill each sequence keeps its shard; later its owner appends. Rows are returned as they came."""

    def __init__(self, cache: ShardedCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self._returned = (-1, -1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to initialise: shards are built in `update`."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cache this rank's share of the new rows [1, Hk, T, D] of all sequences, and return the rows as they came."""
        rank = self.cache.rank
        for sequence, where in zip(self.cache.sequences, self.cache.slices, strict=True):
            keys, values = key_states[0, :, where], value_states[0, :, where]
            if self.cache.filling:
                rows, query = sequence.plan.cached_rows(rank), sequence.plan.query_rows(rank)
                layer = LayerCache(*(torch.cat([x[:, r] for r in rows], 1) for x in (keys, values)))
                layer.append(keys[:, query], values[:, query])
                sequence.layers.append(layer)
            elif rank == sequence.plan.query_owner:
                sequence.layers[self.index].append(keys, values)
        self._returned = key_states.data_ptr(), value_states.data_ptr()
        return key_states, value_states

    def returned(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these tensors are the ones that `update` returned last."""
        return self._returned == (keys.data_ptr(), values.data_ptr())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The (key length, offset) from which transformers would build a mask; none is built for this attention."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Rows cached so far of the longest sequence, on all ranks; 0 during a prefill."""
        return 0 if self.cache.filling else max(s.length for s in self.cache.sequences)

    def get_max_length(self) -> int:
        """-1, which stands for no limit."""
        return -1


class ShardedCache(Cache):  # type: ignore[misc]
    """The cache of one forward pass over packed sequences.

    sequences  the shards that the pass fills or extends
    slices     the rows of the pass that belong to each sequence
    rank       this rank
    layers     number of the model's layers
    filling    True for a prefill, False for rows added to filled shards
    """

    def __init__(self, sequences: list[SequenceShard], slices: list[slice], rank: int, layers: int, filling: bool):
        self.sequences, self.slices, self.rank, self.filling = sequences, slices, rank, filling
        super().__init__(layers=[ShardedLayer(self, index) for index in range(layers)])
