"""The key-value cache of the transformers backend: slots that decode together, and a store of prefixes.

`SlotCache` is a transformers `Cache` over fixed slots. The rows of a batch are its first slots, of different
lengths; a step writes every row at its own position and attends to a view, so nothing is
gathered, concatenated or padded by copying.

`PrefixStore` keeps the keys and values of finished contexts, for the next turn of the same branch
and for siblings with the same prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 8
"""Tokens per hash of a prefix: shorter prefixes are not stored."""
Memory = list[torch.Tensor]
"""The cache of one context: for each layer its keys, then its values, (heads, tokens, head size); the sizes may differ."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (slots, heads, length, head size)."""

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate all slots, with the heads, sizes, dtype and device of the first states."""
        slots, length = self.cache.slots, self.cache.length
        self.keys = key_states.new_zeros(slots, key_states.shape[1], length, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], length, value_states.shape[3])
        self.is_initialized = True

    def widen(self, slots: int, length: int) -> None:
        """Reallocate for `slots` slots of `length` tokens, with the old contents."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(slots, old.shape[1], length, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states (b, heads, m, size) at the cache's current rows and positions. Returns the keys and values of these rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        keys, values = self.keys[cache.first : cache.last], self.values[cache.first : cache.last]
        keys[cache.row_index, :, cache.positions] = key_states.transpose(1, 2)
        values[cache.row_index, :, cache.positions] = value_states.transpose(1, 2)
        return keys[:, :, : cache.span], values[:, :, : cache.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of key positions, offset of the first)."""
        return self.cache.span, 0

    def get_seq_length(self) -> int:
        """The number of key positions."""
        return self.cache.span

    def get_max_length(self) -> int:
        """Tokens that a slot has room for."""
        return self.cache.length


class SlotCache(Cache):  # type: ignore[misc]
    """The slots of one model. `aim` sets where the next forward pass writes and how many positions it attends to."""

    def __init__(self, layers: int):
        self.slots = self.length = 0
        self.first = self.last = self.span = 0
        self.positions = self.row_index = torch.empty(0, dtype=torch.long)
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def aim(self, first: int, positions: torch.Tensor, span: int) -> None:
        """The next pass has slots `first` onward as rows, writes their m tokens at `positions` (b, m), and attends to `span` positions."""
        self.first, self.last, self.span = first, first + positions.shape[0], span
        self.positions = positions
        self.row_index = torch.arange(positions.shape[0], device=positions.device)[:, None]

    def grow(self, slots: int, length: int) -> None:
        """Make room for `slots` contexts of `length` tokens. The number of slots at least doubles, so growing is rare."""
        if slots <= self.slots and length <= self.length:
            return
        self.slots = max(self.slots, slots if slots <= self.slots else max(slots, 2 * self.slots))
        self.length = max(self.length, length)
        for layer in self.layers:
            if layer.is_initialized:
                layer.widen(self.slots, self.length)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a slot to another."""
        for layer in self.layers:
            layer.keys[target, :, :tokens] = layer.keys[source, :, :tokens]
            layer.values[target, :, :tokens] = layer.values[source, :, :tokens]

    def take(self, slot: int, tokens: int) -> Memory:
        """A copy of the first `tokens` of a slot."""
        return [part[slot, :, :tokens].clone() for layer in self.layers for part in (layer.keys, layer.values)]

    def put(self, slot: int, stored: Memory, tokens: int) -> None:
        """Fill the first `tokens` of a slot from a copy that `take` made."""
        for part, kept in zip((part for layer in self.layers for part in (layer.keys, layer.values)), stored, strict=True):
            part[slot, :, :tokens] = kept[:, :tokens]


class PrefixStore:
    """Finished contexts of at most `capacity` bytes in total; the least recently used is evicted first.

    Contexts are looked up by a chain of hashes over blocks of `BLOCK` ids, and then compared id by id, so a
    hash collision can cause a miss but never a wrong prefix.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._entries: OrderedDict[int, tuple[tuple[int, ...], Memory, list[int], int]] = OrderedDict()
        self._holders: dict[int, dict[int, None]] = {}
        """By the hash of a prefix, the numbers of the entries that begin with it, oldest first."""
        self._bytes = 0
        self._next = 0

    def find(self, ids: Sequence[int]) -> tuple[int, Memory]:
        """(length, keys and values) of the longest stored prefix of `ids`; (0, []) if none of at least one block is stored."""
        number = None
        for chain in _chains(ids):
            if chain not in self._holders:
                break
            number = next(reversed(self._holders[chain]))
        if number is None:
            return 0, []
        known, memory, _, _ = self._entries[number]
        self._entries.move_to_end(number)
        return common_prefix(known, ids), memory

    def add(self, ids: tuple[int, ...], memory: Memory) -> None:
        """Store a context, unless it is shorter than a block or larger than the store; evict others if needed."""
        size = sum(part.nbytes for part in memory)
        if len(ids) < BLOCK or size > self.capacity:
            return
        chains = _chains(ids)
        self._entries[self._next] = (ids, memory, chains, size)
        for chain in chains:
            self._holders.setdefault(chain, {})[self._next] = None
        self._next += 1
        self._bytes += size
        while self._bytes > self.capacity:
            number, (_, _, chains, size) = self._entries.popitem(last=False)
            self._bytes -= size
            for chain in chains:
                del self._holders[chain][number]
                if not self._holders[chain]:
                    del self._holders[chain]

    def clear(self) -> None:
        """Drop all contexts."""
        self._entries.clear()
        self._holders.clear()
        self._bytes = 0


def _chains(ids: Sequence[int]) -> list[int]:
    """The hash of every prefix of whole blocks."""
    chains, chain = [], 0
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        chain = hash((chain, *ids[end - BLOCK : end]))
        chains.append(chain)
    return chains


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
