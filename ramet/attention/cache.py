"""Keys and values of sequences whose rows lie on several ranks.

A `SequenceShard` is one rank's share of one sequence: per layer a part that no longer changes, which forks share, and a tail
that grows on the rank that owns what is generated. Other ranks keep no tail. `ShardedCache` is the transformers `Cache`
through which a model's layers fill the sequences of one forward pass, packed one after another.
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
    """One layer's keys and values [Hk, T, D], and their tail."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._tail = keys.new_empty(2, keys.shape[0], 0, keys.shape[2])
        self._length = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows to the tail; its room doubles when it is full."""
        need = self._length + keys.shape[1]
        if need > self._tail.shape[2]:
            grown = self._tail.new_empty(2, keys.shape[0], max(need, 2 * self._tail.shape[2]), keys.shape[2])
            grown[:, :, : self._length] = self._tail[:, :, : self._length]
            self._tail = grown
        self._tail[0, :, self._length : need], self._tail[1, :, self._length : need] = keys, values
        self._length = need

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        return self._tail[0, :, : self._length], self._tail[1, :, : self._length]

    def fork(self, tail: int) -> LayerCache:
        """The same keys with the first `tail` rows of the tail; what either appends the other does not see."""
        forked = LayerCache(self.keys, self.values)
        forked._length = min(tail, self._length)
        forked._tail = self._tail[:, :, : forked._length].clone()
        return forked

    @property
    def rows(self) -> int:
        return self.keys.shape[1] + self._length


@dataclass
class SequenceShard:
    """One rank's share of one sequence.

    `length` counts the rows of the whole sequence, `next_position` numbers the next. The context's rows lie on all ranks
    and do not change; later rows are the tail. `after` says of rows whose positions are not their places what the next one's would be.
    """

    plan: BlockPlan | ShardedPlan
    length: int
    next_position: int
    layers: list[LayerCache] = field(default_factory=list)
    after: Tensor | None = None

    def fork(self, length: int | None = None) -> SequenceShard:
        """A sequence that shares the context, cut to its first `length` rows, which must hold the whole context."""
        length = self.length if length is None else length
        if not self.plan.context <= length <= self.length:
            raise ConfigError(f"a sequence of {self.length} rows with {self.plan.context} of context cannot be cut to {length}")
        layers = [layer.fork(length - self.plan.context) for layer in self.layers]
        if self.after is None or length > len(self.after):
            return SequenceShard(self.plan, length, self.next_position - (self.length - length), layers, self.after)
        after = self.after[:length]  # what is cut may hold a video, whose positions are no matter of counting
        return SequenceShard(self.plan, length, int(after[-1]) if length else 0, layers, after)


class ShardedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of the cache. In a prefill each sequence keeps its shard; later its owner appends. Both give back what came."""

    def __init__(self, cache: ShardedCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self._given = (-1, -1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new rows, (1, heads, rows, size), of all sequences."""
        rank = self.cache.rank
        for sequence, where in zip(self.cache.sequences, self.cache.slices, strict=True):
            keys, values = key_states[0, :, where], value_states[0, :, where]
            if self.cache.filling:
                rows, query = sequence.plan.cached_rows(rank), sequence.plan.query_rows(rank)
                kept = LayerCache(*(torch.cat([x[:, r] for r in rows], 1) for x in (keys, values)))
                kept.append(keys[:, query], values[:, query])
                sequence.layers.append(kept)
            elif rank == sequence.plan.query_owner:
                sequence.layers[self.index].append(keys, values)
        self._given = key_states.data_ptr(), value_states.data_ptr()
        return key_states, value_states

    def gave(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are what `update` gave back last."""
        return self._given == (keys.data_ptr(), values.data_ptr())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.cache.filling else max(s.length for s in self.cache.sequences)

    def get_max_length(self) -> int:
        return -1


class ShardedCache(Cache):  # type: ignore[misc]
    """The cache of one forward pass over packed sequences; `slices` says which of the pass's rows are whose."""

    def __init__(self, sequences: list[SequenceShard], slices: list[slice], rank: int, layers: int, filling: bool):
        self.sequences, self.slices, self.rank, self.filling = sequences, slices, rank, filling
        super().__init__(layers=[ShardedLayer(self, index) for index in range(layers)])
