"""What a sequence of token ids shares with the ones before it, at the cost of its own length however many there were."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A stretch of ids that `count` sequences go through, and what follows it by the first id."""

    edge: tuple[int, ...]
    count: int
    below: dict[int, _Node] = field(default_factory=dict)


class Prefixes:
    """Sequences of ids, as a tree by what they begin with."""

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
