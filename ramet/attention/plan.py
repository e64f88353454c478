"""Sequence layouts: which rank holds which rows, and which rows attend to which. Plain data, identical on every rank.

A sequence consists of `context` rows followed by `query` rows, the question. A `BlockPlan` splits the context after the anchor into
one block per virtual host and assigns the virtual hosts to ranks. Every length that is ever communicated follows from the plan, so
ranks never exchange sizes. Three methods use it:

    spava(...)   an anchor on every rank and two blocks per rank, h and V-1-h of V virtual hosts (zigzag), which balances the load
                 (Huang et al. 2026, Spava, arXiv 2601.21444)
    star(...)    one block per rank; the first block is every rank's anchor, and nothing is passed on
                 (Acharya et al. 2024, Star Attention, arXiv 2411.17116)
    apb(...)     one block per rank; every rank but the first holds a copy of the query and the first rows, numbered from 0, as its anchor
                 (Huang et al. 2025, APB, arXiv 2502.12085)

A `ShardedPlan` shards the whole sequence, query included, for the exact methods: ring, zigzag ring and Ulysses.

The local rows of a rank are, in this order, its copy of the anchor, its blocks and the query.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ramet.errors import ConfigError

Block = tuple[int, int]
"""A half-open range [start, stop) of rows."""


def balanced(start: int, stop: int, parts: int) -> tuple[Block, ...]:
    """Split [start, stop) into `parts` contiguous ranges whose lengths differ by at most one, longer ones first. Ranges may be empty."""
    short, extra = divmod(stop - start, parts)
    ends = [start]
    for part in range(parts):
        ends.append(ends[-1] + short + (part < extra))
    return tuple(pairwise(ends))


def default_anchor(context: int) -> int:
    """Spava's default anchor length, 128 ceil(floor(n / 64) / 128) rows for a context of n rows, and at most n."""
    return min(context, 128 * -(-(context // 64) // 128))


def default_passing(context: int) -> int:
    """Spava's default passing length, 128 ceil(floor(n / 128) / 128) rows for a context of n rows, and at most n."""
    return min(context, 128 * -(-(context // 128) // 128))


@dataclass(frozen=True)
class BlockPlan:
    """The layout of one sequence on `hosts` ranks: blocks attend to an anchor, to selected rows of earlier blocks and to themselves.

    context       rows of the context
    query         rows of the query, at least 1
    hosts         number of ranks
    anchor        number of leading rows that every block attends to
    passing       most rows that a block passes on per KV head
    blocks        rows of each virtual host, in sequence order
    owners        rank of each virtual host
    fresh_anchor  True for APB: all ranks but the first hold a copy of the query and the anchor, numbered from 0, whose keys are
                  dropped after the forward pass. False: the anchor is part of the sequence, and every rank holds the same copy

    Raises `ConfigError` for lengths that are negative or do not fit the context.
    """

    context: int
    query: int
    hosts: int
    anchor: int
    passing: int
    blocks: tuple[Block, ...]
    owners: tuple[int, ...]
    fresh_anchor: bool = False

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.context < 0 or self.query < 1:
            raise ConfigError(
                f"a layout needs at least one host and one query row, and no negative length"
                f" (got {self.hosts} hosts, {self.context} context rows, {self.query} query rows)"
            )
        if not 0 <= self.anchor <= self.context or self.passing < 0:
            raise ConfigError(
                f"the anchor must have between 0 and {self.context} rows, the length of the context (got {self.anchor}), and the passing"
                f" length must not be negative (got {self.passing})"
            )

    @property
    def length(self) -> int:
        """Rows of the whole sequence."""
        return self.context + self.query

    @property
    def rounds(self) -> int:
        """Blocks per rank. In each round every rank passes on the selection of one block."""
        return len(self.blocks) // self.hosts

    def owned(self, rank: int) -> tuple[int, ...]:
        """Virtual hosts of `rank`, in sequence order."""
        return tuple(v for v, owner in enumerate(self.owners) if owner == rank)

    def size(self, virtual: int) -> int:
        """Rows in the block of `virtual`."""
        start, stop = self.blocks[virtual]
        return stop - start

    def selectable(self, virtual: int) -> Block:
        """The rows of a block that may be passed on, relative to its start. Rows that belong to the anchor are excluded."""
        start, stop = self.blocks[virtual]
        return min(max(self.anchor - start, 0), stop - start), stop - start

    def kept(self, virtual: int) -> int:
        """Number of rows that `virtual` passes on per KV head."""
        low, high = self.selectable(virtual)
        return min(self.passing, high - low)

    @property
    def widest(self) -> int:
        """Rows per KV head of the padded buffer in which selections are sent: the most that any block passes on."""
        return max(self.kept(v) for v in range(len(self.blocks)))

    def before(self, virtual: int) -> tuple[int, ...]:
        """Virtual hosts whose selected rows `virtual` attends to."""
        return tuple(range(virtual)) if self.passing else ()

    def anchor_rows(self, rank: int) -> tuple[int, ...]:
        """Rows of the sequence held by the anchor copy on `rank`."""
        if not self.fresh_anchor:
            return tuple(range(self.anchor))
        return () if rank == 0 else (*range(self.context, self.length), *range(self.anchor))

    def anchor_size(self, rank: int) -> int:
        """Number of rows in the anchor copy on `rank`."""
        if not self.fresh_anchor:
            return self.anchor
        return 0 if rank == 0 else self.query + self.anchor

    def anchor_shard(self, rank: int) -> Block:
        """The range of the anchor whose keys `rank` keeps in its cache. Empty for a fresh anchor, whose rows are in the first block."""
        return (0, 0) if self.fresh_anchor else balanced(0, self.anchor, self.hosts)[rank]

    @property
    def query_owner(self) -> int:
        """The rank that caches the keys of the query and of all generated rows."""
        return self.owners[-1]

    def rows(self, rank: int) -> list[int]:
        """The sequence rows that `rank` holds, in local order: anchor copy, blocks, query."""
        rows = list(self.anchor_rows(rank))
        for virtual in self.owned(rank):
            rows += range(*self.blocks[virtual])
        return rows + list(range(self.context, self.length))

    def positions(self, rank: int) -> list[int]:
        """Position ids of the local rows. They are the rows' places in the sequence, except that a fresh anchor is numbered from 0."""
        rows, fresh = self.rows(rank), self.anchor_size(rank) if self.fresh_anchor else 0
        return [*range(fresh), *rows[fresh:]]

    def slices(self, rank: int) -> tuple[slice, list[slice], slice]:
        """The local slices of the anchor copy, of each block and of the query."""
        offset = self.anchor_size(rank)
        anchor, blocks = slice(0, offset), []
        for virtual in self.owned(rank):
            blocks.append(slice(offset, offset + self.size(virtual)))
            offset += self.size(virtual)
        return anchor, blocks, slice(offset, offset + self.query)

    def cached_rows(self, rank: int) -> list[slice]:
        """Local slices of the context rows whose keys `rank` caches: its share of the anchor, and its blocks."""
        return [slice(*self.anchor_shard(rank)), *self.slices(rank)[1]]

    def query_rows(self, rank: int) -> slice:
        """The local slice of the query if `rank` caches its keys, else an empty slice."""
        return self.slices(rank)[2] if rank == self.query_owner else slice(0, 0)


def zigzag_owners(hosts: int) -> tuple[int, ...]:
    """The rank of each of 2 `hosts` virtual hosts: rank h owns h and 2 `hosts` - 1 - h."""
    return (*range(hosts), *reversed(range(hosts)))


def spava(context: int, query: int, hosts: int, anchor: int | None = None, passing: int | None = None) -> BlockPlan:
    """Spava's layout. `anchor` and `passing` default to the published lengths, `default_anchor` and `default_passing`."""
    anchor = default_anchor(context) if anchor is None else anchor
    passing = default_passing(context) if passing is None else passing
    blocks = balanced(min(anchor, context), context, 2 * hosts)
    return BlockPlan(context, query, hosts, anchor, passing, blocks, zigzag_owners(hosts))


def star(context: int, query: int, hosts: int) -> BlockPlan:
    """Star Attention's layout: the first of `hosts` equal blocks is the anchor of every rank."""
    first, *rest = balanced(0, context, hosts)
    return BlockPlan(context, query, hosts, first[1], 0, ((first[1], first[1]), *rest), tuple(range(hosts)))


def apb(context: int, query: int, hosts: int, anchor: int | None = None, passing: int | None = None) -> BlockPlan:
    """APB's layout, with `anchor` rows in the anchor beside the query.

    `anchor` and `passing` default to `default_anchor`, about n / 64 rows each: with half as many blocks as Spava and twice the passing
    length, both methods compute about the same number of query-key pairs.
    """
    anchor = default_anchor(context) if anchor is None else anchor
    passing = default_anchor(context) if passing is None else passing
    return BlockPlan(context, query, hosts, anchor, passing, balanced(0, context, hosts), tuple(range(hosts)), fresh_anchor=True)


@dataclass(frozen=True)
class ShardedPlan:
    """The layout of a whole sequence, query included, on `hosts` ranks, for the exact methods.

    length  rows of the sequence
    hosts   number of ranks
    zigzag  False: one contiguous range of rows per rank. True: two, h and 2 hosts - 1 - h, which balances the causal triangle

    Raises `ConfigError` for an empty sequence.
    """

    length: int
    hosts: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.length < 1:
            raise ConfigError(f"a layout needs at least one host and one row (got {self.hosts} hosts, {self.length} rows)")

    def blocks(self, rank: int) -> tuple[Block, ...]:
        """The ranges of rows on `rank`, in sequence order."""
        if not self.zigzag:
            return (balanced(0, self.length, self.hosts)[rank],)
        runs = balanced(0, self.length, 2 * self.hosts)
        return (runs[rank], runs[2 * self.hosts - 1 - rank])

    def size(self, rank: int) -> int:
        """Number of rows on `rank`."""
        return sum(stop - start for start, stop in self.blocks(rank))

    @property
    def query_owner(self) -> int:
        """The rank that holds the last row, and that caches the keys of all generated rows."""
        return next(rank for rank in range(self.hosts) if any(stop == self.length > start for start, stop in self.blocks(rank)))

    def rows(self, rank: int) -> list[int]:
        """The sequence rows that `rank` holds, in local order."""
        return [row for block in self.blocks(rank) for row in range(*block)]

    def positions(self, rank: int) -> list[int]:
        """Position ids of the local rows: their places in the sequence."""
        return self.rows(rank)

    def cached_rows(self, rank: int) -> list[slice]:
        """Local slices of the rows whose keys `rank` caches: all of them."""
        return [slice(0, self.size(rank))]

    def query_rows(self, rank: int) -> slice:
        """An empty slice: the query is sharded with the rest of the sequence, and `cached_rows` covers it."""
        return slice(0, 0)

    @property
    def context(self) -> int:
        """Rows that forks of the sequence share: all of them."""
        return self.length
