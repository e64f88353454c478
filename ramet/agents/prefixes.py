"""The prompt tokens that a tree needs to have computed, whatever a backend's cache happens to hold.

How much a backend really reuses depends on what ran before and alongside: which of several equal trees came first, or the order of the
methods. Penalties and comparisons therefore count as if the cache were perfect, and empty when a tree (or whatever else counts as one
outcome) begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from ramet.agents.sampling import Partial, PolicyWrapper, Sample, SampleRequest


@dataclass(slots=True)
class _Node:
    """A run of ids that `count` sequences pass through, and what follows it, by its first id."""

    edge: tuple[int, ...]
    count: int
    below: dict[int, _Node] = field(default_factory=dict)


class Prefixes:
    """A radix tree of id sequences. Adding one takes time linear in its length, however many there are."""

    def __init__(self) -> None:
        self._root = _Node((), 0)

    def add(self, ids: tuple[int, ...]) -> int:
        """Add a sequence. Returns the length of its longest common prefix with a sequence already there."""
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
        """Remove a sequence that was added before."""
        node, at = self._root, 0
        while at < len(ids):
            child = node.below[ids[at]]
            child.count -= 1
            if not child.count:
                del node.below[ids[at]]
                return
            node, at = child, at + len(child.edge)


def _shared(edge: tuple[int, ...], ids: tuple[int, ...], at: int) -> int:
    """The length of the common prefix of `edge` and `ids[at:]`."""
    low, high = 0, min(len(edge), len(ids) - at)
    if edge[:high] == ids[at : at + high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if edge[low:middle] == ids[at + low : at + middle] else (low, middle)
    return low


_READ: ContextVar[dict[FreshCache, Prefixes] | None] = ContextVar("contexts_read", default=None)


@contextmanager
def fresh_cache() -> Iterator[None]:
    """All that is sampled inside this block counts as one outcome. Nested blocks, such as a runtime's around each tree, have no effect."""
    if _READ.get() is not None:
        yield
        return
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


class FreshCache(PolicyWrapper):
    """A policy whose prompt tokens are counted as if its cache were perfect, and empty when a `fresh_cache` block begins.

    The contexts of one outcome, samples and clones alike, share their prefixes; those of different outcomes, and of different policies,
    share nothing.
    """

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn; `prefilled` and `cached` follow from the prompts sampled before in this outcome."""
        read = _READ.get()
        prefixes = Prefixes() if read is None else read.setdefault(self, Prefixes())
        cached = min(prefixes.add(request.prompt), len(request.prompt) - 1)
        inner = Partial(partial.ids, partial.logprobs)
        try:
            sample = await self._policy.sample(request, inner)
        finally:
            if inner.prefilled or inner.cached:
                partial.prefilled, partial.cached = len(request.prompt) - cached, cached
            else:
                prefixes.remove(request.prompt)  # a refused attempt has computed nothing
        prefixes.add(request.prompt + sample.ids)
        return replace(sample, prefilled=len(request.prompt) - cached, cached=cached)
