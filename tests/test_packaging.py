"""What a stranger gets: an install that works from anywhere, archives with what the help names."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that packaging reads, in a folder that is called as a clone is."""
    folder = tmp_path_factory.mktemp("work") / "ramet"
    (folder / "ramet").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "Makefile", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "learning.md", folder / "docs")
    for name in ("__init__.py", "__main__.py", "py.typed"):
        shutil.copy(ROOT / "ramet" / name, folder / "ramet")
    return folder


def built(clone: Path, what: str) -> Path:
    program = f"import sys; from setuptools import build_meta; print(build_meta.{what}(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", program, str(clone.parent)]
    done = subprocess.run(command, cwd=clone, capture_output=True, encoding="utf-8", check=True, timeout=100)
    return clone.parent / done.stdout.splitlines()[-1]


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(clone):
    site = clone.parent / "site"
    with zipfile.ZipFile(built(clone, "build_editable")) as wheel:
        wheel.extractall(site)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import sys, site; sys.path.insert(0, ''); site.addsitedir('site'); import ramet; print(ramet.__version__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=clone.parent, env=environment, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_source_archive_holds_examples_and_docs(clone):
    with tarfile.open(built(clone, "build_sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"examples/nano.toml", "docs/learning.md", "Makefile", "ramet/py.typed"} <= names


def test_nothing_that_is_printed_names_a_file_that_only_a_clone_has():
    named = []
    for path in (ROOT / "ramet").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
        # The docstring of a command is its help.
        comments = set() if path.parent.name == "cli" else set(map(id, statements))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in comments:
                named += [f"{path.name}: {node.value[:60]}"] if "docs/" in node.value or "examples/" in node.value else []
    assert not named
