"""The transcripts of a run: every tree that it grew, its texts, what it was worth, and what went wrong, in one compressed file.

`trees.jsonl.gz` consists of gzip members, each written whole, so `zcat` and every reader of gzip take it. The first line says which
version it is of. After it, a member holds the transcripts that belong together (of one update, or of one outcome), a JSON object a line.
A crash cuts only the last member, which is then dropped; damage anywhere else is an error.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

from ramet.agents.tree import BranchText, Tree, plain, written
from ramet.errors import CheckpointError, StorageError, first_line
from ramet.version import __version__

logger = logging.getLogger(__name__)

TREES = "trees.jsonl.gz"
"""The transcripts of a run folder."""
VERSION = 1
LIMIT = 2**30
"""Bytes of a file of transcripts, unless a run says otherwise."""
_PLACE = b'{"place":'
_BEGINNING = b"\x1f\x8b\x08"
_CHUNK = 2**20
TreePlace = Mapping[str, Any]
"""Where in a run a tree was grown: in training, `update, group, number`; in measuring, `policy, split, budget, repeat, number`."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """One tree, and what a run knew about it.

    texts      of each of `tree.branches`, as the chat format of the run shows it
    task       the id of the task that was to be solved; methods may give their trees others
    reference  what it was graded by
    reward     its reward by parts, or the score of the outcome that it belongs to
    error      why the run could not use the tree; "" if it could
    """

    place: TreePlace
    task: str
    tree: Tree
    texts: tuple[BranchText, ...]
    reference: Any = None
    reward: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def failed(self) -> str:
        """Why it gave no answer, or none that could be used; "" if it did."""
        return self.error or self.tree.failed or ("" if self.tree.answer is not None else self.tree.root.ending)

    @property
    def worth(self) -> float | None:
        """What it was learned from, or the score of its outcome; None if it was not graded."""
        value = self.reward.get("reward", self.reward.get("score"))
        return float(value) if isinstance(value, (int, float)) else None

    def text(self) -> str:
        """The whole tree for people to read."""
        return written(self.tree, self.texts)

    def record(self) -> dict[str, Any]:
        """As JSON takes it. A reference that JSON does not know becomes text."""
        texts = [{"prompt": text.prompt, "turns": text.turns} for text in self.texts]
        return {
            "place": self.place, "task": self.task, "reference": plain(self.reference), "reward": plain(self.reward), "error": self.error,
            "texts": texts, **self.tree.record(),
        }  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Transcript:
        """From its `record`. Raises `CheckpointError` for anything else."""
        try:
            texts = tuple(BranchText(text["prompt"], tuple((s, a) for s, a in text["turns"])) for text in record["texts"])
            tree = Tree.of({name: record[name] for name in ("version", "tree", "clones")})
            if [len(text.turns) for text in texts] != [len(branch.turns) for branch in tree.branches]:
                raise ValueError("texts that are not those of its branches")
            kept = cls(dict(record["place"]), record["task"], tree, texts, record["reference"], dict(record["reward"]), record["error"])
            if not (isinstance(kept.task, str) and isinstance(kept.error, str)):
                raise TypeError("a task or an error that is not text")
            return kept
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a transcript that this ramet can read: {type(error).__name__}: {error}") from error


class Transcripts:
    """The transcripts of a run, to add to. The file comes into being with the first of them.

    limit  bytes that the file may take. What would go beyond is not kept; it says so, once, in the log and at its end
    """

    def __init__(self, path: Path, limit: int = LIMIT):
        self.path, self._limit = path, limit
        self._full = limit == 0
        self._whole = False

    @property
    def keeps(self) -> bool:
        """Is what is added kept? Not once the limit was reached, nor where it is 0."""
        return not self._full

    def forget(self, unless: Callable[[TreePlace], bool]) -> None:
        """Drop the transcripts whose place is not wanted, because their work will be done again, and what a crash has cut.

        Raises `StorageError`, and `CheckpointError` for a file that is damaged or is something else.
        """
        self._whole = True
        if not self.path.exists():
            return
        draft = self.path.with_name(self.path.name + ".draft")
        try:
            try:
                with self.path.open("rb") as file, draft.open("wb") as kept:
                    for start, end, data in _members(self.path):
                        places = [_place(line) for line in data.splitlines()]
                        if start == 0 or all(place is not None and unless(place) for place in places):
                            file.seek(start)
                            kept.write(file.read(end - start))
                if draft.stat().st_size < self.path.stat().st_size:
                    draft.replace(self.path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise _refused(self.path, error) from error

    def append(self, transcripts: Sequence[Transcript]) -> None:
        """Add transcripts that belong together: all of them or, beyond the limit, none. When this returns, the system has them.

        Raises `StorageError` if they cannot be written.
        """
        if self._full or not transcripts:
            return
        if not self._whole:
            self.forget(lambda place: True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                start = file.tell()
                header = b"" if start else _member([{"transcripts": VERSION, "ramet": __version__}])
                data = _member([transcript.record() for transcript in transcripts])
                self._full = start + len(header) + len(data) > self._limit
                if self._full:
                    logger.warning(f"{self.path} has reached its limit of {self._limit:,} bytes: no more trees are kept")
                    data = _member([{"full": self._limit}])
                try:
                    _put(file, header + data)
                except OSError:
                    # A part of it that a full disk still took must not precede what comes next.
                    os.ftruncate(file.fileno(), start)
                    raise
        except OSError as error:
            raise _refused(self.path, error) from error


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; free space and run again to resume")


def _member(records: Sequence[Mapping[str, Any]]) -> bytes:
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    return gzip.compress(lines.encode(), compresslevel=4, mtime=0)


def _put(file: RawIOBase, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += file.write(data[written:]) or 0


def read_transcripts(path: Path) -> Iterator[Transcript]:
    """The transcripts of a file, in the order in which they were written; what a crash has cut at its end is left out.

    Raises `CheckpointError`, in one line, for a file that is missing, damaged, of another version, or something else.
    """
    for _, _, data in _members(path):
        for line in data.splitlines():
            if line.startswith(_PLACE):
                try:
                    transcript = Transcript.of(json.loads(line))
                except (CheckpointError, ValueError, RecursionError) as error:
                    raise CheckpointError(f"{path} has a line that this ramet cannot read: {first_line(error)}") from error
                yield transcript


def full(path: Path) -> bool:
    """Did the file reach its limit, so that later trees are missing?"""
    return any(data.startswith(b'{"full":') for _, _, data in _members(path))


def _place(line: bytes) -> TreePlace | None:
    """The place that a line begins with; what follows, which may be long, is not parsed."""
    if not line.startswith(_PLACE):
        return None
    try:
        place = json.JSONDecoder().raw_decode(line[len(_PLACE) :].decode())[0]
    except (ValueError, RecursionError):
        return None
    return place if isinstance(place, dict) else None


def _members(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, byte after the last, contents) of every member that is whole. Raises `CheckpointError`."""
    try:
        for start, end, data in _inflated(path):
            if start == 0:
                _check(path, data)
            yield start, end, data
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _check(path: Path, data: bytes) -> None:
    """Is this the beginning of a file of transcripts that this version reads? Raises `CheckpointError`."""
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        header = None
    version = header.get("transcripts") if isinstance(header, dict) else None
    if version is None:
        raise CheckpointError(f"{path} is not a file of transcripts; a run that is to go on there needs it moved away")
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version} of transcripts, of ramet {header.get('ramet')}, and this ramet reads version {VERSION}: "
            "use the other ramet, or move it away"
        )


