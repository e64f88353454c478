"""The files of a run: UTF-8 whatever the locale, written whole or not at all, in folders that one process at a time works in.

What the operating system refuses raises `StorageError`.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ramet.errors import StorageError
from ramet.version import __version__

logger = logging.getLogger(__name__)

STDOUT = Path("-")
"""Stands for standard output as the destination of results."""
LOCK = ".lock"
"""The lock file of a run folder."""
CONFIG = "config.toml"
"""The settings file of a run folder."""
Record = dict[str, Any]
"""One flat record of results; `write_json` writes a list of them."""
_LOCKS: dict[Path, IO[str]] = {}
_MADE: list[Path] = []
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d+)|(stdin|stdout|stderr))|/proc/(?:self|\d+)/fd/(\d+)")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises `OSError` if it cannot be read."""
    return path.read_text(encoding="utf-8-sig")


def write_json(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a list of flat records as JSON, as `write_text` writes."""
    write_text(path, json.dumps(records, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link is followed, and `-` is standard output. Raises `StorageError`.

    Anything that is not a regular file (a device, a pipe, an open descriptor such as /dev/fd/3) is written to directly.
    """
    try:
        if path == STDOUT or _descriptor(path) == 1:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif (number := _descriptor(path)) is not None:
            with os.fdopen(os.dup(number), "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        elif _special(path):
            with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        else:
            target = path.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = _draft(target)
            draft.write_text(text, encoding="utf-8", errors="backslashreplace")
            draft.replace(target)
    except OSError as error:
        raise _refused(path, error) from error


def writable(path: Path) -> None:
    """Raise `StorageError` if `write_text` could not write there, so that this is known before the work and not after."""
    try:
        if path == STDOUT:
            return
        if (number := _descriptor(path)) is not None:
            os.fstat(number)
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif _special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            draft = _draft(path.resolve())
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.touch()
            draft.unlink()
    except OSError as error:
        raise _refused(path, error) from error


def to_stdout(path: Path) -> bool:
    """Whether `path` names standard output."""
    return path == STDOUT or _descriptor(path) == 1


def _draft(path: Path) -> Path:
    return path.with_name(path.name + ".draft")


def _special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _descriptor(path: Path) -> int | None:
    """The number of the open file descriptor that `path` names; None if it does not name one."""
    match = _DESCRIPTOR.fullmatch(os.path.abspath(path))
    if match is None:
        return None
    number, name, own = match.groups()
    return ("stdin", "stdout", "stderr").index(name) if name else int(number or own)


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}")


def lock(directory: Path) -> None:
    """Lock `directory` for this process until it ends, however it ends. Raises `StorageError` if another process holds it.

    If the file system has no locks, a note is printed instead.
    """
    directory = directory.resolve()
    if directory in _LOCKS:
        return
    path = directory / LOCK
    try:
        _make(directory)
        while True:
            file = path.open("w", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # another process has removed the folder in the meantime
    except BlockingIOError:
        raise StorageError(f"another process is working in {directory}; wait for it, or choose another --name") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _refused(path, error) from error
        note = f"the file system of {directory} has no locks: let no other process work in it"
        logger.warning(note)
    _LOCKS[directory] = file


def _make(directory: Path) -> None:
    """Create a directory and its parents, remembering those that are new."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    _MADE.extend(missing)


def give_up() -> None:
    """Remove the folders that this process created but did no work in: they hold only settings, a lock and empty journals."""
    for directory in _LOCKS:
        files = [path for path in directory.rglob("*") if not path.is_dir()]
        if directory in _MADE and all(map(_is_empty, files)):
            for path in files:
                path.unlink(missing_ok=True)
            for folder in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
                folder.rmdir()
    for folder in _MADE:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_empty(path: Path) -> bool:
    """Whether a file of a run folder records no work."""
    # TensorBoard files only repeat the metrics.
    if path.name in (LOCK, CONFIG, CONFIG + ".draft") or path.parent.name == "tensorboard" or path.stat().st_size == 0:
        return True
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        return b'"journal":' in file.readline() and not file.readline()


def machine() -> dict[str, Any]:
    """The hardware and software of a measurement, for `meta` records. The fields about torch are None if torch is not in use."""
    torch = sys.modules.get("torch")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": None if torch is None else torch.__version__,
        "system": platform.system(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def meta(command: str, seed: int, seconds: float | None = None) -> dict[str, Any]:
    """The record at the head of every machine-readable result. `seconds` is the wall-clock time of the work, if it was measured."""
    return {
        "record": "meta",
        "command": command,
        "version": __version__,
        "seed": seed,
        "machine": machine(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({} if seconds is None else {"seconds": seconds}),
    }
