"""Rules that hold for every line of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import ramet

ROOT = Path(ramet.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def said(call: ast.Call, name: str) -> object:
    """The constant that a keyword is given, or whether it is given at all."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else True
    return None


def binary(call: ast.Call, place: int) -> bool:
    mode = call.args[place] if len(call.args) > place else next((k.value for k in call.keywords if k.arg == "mode"), None)
    return isinstance(mode, ast.Constant) and "b" in str(mode.value)


def by_locale(call: ast.Call) -> bool:
    """Does a call read or write text in whatever encoding the locale has?"""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    owner = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
    if owner in ("os", "av", "Image", "archive", "tarfile", "zipfile") or said(call, "encoding") is not None:
        return False
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)
    if name == "open":
        return not binary(call, 1 if isinstance(call.func, ast.Name) else 0)
    if name in ("NamedTemporaryFile", "TemporaryFile"):
        return said(call, "mode") is not None and not binary(call, 0)
    return name in ("run", "Popen", "check_output") and (said(call, "text") is True or said(call, "universal_newlines") is True)


def test_text_is_read_and_written_in_an_encoding_that_is_named():
    found = [f"{path.relative_to(ROOT)}:{call.lineno}" for path in FILES for call in calls(path) if by_locale(call)]
    assert not found, found


def test_everything_is_printed_on_the_consoles_to_which_a_name_is_text():
    markup = re.compile(r"\bConsole\(|from_markup|rich\.markup|rich\.table import|rich\.progress import track|\[/\]|\bmarkup=True")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        if path.name != "terminal.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if markup.search(line) and "Column" not in line
    ]
    assert not found, found
