"""Splits: which tasks are there to train on, to tune baselines on, and to be measured.

A task belongs to a part by its content alone, so whatever is drawn with whatever seed, demonstrations for pretraining included,
no task is in two parts.

    train            what a policy learns from
    tune, tune_ood   what the settings of baselines are chosen on, alike to `iid` and `ood`
    iid, ood         what is measured: lengths as trained, and beyond them
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

from ramet.errors import ConfigError

T = TypeVar("T", bound=Hashable)
PARTS = {"train": "train", "tune": "tune", "tune_ood": "tune", "iid": "measure", "ood": "measure"}
"""The part that each split is drawn from."""
TUNING = {"iid": "tune", "ood": "tune_ood"}
"""On which split the settings are tuned of what is measured on a split."""
PATIENCE = 20_000
"""Candidates in a row that give nothing new, after which there is nothing left to draw."""


def part_of(content: str) -> str:
    """Whether a task of this content is to "train" on (four fifths are), to "tune" on (a twentieth), or to "measure"."""
    place = zlib.crc32(content.encode()) % 20
    return "train" if place % 5 else "tune" if place == 0 else "measure"


def part(split: str, offered: Iterable[str] = tuple(PARTS)) -> str:
    """The part of a split. Raises `ConfigError` for one that is not among `offered`."""
    if split not in PARTS or split not in offered:
        raise ConfigError(f"no split {split!r}; there are {', '.join(offered)}")
    return PARTS[split]


def drawn(split: str, candidates: Iterable[tuple[str, T]], patience: int = PATIENCE) -> Iterator[T]:
    """Of an endless stream of (content, candidate), those of the split's part; each content once, unless it is trained on.

    Raises `ConfigError` once nothing new came among `patience` of them.
    """
    wanted, seen, idle = part(split), set[str](), 0
    for content, candidate in candidates:
        idle += 1
        if part_of(content) == wanted and content not in seen:
            idle = 0
            if wanted != "train":
                seen.add(content)
            yield candidate
        elif idle > patience:
            raise ConfigError(
                f"there are only {len(seen)} different tasks for the split {split}; ask for fewer, or for longer or more varied ones"
            )
