"""What works without any extra: everything that extras bring is hidden from a fresh interpreter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ramet
from ramet.errors import EXTRAS, extra, missing_extra

ROOT = Path(__file__).parent.parent
SOURCE = Path(ramet.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SPELLED = {"reasoning_gym": "reasoning-gym", "PIL": "pillow", "mcp_types": "mcp-types", "pydantic_monty": "pydantic-monty"}
"""Packages whose requirement is not called as their module is."""
OF_TRANSFORMERS = {"huggingface_hub", "tokenizers"}
OF_DATASETS = {"pyarrow"}
UNLISTED = {"flash_attn"}
"""What is used where it is found, and brought by no extra."""

HIDE = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {set(EXTRAS)!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def without_extras(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + program], capture_output=True, encoding="utf-8", timeout=300)


def brought(extra: str) -> set[str]:
    """Names of what an extra requires, with what the extras that it takes in require."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, _, more = re.match(r"([\w.-]+)(\[([\w,-]+)\])?", requirement).groups()
        found |= {name} if name != "ramet" else set().union(*(brought(other) for other in more.split(",")))
    return found


def imported(path: Path) -> set[str]:
    """Packages that a file imports, wherever in it."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named.add(str(node.module).partition(".")[0])
    return named


def test_every_command_shows_its_help_without_an_extra():
    program = """
import ramet, ramet.agents, ramet.policy.engines.openai, ramet.runs.sweep
from typer.testing import CliRunner
from typer.main import get_command
from ramet.cli.main import app
def helped(command, words):
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, (words, done.output, done.exception)
    for name, child in getattr(command, "commands", {}).items():
        helped(child, [*words, name])
helped(get_command(app), [])
"""
    done = without_extras(program)
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_an_extra_names_it_on_one_line():
    program = """
from typer.testing import CliRunner
from ramet.cli.main import app, _report
from ramet.errors import RametError, missing_extra
for words, named in (
    ("run 3+4", "train"), ("demo", "train"), ("train --name x", "train"), ("eval", "train"), ("models accuracy", "train"),
    ("bench sampling", "train"), ("attention plan", "train"), ("attention plan --png x.png", "plot"),
    ("eval --name y --set backend=completions --set url=http://127.0.0.1:9/v1", "completions"),
    ("frontier --env gym --set env.task=leg_counting --set backend=chat --set url=http://127.0.0.1:9/v1", "data"),
    ("frontier --env hotpotqa --data x.jsonl --set backend=chat --set url=http://127.0.0.1:9/v1", "data"),
    ("eval --env gsm8k --data x.parquet --set backend=chat --set url=http://127.0.0.1:9/v1 --name z", "data"),
    ("eval --name v --set backend=vllm", "vllm"), ("train --trainer openrlhf --plan", "train"), ("train --trainer openrlhf", "openrlhf"),
    ("eval --name h --set backend=completions --set url=http://127.0.0.1:9/v1 --policy hf:owner/name", "completions"),
    ("models get smollm2-135m", "train"), ("reward serve --model x --videos .", "reward"),
):
    error = CliRunner().invoke(app, words.split()).exception
    said = str(error) if isinstance(error, RametError) else missing_extra(error)
    assert f"pip install 'ramet[{named}]'" in said and len(said.splitlines()) == 1, (words, error, said)
"""
    done = without_extras(f"import os, tempfile; os.chdir(tempfile.mkdtemp()); os.environ['RAMET_CACHE'] = os.getcwd(){program}")
    assert done.returncode == 0, done.stderr


def test_without_extras_doctor_finds_nothing_broken():
    done = without_extras("import sys; sys.argv = ['ramet', 'doctor']; from ramet.cli.main import main; main()")
    assert done.returncode == 0, done.stderr
    assert all(extra(module) in done.stdout for module in ("torch", "transformers", "matplotlib", "av", "bm25s", "trl"))


def test_a_picture_that_cannot_be_drawn_is_left_out_with_a_note(tmp_path):
    program = f"""
from pathlib import Path
from ramet.display import plots
from ramet.terminal import log_to, messages
log_to(messages)
plots.costs([], Path({str(tmp_path)!r}) / "frontier.png")
"""
    done = without_extras(program)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert "frontier.png is not drawn" in done.stderr and extra("matplotlib") in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", EXTRAS)
def test_an_extra_brings_what_it_is_named_for(module):
    requirement = "transformers" if module in OF_TRANSFORMERS else "datasets" if module in OF_DATASETS else SPELLED.get(module, module)
    names = {EXTRAS[module], f"{EXTRAS[module]}-cpu"} & PROJECT["optional-dependencies"].keys()
    assert any(requirement in brought(name) for name in names)
    assert requirement not in {re.match(r"[\w.-]+", line)[0] for line in PROJECT["dependencies"]}
    error = ModuleNotFoundError(name=f"{module}.part")
    assert extra(module) in missing_extra(error) and len(missing_extra(error).splitlines()) == 1


def test_questions_and_servers_bring_no_torch():
    heavy = {"torch", "accelerate", "peft", "tensorboard"}
    assert all(heavy.isdisjoint(brought(name)) for name in ("completions", "data", "plot", "video"))


def test_everything_that_is_imported_is_in_the_base_install_or_in_an_extra():
    base = {re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    known = base | {"pydantic_core", "ramet", "setuptools"} | EXTRAS.keys() | UNLISTED | sys.stdlib_module_names
    strange = {str(path.relative_to(SOURCE)): names - known for path in SOURCE.rglob("*.py") if (names := imported(path)) - known}
    assert not strange


def test_what_the_tests_run_with_is_what_is_asked_for():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pins = {Requirement(line).name: Requirement(line).specifier for line in lines}
    assert all(str(pin).startswith("==") for pin in pins.values()) and len(pins) == len(lines)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    per_environment = {name for line in re.findall(r"^PINNED.* = .*$", makefile, re.MULTILINE) for name in re.findall(r"([\w-]+)==", line)}
    # Of vLLM and the fuzzer the tests install another build, or nothing; setuptools comes with the environment.
    elsewhere = {"ramet", "vllm", "atheris", "setuptools"} | per_environment
    for line in [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]:
        if (asked := Requirement(line)).name not in elsewhere:
            (pin,) = pins[asked.name]
            assert asked.specifier.contains(pin.version), (line, pin)


def test_every_extra_that_is_named_to_a_person_exists():
    extras = PROJECT["optional-dependencies"].keys()
    pages = [*SOURCE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    groups = [group for page in pages for group in re.findall(r"ramet\[([\w,-]+)\]", page.read_text(encoding="utf-8"))]
    named = {name for group in groups for name in group.split(",")}
    assert named and named <= extras


def test_doctor_fails_where_something_that_is_installed_does_not_work(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is of another machine')", encoding="utf-8")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['ramet', 'doctor']; from ramet.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 1 and "libtorch.so is of another machine" in done.stdout
    assert done.stderr.splitlines() == ["error: not working: CUDA, nano model; the table says what to do"]
