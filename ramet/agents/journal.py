"""An append-only record of finished work, from which a run resumes.

Each line is one record: its CRC-32 in hexadecimal, a space, compact JSON. The first line identifies the run by a fingerprint of its
configuration. A crash can damage only the last line, which is then dropped and its work done again. Damage anywhere else, or the
journal of another configuration, is an error that says what to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ramet.errors import CheckpointError, StorageError

FORMAT = 1


def fingerprint(*parts: Any) -> str:
    """A hash of 16 hexadecimal digits of parts that can be written as JSON, for telling configurations apart."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """An open journal, locked for this process. `records` starts with those already in the file.

    `identity` is the `fingerprint` of the configuration that the journal belongs to. Raises `StorageError` if the file cannot be opened
    or another process is writing it, and `CheckpointError` if it is damaged or belongs to another configuration.
    """

    def __init__(self, path: Path, identity: str):
        self.path = path
        self.identity = identity
        self.records: list[dict[str, Any]] = []
        header = {"journal": FORMAT, "job": identity}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            _lock(self._file, path)
            try:
                intact = self._read(header)
                self._file.truncate(intact)
                if intact == 0:
                    self._write(header)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise StorageError(f"cannot open journal {path}: {error.strerror or error}") from error

    def _read(self, header: dict[str, Any]) -> int:
        """Read the records in the file. Returns the number of bytes that hold whole records."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        end = 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            record = _decode(line)
            if record is None:
                if end + len(line) == len(data):
                    return end
                raise CheckpointError(f"journal {self.path} is damaged at line {number}; move it away to start over")
            if number == 1:
                if record != header:
                    raise CheckpointError(
                        f"journal {self.path} belongs to another configuration or version; choose another name or move it away"
                    )
            else:
                self.records.append(record)
            end += len(line)
        return end

    def append(self, record: dict[str, Any], keep: bool = True) -> None:
        """Add one record, and to `records` too if `keep`. When this returns, the operating system has it.

        Raises `StorageError` if it cannot be written.
        """
        try:
            self._write(record)
        except OSError as error:
            raise StorageError(
                f"cannot write journal {self.path}: {error.strerror or error}; free space and run again to resume"
            ) from error
        if keep:
            self.records.append(record)

    def _write(self, record: dict[str, Any]) -> None:
        """Write one line whole, or leave the file as it was and raise `OSError`."""
        body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        line = b"%08x %b\n" % (zlib.crc32(body), body)
        start = self._file.tell()
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            # The part of the line that a full disk still took must not precede the next line.
            os.ftruncate(self._file.fileno(), start)
            raise

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _lock(file: IO[bytes], path: Path) -> None:
    """Lock the file until it is closed. On file systems without locks this does nothing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StorageError(f"another process is writing {path}; wait for it, or choose another name") from None
    except OSError:
        pass


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole records of a journal without its header, whatever configuration it belongs to."""
    return [record for record in map(_decode, path.read_bytes().splitlines(keepends=True)[1:]) if record is not None]


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None if the line is damaged."""
    if not line.endswith(b"\n") or len(line) < 11 or line[8:9] != b" ":
        return None
    body = line[9:-1]
    try:
        if int(line[:8], 16) != zlib.crc32(body):
            return None
        record = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
