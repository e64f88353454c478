"""What a stranger gets: archives with all that belongs into them, and a wheel that works where nothing else is."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.policy.raw_server import says, serve, stream, usage

ROOT = Path(__file__).parent.parent
pytest.importorskip("build")
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
ANSWER = stream(says("I multiply.\n"), says("Answer: 42"), says("", "stop"), usage(9))


def python(*words: str, cwd: Path, interpreter: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([interpreter, *words], cwd=cwd, env=CLEAN, capture_output=True, encoding="utf-8", timeout=300)


def kept() -> list[Path]:
    """The files of the repository, relative to its root; where there is no repository, as in a source archive, all files."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, encoding="utf-8") if (ROOT / ".git").exists() else None
    if done is not None and done.returncode == 0:
        return [path for name in done.stdout.split("\0") if name and (ROOT / (path := Path(name))).is_file()]
    rooms = [path for room in ("ramet", "tests", "docs", "examples") for path in (ROOT / room).rglob("*")]
    return [path.relative_to(ROOT) for path in [*ROOT.glob("*"), *rooms] if path.is_file() and path.suffix != ".pyc"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, in a folder that is called as a clone is."""
    folder = tmp_path_factory.mktemp("work") / "ramet"
    for path in kept():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@dataclass(frozen=True)
class Built:
    """What `python -m build` makes."""

    source: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(clone: Path) -> Built:
    out = clone.parent / "dist"
    done = python("-m", "build", "--no-isolation", "--outdir", str(out), str(clone), cwd=clone.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(source, wheel)


def required(wheel: Path, extras: Iterable[str]) -> dict[str, metadata.Distribution]:
    """By name, the distributions here that a wheel asks for with these extras, and that those ask for in turn."""
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    own = metadata.PathDistribution(zipfile.Path(wheel, f"{folder}/"))
    found: dict[str, metadata.Distribution] = {}
    pending, seen = [("ramet", extra) for extra in ("", *extras)], set()
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution: metadata.Distribution = own if name == "ramet" else found.setdefault(name, metadata.distribution(name))
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(requirement.name, more) for more in ("", *requirement.extras)]
    return found


def installed(wheel: Path, folder: Path, extras: Iterable[str] = ()) -> Path:
    """The `bin` of a new environment in `folder` with a wheel, what it asks for, and nothing else.

    What it asks for is linked from the environment of the tests, so that nothing is fetched; pip, without an index, refuses to
    install the wheel if anything is missing or of another release.
    """
    assert python("-m", "venv", "--without-pip", str(folder), cwd=folder.parent).returncode == 0
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in required(wheel, extras).values():
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    asked = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    target = ["--python", str(folder / "bin" / "python")]
    done = python("-m", "pip", *target, "install", "--quiet", "--no-index", "--no-compile", asked, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(clone):
    site = clone.parent / "site"
    program = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    done = python("-W", "ignore", "-c", program, str(clone.parent), cwd=clone)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(clone.parent / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(site)
    program = "import sys, site; sys.path.insert(0, ''); site.addsitedir('site'); import ramet; print(ramet.__version__)"
    done = python("-S", "-c", program, cwd=clone.parent)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_source_archive_holds_all_files_but_what_is_for_git_and_ci(built):
    with tarfile.open(built.source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path) for path in kept() if not path.parts[0].startswith(".")} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_wheel_holds_the_whole_package_its_licence_and_no_more(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        (about,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name for name in names if ".dist-info/" not in name} == {str(path) for path in kept() if path.parts[0] == "ramet"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in about and "# ramet" in about


AGENT = """
import sys, anyio, ramet

async def main():
    chat = ramet.WireFormat()
    task = ramet.Task("agent", (ramet.Message("user", "What is six times seven? End with a line `Answer: ...`."),))
    async with ramet.ChatPolicy(sys.argv[1], chat) as policy:
        tree = await ramet.Runtime(policy, chat).run(task, ramet.Budget(generated=64, depth=1), seed=0)
    print(tree.answer, tree.usage.generated, sorted({"torch", "transformers", "numpy"} & sys.modules.keys()))

anyio.run(main)
"""


def test_the_wheel_works_without_torch_where_nothing_else_is(built, tmp_path):
    programs = installed(built.wheel, tmp_path / "base")

    def works(*words: str, status: int = 0) -> str:
        done = python(*words, cwd=tmp_path, interpreter=programs / "python")
        assert done.returncode == status, done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())

    def ramet(*words: str, status: int = 0) -> str:
        return works(str(programs / "ramet"), *words, status=status)

    assert "No module named 'torch'" in works("-c", "import torch", status=1)
    assert "not installed: pip install 'ramet[train]'" in ramet("doctor")
    assert "nano-sweep" in ramet("config", "presets")
    assert "train.updates" in ramet("config", "reference", "train") and "train.updates" in ramet("config", "show", "--section", "train")
    assert "Usage: python -m ramet" in works("-m", "ramet", "--help") and "pip install 'ramet[train]'" in ramet("run", "3+4", status=2)
    with serve(ANSWER) as (url, asked):
        assert works("-c", AGENT, url) == "42 9 []"
        assert "answer 42" in ramet("run", "--url", url, "What is six times seven?")
        here = ("--policy", "m", "--set", "backend=chat", "--set", f"url={url}", "--budgets", "64")
        assert "iid (2 tasks a point)" in ramet("eval", *here, "--set", "eval.tasks=2") and len(asked) == 6
        (tmp_path / "questions.jsonl").write_text('{"question": "2+40?", "answer": "#### 42"}\n{"question": "2+3?", "answer": "#### 5"}\n')
        said = ramet("frontier", *here, "--env", "gsm8k", "--data", "questions.jsonl", "--methods", "direct,delegate")
        assert "frontier.png is not drawn" in said and "pip install 'ramet[plot]'" in said and len(asked) == 10
    written = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("results.*")}
    assert {"eval-m/results.json", "frontier-m-gsm8k/results.json", "frontier-m-gsm8k/results.csv"} <= written
    for link in programs.parent.glob("lib/python*/site-packages/mpmath*"):
        link.unlink()
    assert "without mpmath: pip install ramet" in ramet("doctor", status=1)


def test_the_wheel_runs_a_model_where_only_the_extra_train_is(built, tmp_path):
    programs = installed(built.wheel, tmp_path / "train", ["train"])
    done = python(str(programs / "ramet"), "run", "3+4-2", cwd=tmp_path, interpreter=programs / "python")
    assert done.returncode == 0 and "answer 5 (right)" in done.stdout, done.stdout + done.stderr
    missing = python("-c", "import trl", cwd=tmp_path, interpreter=programs / "python")
    assert "No module named 'trl'" in missing.stderr


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
