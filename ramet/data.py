"""Rows of a data set: from a local JSONL, JSON or Parquet file, or from a hub id, through a field map, into typed models.

A field map says where a row has what is asked for: `{"question": "problem", "answer": "meta.answer"}`. What it does not name
is looked up under its own name. A hub id may name a configuration and a split: `hotpotqa/hotpot_qa:distractor:validation`.

`parsed` reads a row as a pydantic model. Nothing is guessed and nothing is made into text that is none: what does not fit is one line
that names the file, the row, the column, and what to do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from ramet.errors import TaskError, first_line, require

Row = Mapping[str, Any]
Model = TypeVar("Model", bound=BaseModel)


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
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        return tuple(_read_json(path, kind))
    if kind == ".parquet":
        return tuple(_read_parquet(path))
    if path.exists() or source.count("/") != 1:
        raise TaskError(f"{source!r} is neither a .jsonl, .json or .parquet file nor a hub id such as owner/name:configuration:split")
    name, _, rest = source.partition(":")
    configuration, _, split = rest.partition(":")
    return tuple(_hub(name, configuration or None, split=split or "validation"))


def _read_json(path: Path, kind: str) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"cannot read {path}: {first_line(error)}; save it as UTF-8") from error
    except OSError as error:
        raise TaskError(f"cannot read {path}: {first_line(error)}") from error
    try:
        rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        rows = [_line(path, n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == ".json" and isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{path} is not a list of rows, each a JSON object")
    return rows


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}, line {number}: not valid JSON: {first_line(error)}") from error


def _read_parquet(path: Path) -> list[Row]:
    require("pyarrow", f"the Parquet file {path}")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    if not path.exists():
        raise TaskError(f"there is no file {path}")
    try:
        rows: list[Row] = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise TaskError(f"cannot read {path}: {first_line(error)}") from error
    if not rows:
        raise TaskError(f"{path} has no rows")
    return rows


def _hub(*args: Any, **kwargs: Any) -> Any:
    require("datasets", f"{args[0]}, a data set of the hub,")
    from datasets import load_dataset

    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # it raises many classes, for what is missing, offline or broken
        raise TaskError(f"cannot load {args[0]}: {first_line(error)}; a local file works offline") from error


def field(row: Row, name: str, fields: Mapping[str, str], where: str, default: Any = ...) -> Any:
    """The row's `name`, found where the field map says. Raises `TaskError` with what the row has, unless there is a default.

    What the field map names has to be there, default or not.
    """
    column = fields.get(name, name)
    at: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(at, Mapping) or key not in at:
            if default is not ... and name not in fields:
                return default
            raise TaskError(f"{where} has no field {column!r}; it has {', '.join(map(str, row))}; name the right one in env.fields")
        at = at[key]
    return at


def parsed(model: type[Model], row: Row, fields: Mapping[str, str], where: str) -> Model:
    """The row's columns of the names of `model`'s fields, found through the field map, as a `model`. Raises `TaskError`."""
    values = {}
    for name, asked in model.model_fields.items():
        value = field(row, name, fields, where, ... if asked.is_required() else _ABSENT)
        if value is not _ABSENT:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]
    name, below = str(said["loc"][0]), said["loc"][1:]
    column = fields.get(name, name)
    place = "".join(f", item {key + 1}" if isinstance(key, int) else f", {key}" for key in below)
    wrong = _WRONG.get(said["type"]) or said["msg"].removeprefix("Value error, ")
    raise TaskError(
        f"{where}, column {column!r}{place}: {wrong} (got {_shown(said['input'])}); "
        "mend the row or leave it out, or name the right column in env.fields"
    )


_ABSENT: Any = object()
_WRONG = {"list_type": "should be a list", "string_type": "should be text", "missing": "is missing", "model_type": "should be an object"}


def _shown(value: object) -> str:
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= 60 else f"{said[:57]}..."


def text(value: object, what: str, where: str) -> str:
    """`value` if it is text that says something. Raises `TaskError`."""
    try:
        return _said(value)
    except ValueError:
        raise TaskError(f"{where}: its {what} is {str(value)[:40]!r}, not text") from None


def texts(value: object, what: str, where: str) -> Sequence[str]:
    """`value` if it is a list of texts."""
    if not isinstance(value, (list, tuple)):
        raise TaskError(f"{where}: its {what} is {type(value).__name__}, not a list")
    return [text(item, what, where) for item in value]


def _said(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value == int(value) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("should be text")
    if not value.strip():
        raise ValueError("says nothing")
    return value.strip()


def _flag(value: object) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    said = str(value).strip().lower()
    if not isinstance(value, (bool, int, str)) or said not in known:
        raise ValueError("should be true or false")
    return known[said]


def _decoded(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("should be a list, and is text that is none") from None


def listed(*names: str) -> Callable[[object], object]:
    """For a list of things with these columns: makes whatever form it has in a file a list of mappings.

    A list of mappings, or of lists in the order of `names`; a mapping of lists, one for each name; any of these as JSON text. A text in the
    place of a thing has the first name only.
    """

    def mapping(number: int, item: object) -> object:
        if isinstance(item, str):
            return {names[0]: item}
        if isinstance(item, (list, tuple)):
            if len(item) != len(names):
                raise ValueError(f"item {number} should be a list of {' and '.join(names)}")
            return dict(zip(names, item, strict=True))
        return item

    def convert(value: object) -> object:
        value = _decoded(value)
        if isinstance(value, Mapping):
            columns = [column for name in names if isinstance(column := value.get(name), (list, tuple))]
            if len(columns) != len(names) or len(set(map(len, columns))) != 1:
                raise ValueError(f"should have {' and '.join(names)}, lists of the same length")
            value = list(zip(*columns, strict=True))
        if not isinstance(value, (list, tuple)):
            return value
        return [mapping(number, item) for number, item in enumerate(value, 1)]

    return convert


Said = Annotated[str, BeforeValidator(_said)]
"""Text that says something, without spaces around it; a number is written out."""
Flag = Annotated[bool, BeforeValidator(_flag)]
"""A truth value; 0, 1 and the words true and false are taken for what they say, and nothing else is."""
