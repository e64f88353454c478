"""The environments that are installed, and the package that a new one begins as."""

from __future__ import annotations

import inspect
import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from ramet.env.outside import check_members, entries, origin, path_of
from ramet.env.registry import KINDS
from ramet.errors import ConfigError, RametError, StorageError
from ramet.imports import load_object
from ramet.version import __version__

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def installed() -> list[tuple[str, str, str]]:
    """(name, origin, description or problem) of every environment, ramet's own first."""
    rows = [(kind, f"ramet {__version__}", (inspect.getdoc(settings) or "").partition("\n")[0]) for kind, settings in KINDS.items()]
    for name, points in sorted(entries().items()):
        for point in points:
            rows.append((name, origin(point), f"hidden by ramet's own: give it as {point.value}" if name in KINDS else _about(name)))
    return rows


def _about(name: str) -> str:
    """What the module of an environment says of itself in its first line, or what is wrong with the environment."""
    try:
        path = path_of(name)
        target = load_object(path, f"the environment {name}")
        if isinstance(target, type):
            check_members(target, path, ("tasks", "grade"))
    except RametError as error:
        return str(error)
    return (sys.modules[path.partition(":")[0]].__doc__ or "").strip().partition("\n")[0]


def write_package(name: str, into: Path) -> tuple[Path, str]:
    """Write the package; returns its folder and its module. Raises `ConfigError` for a name that cannot be had, `StorageError`."""
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(module):
        raise ConfigError(f"{name!r} is not the name of a package: take lower-case letters, digits and -, such as my-sums")
    if name in KINDS or name in entries():
        raise ConfigError(f"there is an environment {name} already; choose another name")
    if find_spec(module) is not None:
        raise ConfigError(f"there is a module {module} already, which yours would hide or be hidden by; choose another name")
    folder = into / name
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another name or another --into")
    files = {
        "pyproject.toml": _PROJECT, "README.md": _README, f"{module}/__init__.py": _ENVIRONMENT, f"tests/test_{module}.py": _TEST,
    }  # fmt: skip
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text.replace("@NAME@", name).replace("@MODULE@", module), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder, module


_PROJECT = """\
[project]
name = "@NAME@"
version = "0.1.0"
description = "An environment for ramet"
requires-python = ">=3.11"
dependencies = ["ramet"]

[project.entry-points."ramet.environments"]
@NAME@ = "@MODULE@:environment"

[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
packages = ["@MODULE@"]
"""
_README = """\
# @NAME@

An environment for ramet.

    pip install -e .
    ramet env check @NAME@
    ramet eval --env @NAME@ --policy MODEL
"""
_ENVIRONMENT = '''\
"""Bills: the sum of some prices, each of which is in a document of its own."""

import ramet


def task(rng):
    """One task, drawn with a random.Random. Whether it is for training or for measuring depends only on its content."""
    prices = [rng.randint(1, 99) for _ in range(rng.randint(2, 12))]
    documents = {f"bill/{number}": f"The bill comes to {price} crowns." for number, price in enumerate(prices, 1)}
    question = "How many crowns do all bills come to together?"
    return ramet.Task.ask("-".join(map(str, prices)), question, documents, reference=str(sum(prices)))


def reward(task, tree):
    """What a finished tree is worth: a number, named numbers, or a ramet.Reward; `async def` where it has to wait."""
    return float(tree.answer is not None and tree.answer.strip() == task.reference)


environment = ramet.SimpleEnvironment(tasks=task, reward=reward, name="@NAME@")
'''
_TEST = '''\
"""What holds for the environment, without a model."""

import ramet


def test_the_environment_is_whole():
    ramet.check_environment("@MODULE@:environment")
'''
