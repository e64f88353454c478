"""The command line as a user meets it: one line for what is wrong, a status, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def ramet(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ramet.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


def test_help_names_every_command_with_an_example():
    listed = ramet("--help").stdout
    for command in ("demo", "run", "train", "eval", "reproduce", "bench", "models", "doctor"):
        assert command in listed
        assert "Example: ramet" in ramet(command, "--help").stdout


def test_run_prints_tree_answer_and_bill(tmp_path):
    result = ramet("run", "--policy", "nano", "3+4-2+7-9+5+8-1+6+2", "--json", str(tmp_path / "run.json"))
    assert result.returncode == 0, result.stderr
    assert "root" in result.stdout and "bill" in result.stdout and "answer" in result.stdout
    head, tree = json.loads((tmp_path / "run.json").read_text())
    assert head["record"] == "meta" and tree["reference"] == 23 and tree["generated"] <= 256


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "2*3"], "is not a sum"),
        (["run", "1+2", "--budget", "0"], "a budget of zero tokens answers nothing"),
        (["run", "1+2", "--policy", "nowhere"], "there is no model 'nowhere'"),
        (["train", "--set", "train.updatez=1"], "did you mean 'updates'"),
        (["train", "--config", "nowhere.toml"], "cannot read config"),
        (["reproduce", "giant"], "there is nano"),
        (["models", "train-nano", "--out", "."], "error"),
        (["fly"], "No such command"),
        (["run", "1+2", "--budgett", "3"], "No such option"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(arguments, says, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = ramet(*arguments, cwd=tmp_path)
    assert result.returncode not in (0, 70), result.stderr
    assert says in result.stderr and "Traceback" not in result.stderr


def test_a_model_directory_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "has no tokenizer" in ramet("run", "1+2", "--policy", str(tmp_path)).stderr


def test_train_is_killed_resumed_and_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL in the middle, then the same command: the same metrics and the same final evaluation."""
    (tmp_path / "tiny.toml").write_text(
        "budgets = [40]\n[env]\noperands = [2, 5]\nood_operands = [10, 10]\n"
        "[train]\nupdates = 4\ntasks = 2\ngroup_size = 2\ncheckpoint_every = 2\n"
        "[eval]\ntasks = 4\nbudgets = [40]\nood_budgets = [60]\n"
    )
    command = ["train", "--config", "tiny.toml", "--seed", "3", "--name"]
    assert ramet(*command, "whole", cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "ramet.cli", *command, "cut"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "runs" / "cut" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        pass
    process.kill()
    process.wait()
    resumed = ramet(*command, "cut", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr

    def curve(name: str) -> list[dict]:
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]

    def evaluation(name: str) -> list[dict]:
        return json.loads((tmp_path / "runs" / name / "evaluation.json").read_text())[1:]

    assert curve("cut") == curve("whole") and len(curve("cut")) == 4
    assert evaluation("cut") == evaluation("whole")
    other = ramet("train", "--config", "tiny.toml", "--seed", "4", "--name", "cut", cwd=tmp_path)
    assert other.returncode == 2 and "another configuration or seed" in other.stderr


def test_agents_import_without_torch_or_transformers():
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'tokenizers', 'numpy'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import ramet, ramet.agents, pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(ramet.agents.__path__):\n"
        "    importlib.import_module(f'ramet.agents.{module.name}')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
