"""Rules that hold for every line of the package."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
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


def test_nothing_but_a_command_prints_and_no_module_has_a_console():
    """Messages are logged; the exceptions are what is itself a program."""
    programs = {"recipes/minimal.py", "benchmarks/speed/fanout.py"}
    printing = {str(path.relative_to(ROOT)) for path in FILES for call in calls(path) if ast.unparse(call.func) == "print"}
    assert printing <= programs, printing - programs
    told = {
        f"{path.relative_to(ROOT)}: {node.module} {alias.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and module_of(path).partition(".")[0] not in ("cli", "terminal")
        for alias in node.names
        if (node.module, alias.name) in (("ramet.terminal", "messages"), ("ramet.terminal", "log_to"), ("rich", "print"))
    }
    assert not told, told


def test_a_logger_is_named_after_its_module():
    def expected(path: Path) -> str:
        # What is run by its name is called __main__.
        run = '__name__ == "__main__"' in path.read_text(encoding="utf-8")
        return repr(f"ramet.{module_of(path)}") if run else "__name__"

    named = {
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in FILES
        for call in calls(path)
        if ast.unparse(call.func) == "logging.getLogger" and ast.unparse(call.args[0]) not in (expected(path), "'ramet'", "'mcp'")
    }
    assert not named, named


ROOMS = (
    "version", "errors", "imports", "schema", "terminal", "storage", "data", "web",
    "agents", "tools", "media", "attention",
    "policy.models", "policy.engines", "policy.training", "policy.openrlhf",
    "rewards", "env", "display",
    "benchmarks.evaluation", "benchmarks.speed", "benchmarks.faults",
    "runs", "recipes", "cli", "__main__",
)  # fmt: skip
"""From the ground up: a room imports from those before it, never from those after it."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room of a module; None of what only holds rooms."""
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


def imported(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, at its top or in a function."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramet."):
            origin = str(node.module).removeprefix("ramet.")
            named |= {name if (name := f"{origin}.{alias.name}") in modules else origin for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.name.removeprefix("ramet.") for alias in node.names if alias.name.startswith("ramet.")}
    return named


def test_every_file_is_in_a_room():
    lost = [module for path in FILES if room_of(module := module_of(path)) is None and path.name != "__init__.py"]
    assert not lost, lost


def test_a_room_imports_only_from_rooms_below_it():
    modules = {module_of(path) for path in FILES}
    up = [
        f"{module} -> {target}"
        for path in FILES
        if (room := room_of(module := module_of(path))) is not None
        for target in imported(path, modules)
        if (other := room_of(target)) is not None and ROOMS.index(other) > ROOMS.index(room)
    ]
    assert not up, up


def test_no_file_imports_itself_by_way_of_others():
    modules = {module_of(path): path for path in FILES}
    reached = {module: imported(path, set(modules)) & modules.keys() for module, path in modules.items()}
    for via in modules:
        for module in modules:
            if via in reached[module]:
                reached[module] |= reached[via]
    circles = [module for module in modules if module in reached[module]]
    assert not circles, circles


def test_no_room_holds_more_than_a_fifth_of_the_lines():
    lines = dict.fromkeys(ROOMS, 0)
    for path in FILES:
        if (room := room_of(module_of(path))) is not None:
            lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    largest = max(lines, key=lines.__getitem__)
    assert lines[largest] <= sum(lines.values()) / 5, (largest, lines)


def types_of(path: Path) -> Iterator[str]:
    """The public classes and type aliases of a module, which are what is written in CamelCase."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [node.name] if isinstance(node, ast.ClassDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_no_two_public_types_share_a_name():
    modules = defaultdict(list)
    for path in FILES:
        for name in types_of(path):
            modules[name].append(module_of(path))
    shared = {name: places for name, places in modules.items() if len(places) > 1}
    assert len(modules) > 200 and not shared, shared