def _inflated(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, byte after the last, contents) of every member that is whole."""
    with path.open("rb") as file:
        start, data = 0, file.read(_CHUNK)
        while data:
            inflate, parts, read = zlib.decompressobj(31), list[bytes](), 0
            with contextlib.suppress(zlib.error):
                while data and not inflate.eof:
                    read += len(data)
                    parts.append(inflate.decompress(data))
                    data = inflate.unused_data if inflate.eof else file.read(_CHUNK)
            if not inflate.eof:
                _check_cut(path, start)
                return
            end = start + read - len(inflate.unused_data)
            yield start, end, b"".join(parts)
            start, data = end, data or file.read(_CHUNK)


def _check_cut(path: Path, start: int) -> None:
    """Raise `CheckpointError` unless what begins at `start` is what a crash leaves: the beginning of a member, and none after it."""
    rest = path.read_bytes()[start:]
    at = rest.find(_BEGINNING, 1)
    if start == 0 and not _BEGINNING.startswith(rest[:3]):
        raise CheckpointError(f"{path} is not a file of transcripts; a run that is to go on there needs it moved away")
    while at >= 0:
        inflate = zlib.decompressobj(31)
        with contextlib.suppress(zlib.error):
            inflate.decompress(rest[at:])
        if inflate.eof:
            raise CheckpointError(f"{path} is damaged at byte {start}: move it away, and run again to go on without what it held")
        at = rest.find(_BEGINNING, at + 1)
