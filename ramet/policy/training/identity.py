"""What tells functions apart that bear the same name: a run whose reward has changed is another run.

Covered are a function's source, its defaults, and the constants, functions, dataclasses and pydantic models that it holds (in its closure,
as its object, as arguments of a partial) or uses of its own module. What it may change, as lists and dictionaries, and other objects
count by their type alone.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import os
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from pydantic import BaseModel

from ramet.agents.journal import fingerprint


def identity(function: Any) -> str:
    """A short hash, the same in every process."""
    return fingerprint(_said(function, frozenset()))


def _said(value: Any, above: frozenset[int]) -> Any:
    """JSON-able data that differ where what the value does may differ. `above`: values that this one is inside of."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, str | int | float | bytes):
        return repr(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if id(value) in above:
        return kind
    above |= {id(value)}
    parts: list[Any] = []
    if isinstance(value, FunctionType):
        parts = [value.__qualname__, _source(value), *_held(value)]
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, *sorted(value.keywords.items())]
    elif isinstance(value, tuple):
        parts = list(value)
    elif isinstance(value, BaseModel):
        return [kind, value.model_dump(mode="json")]
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif callable(value) and isinstance(type(value).__call__, FunctionType):
        parts = [type(value).__call__, *sorted((name, each) for name, each in vars(value).items() if isinstance(each, str | int | float))]
    return [kind, *(_said(part, above) for part in parts)]


def _held(function: FunctionType) -> list[Any]:
    """Defaults, what the closure holds, and what is used of the module, except for what is assigned to."""
    codes = list(_codes(function.__code__))
    changed = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "STORE_GLOBAL")}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = [(name, cell.cell_contents) for name, cell in cells if name not in changed]
    names = sorted({name for code in codes for name in code.co_names} & function.__globals__.keys() - changed)
    used = [(name, function.__globals__[name]) for name in names]
    own = [(n, v) for n, v in used if isinstance(v, str | int | float | tuple) or getattr(v, "__module__", None) == function.__module__]
    return [function.__defaults__, *sorted((function.__kwdefaults__ or {}).items()), *closed, *own]


def _source(function: FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed in: its code, which is of one release of Python
        return repr(
            [
                (code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, CodeType)])
                for code in _codes(function.__code__)
            ]
        )


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
