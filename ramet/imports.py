"""Objects that a settings file or a command names by import path, `package.module:name`."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ramet.errors import ConfigError, first_line, missing_extra

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def load_object(path: str, key: str) -> Any:
    """What `path` names. The working directory is searched too, after everything that is installed.

    Raises `ConfigError`, in one line that begins with `key`, for a path of another form, for what there is not, and for whatever the
    module raises while it is imported.
    """
    if not _PATH.fullmatch(path):
        raise ConfigError(f"{key}: {path!r} is not of the form package.module:name")
    module, _, name = path.partition(":")
    _search_here()
    try:
        value = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key}: there is no module {module!r}, installed or in this folder") from None
        raise ConfigError(f"{key}: {module} cannot be imported: {missing_extra(error) or first_line(error)}") from error
    except (Exception, SystemExit) as error:  # a module is anybody's code
        raise ConfigError(f"{key}: {module} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    for part in name.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(part, dir(value), 1)
            raise ConfigError(f"{key}: {module} has no {name}" + (f"; did you mean {close[0]}?" if close else ""))
        value = getattr(value, part)
    return value


def provenance(path: str) -> dict[str, str]:
    """What tells the code behind a path from a later version of it: the path, its distribution, and a hash of its source files.

    The hash covers all of the package that the path begins with, or its one file. Nothing is imported.
    """
    _search_here()
    top = path.partition(":")[0].partition(".")[0]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    names = _distributions().get(top, [])
    distributions = sorted({f"{name} {metadata.version(name)}" for name in names})
    return {"path": path, "distribution": ", ".join(distributions), "source": _source_hash(spec)}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _source_hash(spec: ModuleSpec | None) -> str:
    digest = hashlib.sha256()
    for root in () if spec is None else spec.submodule_search_locations or (spec.origin or "",):
        folder = Path(root)
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
            if file.is_file():
                digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _search_here() -> None:
    """As `python -m` does, but last: a file of this folder shadows nothing."""
    if "" not in sys.path:
        search(os.getcwd())


def search(folder: str) -> None:
    """Search this folder too, after everything else."""
    if folder not in sys.path:
        sys.path.append(folder)
