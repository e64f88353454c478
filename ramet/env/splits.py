"""Splits: the tasks to train on, to tune baselines on, and to measure.

Which part a task belongs to depends only on its content. Whatever is sampled with whatever seed, demonstrations for pretraining
included, no task is in two parts.

    train            what a policy learns from
    tune, tune_ood   what the settings of baselines are chosen on, distributed like `iid` and `ood`
    iid, ood         what is measured: lengths as in training, and longer ones
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ramet.errors import ConfigError

T = TypeVar("T")
PARTS = {"train": "train", "tune": "tune", "tune_ood": "tune", "iid": "measure", "ood": "measure"}
"""The part that the tasks of each split come from."""
TUNING = {"iid": "tune", "ood": "tune_ood"}
"""For each measured split, the split on which settings are tuned for it."""
PATIENCE = 20_000
"""Candidates in a row without a new one after which no more are expected."""


def part_of(content: str) -> str:
    """The part of a task by a hash of its content: "train" (four fifths), "tune" (a twentieth) or "measure"."""
    bucket = zlib.crc32(content.encode()) % 20
    return "train" if bucket % 5 else "tune" if bucket == 0 else "measure"


def part(split: str, offered: Iterable[str] = tuple(PARTS)) -> str:
    """The part that the tasks of a split come from. Raises `ConfigError` for a split that is not among `offered`."""
    if split not in PARTS or split not in offered:
        raise ConfigError(f"no split {split!r}; there are {', '.join(offered)}")
    return PARTS[split]


def select_split(split: str, candidates: Iterable[tuple[str, T]], patience: int = PATIENCE) -> Iterator[T]:
    """From an endless stream of (content, candidate), the candidates of a split; except for training, each content once.

    Raises `ConfigError` after `patience` candidates in a row without a new one.
    """
    split_part, seen, idle = part(split), set[str](), 0
    for content, candidate in candidates:
        idle += 1
        if part_of(content) == split_part and content not in seen:
            idle = 0
            if split_part != "train":
                seen.add(content)
            yield candidate
        elif idle > patience:
            raise ConfigError(
                f"there are only {len(seen)} different tasks for the split {split}; ask for fewer, or for longer or more varied tasks"
            )
