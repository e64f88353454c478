"""A hash of what a function computes: a run whose reward function has changed must not be resumed, though its name is the same.

The hash covers a function's source, its defaults, and the constants, functions, dataclasses and pydantic models that it refers to: in its
closure, as the object of a method, as arguments of a partial, or as globals of its own module. Mutable values, such as lists and
dictionaries, and all other objects count by their type alone.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import os
from collections.abc import Iterator
from dataclasses import replace
from types import CodeType, FunctionType, MethodType
from typing import Any

from pydantic import BaseModel

from ramet.agents.equipment import Equipment
from ramet.agents.journal import fingerprint


def identity(function: Any) -> str:
    """A short hash of a function, a callable object or a value, the same in every process."""
    return fingerprint(_describe(function, frozenset()))


def equipment_identity(equipment: Equipment) -> str:
    """A short hash of tools, their sources and where they are held, of roles (of a policy only its kind), and of the program."""
    tools = [*equipment.tools, *(tool for role in equipment.roles.values() for tool in role.tools or ())]
    roles = [(name, replace(role, tools=None)) for name, role in sorted(equipment.roles.items())]
    return identity((equipment.tools_at, *tools, *equipment.sources, *roles, equipment.program))


def _describe(value: Any, enclosing: frozenset[int]) -> Any:
    """JSON data that differ if the behaviour of `value` may. `enclosing`: the ids of the values that contain this one."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, str | int | float | bytes):
        return repr(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if id(value) in enclosing:
        return kind
    enclosing |= {id(value)}
    parts: list[Any] = []
    if isinstance(value, FunctionType):
        parts = [value.__qualname__, _source(value), *_references(value)]
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
    return [kind, *(_describe(part, enclosing) for part in parts)]


def _references(function: FunctionType) -> list[Any]:
    """Defaults, values in the closure, and globals of the function's own module, except names that it assigns to."""
    codes = list(_codes(function.__code__))
    assigned = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "STORE_GLOBAL")}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = [(name, cell.cell_contents) for name, cell in cells if name not in assigned]
    names = sorted({name for code in codes for name in code.co_names} & function.__globals__.keys() - assigned)
    used = [(name, function.__globals__[name]) for name in names]
    own = [(n, v) for n, v in used if isinstance(v, str | int | float | tuple) or getattr(v, "__module__", None) == function.__module__]
    return [function.__defaults__, *sorted((function.__kwdefaults__ or {}).items()), *closed, *own]


def _source(function: FunctionType) -> str:
    """The source text, or the byte code where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt: its byte code, which differs between releases of Python
        return repr(
            [
                (code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, CodeType)])
                for code in _codes(function.__code__)
            ]
        )


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code object and those of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
