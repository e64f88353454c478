"""Prompt tokens that a tree needs to have computed, whatever a backend's cache happens to hold.

What a backend really reuses depends on what ran before and beside: on which of several equal trees came first, on the order of methods.
Prices and comparisons count as with a cache that is perfect, and empty when a tree (or what else counts as one outcome) begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from ramet.agents.sampling import Partial, PolicyWrapper, Sample, SampleRequest


@dataclass(slots=True)
class _Node:
    """A stretch of ids that `count` sequences go through, and what follows it by the first id."""

    edge: tuple[int, ...]
    count: int
    below: dict[int, _Node] = field(default_factory=dict)


class Prefixes:
    """Sequences of ids, as a tree by what they begin with: adding one costs its length, however many there are."""

    def __init__(self) -> None:
        self._root = _Node((), 0)

    def add(self, ids: tuple[int, ...]) -> int:
        """Add a sequence; returns how many ids it has in common with the beginning of one that was there."""
        node, at = self._root, 0
        while at < len(ids) and (child := node.below.get(ids[at])) is not None:
            shared = _shared(child.edge, ids, at)
            if shared < len(child.edge):
                upper = _Node(child.edge[:shared], child.count, {child.edge[shared]: child})
                child.edge = child.edge[shared:]
                child = node.below[ids[at]] = upper
            child.count += 1
            node, at = child, at + shared
        if at < len(ids):
            node.below[ids[at]] = _Node(ids[at:], 1)
        return at

    def remove(self, ids: tuple[int, ...]) -> None:
        """Remove a sequence that was added."""
        node, at = self._root, 0
        while at < len(ids):
            child = node.below[ids[at]]
            child.count -= 1
            if not child.count:
                del node.below[ids[at]]
                return
            node, at = child, at + len(child.edge)


def _shared(edge: tuple[int, ...], ids: tuple[int, ...], at: int) -> int:
    """How many ids `edge` and `ids` from `at` on have in common."""
    low, high = 0, min(len(edge), len(ids) - at)
    if edge[:high] == ids[at : at + high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if edge[low:middle] == ids[at + low : at + middle] else (low, middle)
    return low


_READ: ContextVar[Prefixes | None] = ContextVar("contexts_read", default=None)


@contextmanager
def fresh_cache() -> Iterator[None]:
    """What is sampled within counts as one outcome. Within another one, that goes on: a runtime begins one for each tree."""
    if _READ.get() is not None:
        yield
        return
    token = _READ.set(Prefixes())
    try:
        yield
    finally:
        _READ.reset(token)


class FreshCache(PolicyWrapper):
    """`policy` with prompt tokens counted as by a cache that is perfect, and empty when a `fresh_cache` begins.

    The contexts of one outcome, its samples and its clones share what they begin with; those of different outcomes share nothing.
    """

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        read = _READ.get() or Prefixes()
        cached = min(read.add(request.prompt), len(request.prompt) - 1)
        inner = Partial(partial.ids, partial.logprobs)
        try:
            sample = await self._policy.sample(request, inner)
        finally:
            if inner.prefilled or inner.cached:
                partial.prefilled, partial.cached = len(request.prompt) - cached, cached
            else:
                read.remove(request.prompt)  # an attempt that was refused has read nothing
        read.add(request.prompt + sample.ids)
        return replace(sample, prefilled=len(request.prompt) - cached, cached=cached)
