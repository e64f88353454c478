"""Text files as the documents of a question, by key."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ramet.errors import ConfigError


def read_documents(names: Sequence[str]) -> dict[str, str]:
    """The texts of files, by their paths as seen from the working directory, in the order given.

    A name is a file, a folder (all files below it whose names, and whose folders' names, begin with no dot) or a glob, in which `**` goes
    through folders. Raises `ConfigError` for a name of nothing, and for a file that is not text in UTF-8.
    """
    documents: dict[str, str] = {}
    for name in names:
        files = list(_files(name))
        if not files:
            raise ConfigError(f"--documents {name!r} names no file")
        for path in files:
            key = os.path.relpath(path)
            key = Path(path if key.startswith(os.pardir) else key).as_posix()
            if key not in documents:
                documents[key] = _text(path)
    return documents


def _files(name: str) -> Iterator[Path]:
    if Path(name).is_dir():
        for folder, folders, files in os.walk(name):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            yield from (Path(folder, each) for each in sorted(files) if not each.startswith("."))
    elif Path(name).exists():
        yield Path(name)
    else:
        yield from (Path(each) for each in sorted(glob.glob(name, recursive=True)) if Path(each).is_file())


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise ConfigError(f"--documents: cannot read {path}: {error.strerror}") from None
    if "\0" in text:
        raise ConfigError(f"--documents: {path} is not text in UTF-8; convert it first (a PDF: pdftotext), or name fewer files, by a glob")
    return text
