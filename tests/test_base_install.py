"""What works without the extra `train`: its packages are hidden from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from ramet.errors import TRAIN

HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(TRAIN)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def without_train(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + program], capture_output=True, encoding="utf-8", timeout=100)


def test_every_command_shows_its_help_and_a_server_can_be_measured_without_torch():
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
    done = without_train(program)
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_torch_names_the_extra_on_one_line():
    done = without_train("import sys; sys.argv = ['ramet', 'run', '3+4']; from ramet.cli.main import main; main()")
    assert done.returncode == 2
    assert "pip install 'ramet[train]'" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_the_extra_brings_what_is_said_to_come_with_it():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {part.partition(">")[0] for part in project["optional-dependencies"]["train"]}
    assert named >= TRAIN and named.isdisjoint(part.partition(">")[0] for part in project["dependencies"])
