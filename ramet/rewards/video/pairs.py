"""Preference pairs, read from the rows of a file through a field map and validated.

A row has `id, video, question, chosen, rejected, category` and may have `source, start, end, margin, meta`; `rejected` may be a
list, for choosing among several. Other collections' forms and names of columns are in `formats`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ramet.agents.tree import Segment
from ramet.data import Row, load_rows
from ramet.errors import TaskError
from ramet.media.images import images_in_folder
from ramet.rewards.video.formats import KNOWN, WITHOUT, Columns, Preference, best_of, frames_of, media, preference, question, rated

VideoInput = Segment | tuple[Segment, ...] | None
"""The video input of a question: one video, several, or None for a question that is asked without its video."""


def segments_of(video: VideoInput) -> tuple[Segment, ...]:
    """The videos of an input, in order."""
    return video if isinstance(video, tuple) else () if video is None else (video,)


@dataclass(frozen=True)
class PreferencePair:
    """A question about a video with a chosen answer and one or more rejected ones. `margin` is by how much the chosen one is better."""

    id: str
    video: VideoInput
    question: str
    chosen: str
    rejected: tuple[str, ...]
    category: str = ""
    source: str = ""
    margin: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """Identifies the video, or the pair where there is none: outcomes within a cluster are not independent."""
        return "+".join(os.path.realpath(segment.file) for segment in segments_of(self.video)) or self.id


class PreferencePairs(list[PreferencePair]):
    """The pairs of a file; `ties` counts its rows that prefer no answer, which are left out."""

    def __init__(self, pairs: Sequence[PreferencePair], ties: int):
        super().__init__(pairs)
        self.ties = ties


def load_pairs(source: str, fields: Mapping[str, str] | None = None, videos: Path | None = None) -> PreferencePairs:
    """The pairs of a file. Videos are relative to `videos`, by default to the file's folder. Raises `TaskError`, naming the row.

    A row that names no video is an error, unless the field map says that `video` may be `none`. Different pairs of one id are numbered.
    Rows with one rated answer each are one pair where they ask the same about the same video, in one category: the best against the others.
    """
    names = dict(fields or {})
    if unknown := sorted(set(names) - KNOWN):
        raise TaskError(f"pairs have no field {unknown[0]!r}; their fields are {', '.join(sorted(KNOWN))}")
    root = videos or Path(source).parent
    rows = load_rows(source)
    questions = _by_question([_read(row, names, root, source, n) for n, row in enumerate(rows, 1)], source)
    by_question = [(_together(lines, source), len(lines)) for lines in questions]
    pairs = [pair for pair, _ in by_question if pair is not None]
    if not pairs:
        raise TaskError(f"{source} has no pair: all of its {len(rows)} rows are ties")
    by_id: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        others = by_id.setdefault(pair.id, [])
        if pair in others:
            raise TaskError(f"{source} has the pair {pair.id!r} more than once")
        others.append(pair)
    counts: Counter[str] = Counter()
    numbered = []
    for pair in pairs:
        counts[pair.id] += 1
        numbered.append(pair if counts[pair.id] == 1 else replace(pair, id=f"{pair.id}#{counts[pair.id]}"))
    return PreferencePairs(numbered, sum(lines for pair, lines in by_question if pair is None))


@dataclass(frozen=True)
class _Line:
    """The content of a row. With a rating, its pair has one answer, and the other answers are in other rows."""

    number: int
    pair: PreferencePair
    tied: bool = False
    rating: float | None = None
    named: bool = False  # its id is its own, and not its number


def _read(row: Row, fields: Mapping[str, str], root: Path, source: str, number: int) -> _Line:
    columns = Columns(row, fields, f"{source}, row {number}")
    rating = rated(columns)
    choice = preference(columns) if rating is None else best_of([rating])
    pair = _pair(columns, choice, video_of_row(row, fields, root, columns.where))
    return _Line(number, pair, choice.best is None, None if rating is None else rating[1], columns.column("id") is not None)


def _by_question(lines: Sequence[_Line], source: str) -> list[list[_Line]]:
    """Rated answers to one question together, every other row by itself. Raises `TaskError` for an id that stands for two questions."""
    together: dict[Any, list[_Line]] = {}
    named: dict[str, _Line] = {}
    for line in lines:
        pair = line.pair
        together.setdefault(line.number if line.rating is None else (pair.question, pair.video, pair.category), []).append(line)
        if line.rating is not None and line.named:
            first = named.setdefault(pair.id, line)
            if (first.pair.question, first.pair.video) != (pair.question, pair.video):
                raise TaskError(
                    f"{source}, row {line.number}: its id {pair.id[:40]!r} is that of row {first.number}, which asks something else or "
                    "about another video; name the column that tells questions apart with --field id=COLUMN"
                )
    return list(together.values())


def _together(lines: Sequence[_Line], source: str) -> PreferencePair | None:
    """The pair of rows about one question; None for a tie. An answer that stands there twice counts once."""
    first = lines[0]
    if first.rating is None:
        return None if first.tied else first.pair
    ratings: dict[str, _Line] = {}
    for line in lines:
        before = ratings.setdefault(line.pair.chosen, line)
        if before.rating != line.rating:
            raise TaskError(
                f"{source}, row {line.number}: it rates an answer {line.rating:g} that row {before.number} rates {before.rating:g}; give "
                "each answer one rating, such as the mean"
            )
    if len(ratings) < 2:
        raise TaskError(
            f"{source}, row {first.number} has one answer, and no other row has another one to its question about the same video; a "
            "preference takes two"
        )
    choice = best_of([(answer, line.rating) for answer, line in ratings.items() if line.rating is not None])
    if choice.best is None:
        return None
    pairs = [line.pair for line in lines]
    same = {name: len({str(getattr(pair, name)) for pair in pairs}) == 1 for name in ("source", "margin", "meta")}
    kept = {name: getattr(first.pair, name) if same[name] else empty for name, empty in (("source", ""), ("margin", None), ("meta", {}))}
    return replace(first.pair, chosen=choice.answers[choice.best], rejected=_others(choice), **kept)


def _others(choice: Preference) -> tuple[str, ...]:
    return tuple(answer for n, answer in enumerate(choice.answers) if n != choice.best)


def _pair(columns: Columns, choice: Preference, video: VideoInput) -> PreferencePair:
    """The pair of a preference; in a tie, any answer takes the place of the better one."""
    where = columns.where
    margin, meta = columns.get("margin", None), columns.get("meta", {})
    return PreferencePair(
        id=str(columns.get("id", where.rpartition(" ")[2])),
        video=video,
        question=question(columns),
        chosen=choice.answers[choice.best or 0],
        rejected=_others(choice),
        category=str(columns.get("category", "")),
        source=str(columns.get("source", "")),
        margin=None if margin is None else _number(margin, "margin", where),
        meta=meta if isinstance(meta, Mapping) else {"meta": meta},
    )


def video_of_row(row: Row, fields: Mapping[str, str], root: Path, where: str) -> VideoInput:
    """The parts of videos that a row names, whose paths must stay below `root`. None only where the field map allows it."""
    columns = Columns(row, fields, where)
    names = media(columns)
    try:
        files = [str(below(root, name)) for name in names]
        frames = frames_of(files)
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from error
    if not files:
        if fields.get("video") == WITHOUT:
            return None
        raise TaskError(
            f"{where} names no video; it has {', '.join(map(str, row))}. Name its column with --field video=COLUMN, or say that rows may "
            f"have none with --field video={WITHOUT}"
        )
    start, end = columns.get("start", None), columns.get("end", None)
    span = (_number(start or 0.0, "start", where), None if end is None else _number(end, "end", where))
    if frames is not None:
        return Segment(frames[0], float(frames[1]), float(frames[2]))
    if len(files) == 1:
        return Segment(files[0], *span)
    if start is not None or end is not None:
        raise TaskError(f"{where} has a start or an end, and {len(files)} videos")
    return tuple(map(Segment, files))


def _number(value: Any, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TaskError(f"{where}: its {what} is {str(value)[:40]!r}, not a number (of seconds, for a part of a video)")
    return float(value)


def below(root: Path, name: str, linked: Sequence[Path] | None = None) -> Path:
    """A path that a row or a request names, below `root`. Raises `TaskError` for one that leads out of it.

    Links below `root` are followed wherever they lead, as caches of data sets need it; with `linked`, only to below `root` and these
    folders, also those in a folder of pictures.
    """
    base = Path(os.path.abspath(root))
    path = base if "\0" in name else Path(os.path.abspath(base / name))
    if not path.is_relative_to(base) or "\0" in name:
        raise TaskError(f"the video {name[:80]!r} lies outside of the folder of videos")
    if linked is not None:
        allowed = [folder.resolve() for folder in (root, *linked)]
        for file in (path, *(images_in_folder(path) if path.is_dir() else ())):
            if not any(file.resolve().is_relative_to(folder) for folder in allowed):
                raise TaskError(f"the video {name[:80]!r} is a link that leads outside of the folder of videos")
    return path


def name_of(root: Path, file: str) -> str | None:
    """What `below` makes the path of a file of, as it is named, not as links resolve; None for one that is not below `root`."""
    named, parent = Path(os.path.abspath(file)), Path(file).parent.resolve()
    for path, base in ((named, Path(os.path.abspath(root))), (parent / named.name, root.resolve()), (named.resolve(), root.resolve())):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return None


def _relative(file: str, root: Path) -> str:
    return name_of(root, file) or os.path.relpath(Path(file).resolve(), root.resolve())


def row_of(pair: PreferencePair, root: Path) -> dict[str, Any]:
    """The row of a pair, as `load_pairs` reads it."""
    row: dict[str, Any] = {
        "id": pair.id, "video": None, "question": pair.question, "chosen": pair.chosen,
        "rejected": pair.rejected[0] if len(pair.rejected) == 1 else list(pair.rejected), "category": pair.category,
    }  # fmt: skip
    files = [_relative(segment.file, root) for segment in segments_of(pair.video)]
    if isinstance(pair.video, Segment):
        row["video"] = files[0]
        if pair.video.start or pair.video.end is not None:
            row |= {"start": pair.video.start, "end": pair.video.end}
    elif files:
        row["video"] = files
    optional = {"source": pair.source, "margin": pair.margin, "meta": dict(pair.meta)}
    return row | {name: value for name, value in optional.items() if value not in ("", None, {})}


class _HasVideo(Protocol):
    @property
    def video(self) -> VideoInput: ...


_Row = TypeVar("_Row", bound=_HasVideo)


def readable(rows: Sequence[_Row], read: Callable[[Segment], Any]) -> tuple[list[_Row], list[str]]:
    """The rows whose videos `read` can read, and the error message for each of the others. `read` raises `TaskError`."""
    why: dict[Segment, str] = {}
    kept, left_out = [], []
    for row in rows:
        for segment in segments_of(row.video):
            if segment not in why:
                try:
                    read(segment)
                    why[segment] = ""
                except TaskError as error:
                    why[segment] = str(error)
        fault = next((why[segment] for segment in segments_of(row.video) if why[segment]), "")
        if fault:
            left_out.append(fault)
        else:
            kept.append(row)
    return kept, left_out


def faults(pairs: Sequence[PreferencePair]) -> list[str]:
    """Defects of pairs as data, one line each: missing videos, and lengths that give the better answer away."""
    notes = [f"pair {p.id}: there is no video {s.file}" for p in pairs for s in segments_of(p.video) if not Path(s.file).exists()]
    if isinstance(pairs, PreferencePairs) and pairs.ties:
        notes.insert(0, f"{pairs.ties} rows prefer no answer and are left out")
    longer = [
        sum(len(p.chosen) > len(r) for r in p.rejected) / len(p.rejected) for p in pairs if any(len(p.chosen) != len(r) for r in p.rejected)
    ]
    if len(longer) >= 20 and abs(sum(longer) / len(longer) - 0.5) > 0.5 / len(longer) ** 0.5 * 2:
        share = sum(longer) / len(longer)
        notes.append(f"the better answer is the longer one in {share:.0%} of the pairs whose answers differ in length: length alone tells")
    return notes
