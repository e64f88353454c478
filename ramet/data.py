"""Rows of a data set: from a local JSONL, JSON or Parquet file, or from a hub id, through a field map, into typed models.

A field map names the columns that hold the fields: `{"question": "problem", "answer": "meta.answer"}`. A field that it does not
mention is looked up under its own name. A hub id may name a configuration and a split: `hotpotqa/hotpot_qa:distractor:validation`.

`parsed` reads a row as a pydantic model. Nothing is guessed, and values that are not text are not turned into text: an error is one line
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
"""One row of a data set, by column."""
Model = TypeVar("Model", bound=BaseModel)


def load_rows(source: str) -> tuple[Row, ...]:
    """All rows of a file or hub data set, in order. A file that has not changed is read only once.

    Raises `TaskError`, naming the line, if they cannot be read.
    """
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
    """The rows of a JSONL file, or of a JSON file with a list of rows or one row."""
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
    """The value of the field `name`, in the column that the field map names.

    Raises `TaskError`, listing the row's columns, if there is no such column and no default; a column that the field map names must exist
    in any case.
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
    """The row as a `model`, whose fields are found through the field map. Raises `TaskError` for what does not fit."""
    values = {}
    for name, info in model.model_fields.items():
        value = field(row, name, fields, where, ... if info.is_required() else _ABSENT)
        if value is not _ABSENT:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    name, below = str(problem["loc"][0]), problem["loc"][1:]
    column = fields.get(name, name)
    place = "".join(f", item {key + 1}" if isinstance(key, int) else f", {key}" for key in below)
    message = _MESSAGES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    raise TaskError(
        f"{where}, column {column!r}{place}: {message} (got {_shortened(problem['input'])}); "
        "correct the row or leave it out, or name the right column in env.fields"
    )


_ABSENT: Any = object()
_MESSAGES = {"list_type": "should be a list", "string_type": "should be text", "missing": "is missing", "model_type": "should be an object"}


def _shortened(value: object) -> str:
    """A value as JSON of at most 60 characters, for an error message."""
    written = json.dumps(value, ensure_ascii=False, default=str)
    return written if len(written) <= 60 else f"{written[:57]}..."


def text(value: object, what: str, where: str) -> str:
    """`value` as stripped, non-empty text; a number is written out. Raises `TaskError`."""
    try:
        return _non_empty_text(value)
    except ValueError:
        raise TaskError(f"{where}: its {what} is {str(value)[:40]!r}, not text") from None


def texts(value: object, what: str, where: str) -> Sequence[str]:
    """`value` as a list of texts. Raises `TaskError` if it is not one."""
    if not isinstance(value, (list, tuple)):
        raise TaskError(f"{where}: its {what} is {type(value).__name__}, not a list")
    return [text(item, what, where) for item in value]


def _non_empty_text(value: object) -> str:
    """Stripped text; a number is written out. Raises `ValueError` for anything else, and for empty text."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value == int(value) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("should be text")
    if not value.strip():
        raise ValueError("is empty")
    return value.strip()


def _flag(value: object) -> bool:
    """The truth value that `value` spells. Raises `ValueError` for anything else."""
    spellings = {"true": True, "false": False, "1": True, "0": False}
    spelling = str(value).strip().lower()
    if not isinstance(value, (bool, int, str)) or spelling not in spellings:
        raise ValueError("should be true or false")
    return spellings[spelling]


def _decoded(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("should be a list, but is text that is not a JSON list") from None


def listed(*names: str) -> Callable[[object], object]:
    """A validator that turns any form of a list of records with the columns `names` into a list of mappings.

    The forms are a list of mappings; a list of lists in the order of `names`; a mapping of lists, one per name; and any of these as JSON
    text. A text in place of a record is its first column. The validator raises `ValueError` for lists of the wrong length.
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


NonEmptyText = Annotated[str, BeforeValidator(_non_empty_text)]
"""Stripped, non-empty text; a number is written out."""
Flag = Annotated[bool, BeforeValidator(_flag)]
"""A truth value; 0, 1 and the words true and false are accepted, and nothing else."""
