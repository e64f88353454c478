"""Preference pairs: rows of a file, through a field map, checked.

A row has `id, video, question, chosen, rejected, category` and may have `source, start, end, margin, meta`; `rejected` may be a
list, for choosing among several. What other collections call these is said by a field map, as for data sets of questions.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramet.agents.tree import Segment
from ramet.data import Row, load_rows, text, texts
from ramet.data import field as field_of
from ramet.errors import TaskError


@dataclass(frozen=True)
class Pair:
    """A question about a video, the better answer, and one or more that are worse."""

    id: str
    video: Segment | None
    question: str
    chosen: str
    rejected: tuple[str, ...]
    category: str = ""
    source: str = ""
    margin: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """What pairs that are not independent have in common: their video."""
        return self.id if self.video is None else self.video.file


def load_pairs(source: str, fields: Mapping[str, str] | None = None, videos: Path | None = None) -> list[Pair]:
    """The pairs of a file. Videos are relative to `videos`, by default to the file's folder. Raises `TaskError`, naming the row."""
    names = dict(fields or {})
    root = videos or Path(source).parent
    pairs = [_pair(row, names, root, f"{source}, row {n}") for n, row in enumerate(load_rows(source), 1)]
    counts = Counter(pair.id for pair in pairs)
    if counts and counts.most_common(1)[0][1] > 1:
        raise TaskError(f"{source} has the id {counts.most_common(1)[0][0]!r} {counts.most_common(1)[0][1]} times; ids must differ")
    return pairs


def _pair(row: Row, fields: Mapping[str, str], root: Path, where: str) -> Pair:
    ranked = field_of(row, "rankings", fields, where, None)
    if ranked is not None:
        chosen, rejected = _ranked(field_of(row, "responses", fields, where), ranked, where)
    else:
        chosen = text(field_of(row, "chosen", fields, where), "chosen answer", where)
        given = field_of(row, "rejected", fields, where)
        rejected = tuple(texts(given if isinstance(given, list) else [given], "rejected answers", where))
    if not rejected or chosen in rejected:
        raise TaskError(f"{where}: the chosen answer is not told from the rejected ones")
    margin = field_of(row, "margin", fields, where, None)
    meta = field_of(row, "meta", fields, where, {})
    return Pair(
        id=str(field_of(row, "id", fields, where, where.rpartition(" ")[2])),
        video=segment(row, fields, root, where),
        question=text(field_of(row, "question", fields, where), "question", where),
        chosen=chosen,
        rejected=rejected,
        category=str(field_of(row, "category", fields, where, "")),
        source=str(field_of(row, "source", fields, where, "")),
        margin=None if margin is None else _number(margin, "margin", where),
        meta=meta if isinstance(meta, Mapping) else {"meta": meta},
    )


def _ranked(responses: Any, rankings: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """The best of several answers, and the others; ranks count from the best on."""
    said = texts(responses, "responses", where)
    ranks = rankings if isinstance(rankings, list) and all(type(r) is int for r in rankings) else []
    if len(ranks) != len(said) or ranks.count(min(ranks, default=0)) != 1:
        raise TaskError(f"{where}: its rankings do not name one best answer of {len(said)}")
    best = ranks.index(min(ranks))
    return said[best], tuple(s for n, s in enumerate(said) if n != best)


def segment(row: Row, fields: Mapping[str, str], root: Path, where: str) -> Segment | None:
    """The part of a video that a row names. Its path must stay below `root`."""
    name = field_of(row, "video", fields, where, None)
    if name is None:
        return None
    path = below(root, text(name, "video", where))
    start, end = field_of(row, "start", fields, where, 0.0), field_of(row, "end", fields, where, None)
    return Segment(str(path), _number(start or 0.0, "start", where), None if end is None else _number(end, "end", where))


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TaskError(f"{where}: its {what} is {str(value)[:40]!r}, not a number (of seconds, for a part of a video)")
    return float(value)


def below(root: Path, name: str) -> Path:
    """A path that a row or a request names, below `root`. Raises `TaskError` for one that leads out of it."""
    path = root if "\0" in name else (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or "\0" in name:
        raise TaskError(f"the video {name[:80]!r} lies outside of the folder of videos")
    return path


def row_of(pair: Pair, root: Path) -> dict[str, Any]:
    """A pair as a row that `load_pairs` reads."""
    row: dict[str, Any] = {
        "id": pair.id, "video": None, "question": pair.question, "chosen": pair.chosen,
        "rejected": pair.rejected[0] if len(pair.rejected) == 1 else list(pair.rejected), "category": pair.category,
    }  # fmt: skip
    if pair.video is not None:
        row["video"] = os.path.relpath(Path(pair.video.file).resolve(), root.resolve())
        if pair.video.start or pair.video.end is not None:
            row |= {"start": pair.video.start, "end": pair.video.end}
    optional = {"source": pair.source, "margin": pair.margin, "meta": dict(pair.meta)}
    return row | {name: value for name, value in optional.items() if value not in ("", None, {})}


def faults(pairs: Sequence[Pair]) -> list[str]:
    """What is wrong with pairs as data, a line each: videos that are not there, and a length that gives the better answer away."""
    found = [f"pair {p.id}: there is no video {p.video.file}" for p in pairs if p.video and not Path(p.video.file).exists()]
    longer = [
        sum(len(p.chosen) > len(r) for r in p.rejected) / len(p.rejected) for p in pairs if any(len(p.chosen) != len(r) for r in p.rejected)
    ]
    if len(longer) >= 20 and abs(sum(longer) / len(longer) - 0.5) > 0.5 / len(longer) ** 0.5 * 2:
        share = sum(longer) / len(longer)
        found.append(f"the better answer is the longer one in {share:.0%} of the pairs whose answers differ in length: length alone tells")
    return found
