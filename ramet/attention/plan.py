"""Who holds which rows, and who attends to what: pure data, the same on every rank.

A sequence is `context` rows and then `query` rows (the question, last). A `BlockPlan` cuts the context after an anchor into
one block per virtual host and gives the virtual hosts to ranks; every length that is ever sent follows from it, so no
rank asks another for sizes. Three layouts share it:

    spava(...)   an anchor on every rank; two blocks a rank, h and V-1-h (zigzag), which makes all loads equal
    star(...)    one block a rank; the anchor is the first of them; nothing is passed on
    apb(...)     one block a rank; the anchor copy is the query and the first rows, renumbered, on all ranks but the first

and `ShardedPlan` shards the whole sequence, query included, for ring, zigzag ring and Ulysses.

Local row order on a rank: anchor copy, its blocks in order, query. Source: specification, sections 1.3, 1.4, 1.12, 8.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ramet.errors import ConfigError

Block = tuple[int, int]


def balanced(start: int, stop: int, parts: int) -> tuple[Block, ...]:
    """[start, stop) in `parts` runs whose lengths differ by at most one, longer ones first; runs may be empty."""
    short, extra = divmod(stop - start, parts)
    ends = [start]
    for part in range(parts):
        ends.append(ends[-1] + short + (part < extra))
    return tuple(pairwise(ends))


def default_anchor(context: int) -> int:
    """l_a = 128 ceil(floor(n / 64) / 128), as in the published runs (section 3), and never more than there is."""
    return min(context, 128 * -(-(context // 64) // 128))


def default_passing(context: int) -> int:
    """l_p = 128 ceil(floor(n / 128) / 128)."""
    return min(context, 128 * -(-(context // 128) // 128))


@dataclass(frozen=True)
class BlockPlan:
    """One sequence on `hosts` ranks.

    anchor        rows [0, anchor) that every block sees
    passing       rows of a block passed on per KV head, at most
    blocks        [start, stop) of each virtual host, in the order of the sequence
    owners        the rank of each virtual host
    fresh_anchor  APB: ranks but the first hold a copy of the query and of the anchor rows, numbered from 0, whose keys
                  are dropped after the forward pass. Otherwise the anchor is part of the sequence, the same on all ranks
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
                f"a plan needs at least one host, one query row and no negative lengths"
                f" (got {self.hosts} hosts, {self.context} context rows, {self.query} query rows)"
            )
        if not 0 <= self.anchor <= self.context or self.passing < 0:
            raise ConfigError(f"anchor {self.anchor} and passing {self.passing} must lie between 0 and the context's {self.context} rows")

    @property
    def length(self) -> int:
        """Rows of the whole sequence."""
        return self.context + self.query

    @property
    def rounds(self) -> int:
        """Blocks of a rank; each round passes one of them on."""
        return len(self.blocks) // self.hosts

    def owned(self, rank: int) -> tuple[int, ...]:
        """Virtual hosts of `rank`, in the order of the sequence."""
        return tuple(v for v, owner in enumerate(self.owners) if owner == rank)

    def size(self, virtual: int) -> int:
        start, stop = self.blocks[virtual]
        return stop - start

    def selectable(self, virtual: int) -> Block:
        """Rows of a block that may be passed on, relative to its start: not those that are in every anchor."""
        start, stop = self.blocks[virtual]
        return min(max(self.anchor - start, 0), stop - start), stop - start

    def kept(self, virtual: int) -> int:
        """How many rows per KV head `virtual` passes on."""
        low, high = self.selectable(virtual)
        return min(self.passing, high - low)

    @property
    def widest(self) -> int:
        """Rows per KV head of a padded passing block."""
        return max(self.kept(v) for v in range(len(self.blocks)))

    def before(self, virtual: int) -> tuple[int, ...]:
        """Virtual hosts whose selections `virtual` attends to."""
        return tuple(range(virtual)) if self.passing else ()

    def anchor_rows(self, rank: int) -> tuple[int, ...]:
        """Rows of the sequence that the anchor copy on `rank` holds."""
        if not self.fresh_anchor:
            return tuple(range(self.anchor))
        return () if rank == 0 else (*range(self.context, self.length), *range(self.anchor))

    def anchor_size(self, rank: int) -> int:
        """How many rows the anchor copy on `rank` has."""
        if not self.fresh_anchor:
            return self.anchor
        return 0 if rank == 0 else self.query + self.anchor

    def anchor_shard(self, rank: int) -> Block:
        """The part of the anchor whose keys `rank` keeps. A fresh anchor is dropped: its rows are in the first block."""
        return (0, 0) if self.fresh_anchor else balanced(0, self.anchor, self.hosts)[rank]

    @property
    def query_owner(self) -> int:
        """The rank that keeps the keys of the query and of all that is generated."""
        return self.owners[-1]

    def rows(self, rank: int) -> list[int]:
        """Local rows of `rank` as rows of the sequence: anchor copy, blocks, query."""
        rows = list(self.anchor_rows(rank))
        for virtual in self.owned(rank):
            rows += range(*self.blocks[virtual])
        return rows + list(range(self.context, self.length))

    def positions(self, rank: int) -> list[int]:
        """Position ids of the local rows: those of the sequence, but a fresh anchor is numbered from 0."""
        rows, fresh = self.rows(rank), self.anchor_size(rank) if self.fresh_anchor else 0
        return [*range(fresh), *rows[fresh:]]

    def slices(self, rank: int) -> tuple[slice, list[slice], slice]:
        """Where the anchor copy, each block and the query stand among the local rows."""
        at = self.anchor_size(rank)
        anchor, blocks = slice(0, at), []
        for virtual in self.owned(rank):
            blocks.append(slice(at, at + self.size(virtual)))
            at += self.size(virtual)
        return anchor, blocks, slice(at, at + self.query)

    def cached_rows(self, rank: int) -> list[slice]:
        """Local rows of the context whose keys `rank` keeps: its share of the anchor and its blocks."""
        return [slice(*self.anchor_shard(rank)), *self.slices(rank)[1]]

    def query_rows(self, rank: int) -> slice:
        """Local rows of the query if `rank` keeps their keys, else none."""
        return self.slices(rank)[2] if rank == self.query_owner else slice(0, 0)


