"""Rows of a data set: from a local JSONL, JSON or Parquet file, or from a hub id, through a field map.

A field map says where a row has what is asked for: `{"question": "problem", "answer": "meta.answer"}`. What it does not name
is looked up under its own name. A hub id may name a configuration and a split: `hotpotqa/hotpot_qa:distractor:validation`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ramet.errors import TaskError, first_line

Row = Mapping[str, Any]


def load_rows(source: str) -> tuple[Row, ...]:
    """All rows of a file or hub data set, in order; read once for as long as a file stays as it is. Raises `TaskError`, naming the line."""
    try:
        state = Path(source).stat()
    except OSError:
        return _load(source, 0, 0)
    return _load(source, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _load(source: str, changed: int, size: int) -> tuple[Row, ...]:
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return tuple(_read_json(path))
    if path.suffix == ".parquet":
        return tuple(_hub("parquet", data_files=str(path), split="train") if path.exists() else _missing(path))
    if path.exists() or source.count("/") != 1:
        raise TaskError(f"{source!r} is neither a .jsonl, .json or .parquet file nor a hub id such as owner/name:configuration:split")
    name, _, rest = source.partition(":")
    configuration, _, split = rest.partition(":")
    return tuple(_hub(name, configuration or None, split=split or "validation"))


def _missing(path: Path) -> Any:
    raise TaskError(f"there is no file {path}")


def _read_json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {path}: {first_line(error)}") from error
    try:
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        rows = [_line(path, n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{path} is not a list of rows, each a JSON object")
    return rows


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}, line {number}: not valid JSON: {first_line(error)}") from error


def _hub(*args: Any, **kwargs: Any) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError("this source needs the datasets library: pip install 'ramet[data]'") from None
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # it raises many classes, for what is missing, offline or broken
        raise TaskError(f"cannot load {args[0]}: {first_line(error)}; a local file works offline") from error


def field(row: Row, name: str, fields: Mapping[str, str], where: str, default: Any = ...) -> Any:
    """The row's `name`, found where the field map says. Raises `TaskError` with what the row has, unless there is a default."""
    at: Any = row
    for key in fields.get(name, name).split("."):
        if not isinstance(at, Mapping) or key not in at:
            if default is not ...:
                return default
            raise TaskError(f"{where} has no field {fields.get(name, name)!r}; it has {', '.join(map(str, row))}; name it in env.fields")
        at = at[key]
    return at


def text(value: object, what: str, where: str) -> str:
    """`value` if it is text that says something. Raises `TaskError`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(int(value)) if value == int(value) else repr(value)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: its {what} is {str(value)[:40]!r}, not text")
    return value.strip()


def texts(value: object, what: str, where: str) -> Sequence[str]:
    """`value` if it is a list of texts."""
    if not isinstance(value, (list, tuple)):
        raise TaskError(f"{where}: its {what} is {type(value).__name__}, not a list")
    return [text(item, what, where) for item in value]