def zigzag_owners(hosts: int) -> tuple[int, ...]:
    """Rank h owns virtual hosts h and 2 hosts - 1 - h."""
    return (*range(hosts), *reversed(range(hosts)))


def spava(context: int, query: int, hosts: int, anchor: int | None = None, passing: int | None = None) -> BlockPlan:
    """Spava's plan. Without lengths, the published ones."""
    anchor = default_anchor(context) if anchor is None else anchor
    passing = default_passing(context) if passing is None else passing
    blocks = balanced(min(anchor, context), context, 2 * hosts)
    return BlockPlan(context, query, hosts, anchor, passing, blocks, zigzag_owners(hosts))


def star(context: int, query: int, hosts: int) -> BlockPlan:
    """Star attention: the first of `hosts` equal blocks is everybody's anchor."""
    first, *rest = balanced(0, context, hosts)
    return BlockPlan(context, query, hosts, first[1], 0, ((first[1], first[1]), *rest), tuple(range(hosts)))


def apb(context: int, query: int, hosts: int, anchor: int | None = None, passing: int | None = None) -> BlockPlan:
    """APB with an anchor of `anchor` rows beside the query's; by default n/64 rows of both, the published equal compute."""
    anchor = default_anchor(context) if anchor is None else anchor
    passing = default_anchor(context) if passing is None else passing
    return BlockPlan(context, query, hosts, anchor, passing, balanced(0, context, hosts), tuple(range(hosts)), fresh_anchor=True)


@dataclass(frozen=True)
class ShardedPlan:
    """A whole sequence, query included, on `hosts` ranks: one run of rows a rank or, in zigzag, two that balance the
    causal triangle. For ring, zigzag ring and Ulysses, which are exact."""

    length: int
    hosts: int
    zigzag: bool = False

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.length < 1:
            raise ConfigError(f"a plan needs at least one host and one row (got {self.hosts} hosts, {self.length} rows)")

    def blocks(self, rank: int) -> tuple[Block, ...]:
        """[start, stop) of the runs on `rank`, in the order of the sequence."""
        if not self.zigzag:
            return (balanced(0, self.length, self.hosts)[rank],)
        runs = balanced(0, self.length, 2 * self.hosts)
        return (runs[rank], runs[2 * self.hosts - 1 - rank])

    def size(self, rank: int) -> int:
        return sum(stop - start for start, stop in self.blocks(rank))

    @property
    def query_owner(self) -> int:
        """The rank that holds the last row and keeps the keys of all that is generated."""
        return next(rank for rank in range(self.hosts) if any(stop == self.length > start for start, stop in self.blocks(rank)))

    def rows(self, rank: int) -> list[int]:
        """Local rows of `rank` as rows of the sequence."""
        return [row for block in self.blocks(rank) for row in range(*block)]

    def positions(self, rank: int) -> list[int]:
        return self.rows(rank)

    def cached_rows(self, rank: int) -> list[slice]:
        """Local rows whose keys `rank` keeps: all."""
        return [slice(0, self.size(rank))]

    def query_rows(self, rank: int) -> slice:
        """None: the query is sharded like everything else."""
        return slice(0, 0)

    @property
    def context(self) -> int:
        """Rows that forks share: all."""
        return self.length
