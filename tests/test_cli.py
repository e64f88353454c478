"""The command line as a user meets it: one line for what is wrong, a status, no traceback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ramet.display.plots import LABELS
from tests.processes import child

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def ramet(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ramet.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT | environment, timeout=300)


def test_help_names_every_command_with_an_example():
    listed = ramet("--help").stdout
    for command in ("demo", "run", "train", "eval", "reproduce", "bench", "models", "doctor"):
        assert command in listed
        assert "Example: ramet" in ramet(command, "--help").stdout


@pytest.mark.parametrize(("encoding", "arrow"), [("utf-8", "→"), ("ascii", "->")])
def test_run_prints_tree_answer_and_bill(encoding, arrow, tmp_path):
    command = ("run", "--policy", "nano", "3+4-2+7-9+5+8-1+6+2", "--json", str(tmp_path / "run.json"))
    result = ramet(*command, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert f"tokens {arrow} answered" in result.stdout and "bill" in result.stdout and "answer" in result.stdout
    head, tree = json.loads((tmp_path / "run.json").read_text())
    assert head["record"] == "meta" and tree["reference"] == 23 and tree["generated"] <= 256


def test_run_goes_on_from_its_journal(tmp_path):
    command = ("run", "3+4-2+7-9+5+8-1+6+2", "--seed", "3", "--temperature", "1", "--journal", str(tmp_path / "kept"))
    whole = ramet(*command)
    records = (tmp_path / "kept").read_bytes().splitlines(keepends=True)
    (tmp_path / "kept").write_bytes(b"".join(records[:2]))
    again = ramet(*command)
    assert f"1 samples taken from {tmp_path / 'kept'}, {len(records) - 2} made" in " ".join(again.stderr.split())
    assert again.stdout[again.stdout.index("A: ") : again.stdout.index("bill")] in whole.stdout
    other = ramet(*command, "--budget", "100")
    assert other.returncode == 1 and "belongs to another configuration" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "2*3"], "is not a sum"),
        (["run", "1+2", "--budget", "0"], "a budget of zero tokens answers nothing"),
        (["run", "1+2", "--policy", "nowhere"], "there is no model 'nowhere'"),
        (["train", "--set", "train.updatez=1"], "did you mean 'updates'"),
        (["train", "--config", "nowhere.toml"], "cannot read config"),
        (["reproduce", "giant"], "there are nano and longvideo"),
        (["models", "train-nano", "--out", "."], "error"),
        (["fly"], "No such command"),
        (["eval", "--env", "hotpotqa"], "env.data names no file or data set"),
        (["eval", "--budgett", "3"], "No such option"),
        (["run", "1+2", "--depth", "-1"], "--depth"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(arguments, says, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = ramet(*arguments, cwd=tmp_path)
    assert result.returncode not in (0, 70), result.stderr
    assert says in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_model_directory_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "has no tokenizer" in ramet("run", "1+2", "--policy", str(tmp_path)).stderr


def test_train_is_killed_resumed_and_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL in the middle, then the same command: the same metrics and the same final evaluation."""
    (tmp_path / "tiny.toml").write_text(
        'model = "nano"\nbudgets = [40]\n[env]\nkind = "rows"\n'
        "operands = [2, 5]\nood_operands = [10, 10]\n"
        "[train]\nlearning_rate = 4e-4\nupdates = 4\ntasks = 2\ngroup_size = 2\ncheckpoint_every = 2\n"
        "[eval]\ntasks = 4\nbudgets = [40]\nood_budgets = [60]\n"
    )
    command = ["train", "--config", "tiny.toml", "--seed", "3", "--name"]
    assert ramet(*command, "whole", cwd=tmp_path).returncode == 0
    cut = "cut[/b] :100: [red]"
    metrics = tmp_path / "runs" / cut / "metrics.jsonl"
    started = [sys.executable, "-m", "ramet.cli.main", *command, cut]
    with child(started, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
            pass
    resumed = ramet(*command, cut, cwd=tmp_path)
    assert resumed.returncode == 0 and f"run folder runs/{cut}: " in resumed.stderr

    def curve(name: str) -> list[dict]:
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]

    def evaluation(name: str) -> list[dict]:
        records = json.loads((tmp_path / "runs" / name / "evaluation.json").read_text())[1:]
        return [{n: v for n, v in r.items() if n != "seconds"} for r in records]

    assert curve(cut) == curve("whole") and len(curve(cut)) == 4
    assert evaluation(cut) == evaluation("whole")
    other = ramet("train", "--config", "tiny.toml", "--seed", "4", "--name", cut, cwd=tmp_path)
    assert other.returncode == 2 and "another configuration or seed" in other.stderr


TINY = [
    "train.updates=1", "train.tasks=2", "train.group_size=2", "eval.tasks=4", "eval.budgets=[40, 90]", "eval.ood_budgets=[150]",
]  # fmt: skip


def test_reproduce_writes_what_the_readme_shows_and_does_nothing_twice(tmp_path):
    command = ["reproduce", "nano", "--seed", "2", *(part for item in TINY for part in ("--set", item))]
    first = ramet(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "reproduce-nano-2"
    records = json.loads((folder / "results.json").read_text())
    points = {(r["policy"], r["split"], r["budget"]): r for r in records if r["record"] == "point"}
    policies = set(LABELS) - {"base_serial"}
    assert set(points) == {(p, s, b) for p in policies for s, b in (("iid", 40), ("iid", 90), ("ood", 150))}
    for point in points.values():
        assert {"n", "accuracy", "ci_low", "ci_high", "generated", "critical_path", "spawn_rate"} <= set(point)
        assert point["generated"] <= point["budget"] and point["n"] == 4
    for name in ("frontier.png", "behaviour.png", "learning.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/png;base64,") == 3
    journal = (folder / "journal.jsonl").read_bytes()
    again = ramet(*command, cwd=tmp_path)
    assert again.returncode == 0 and (folder / "journal.jsonl").read_bytes() == journal
    assert json.loads((folder / "results.json").read_text())[1:] == records[1:]


def test_the_demo_from_end_to_end(tmp_path):
    from ramet.recipes import demo
    from ramet.runs.settings import RunConfig, load

    train = ["train.updates=2", "train.tasks=2", "train.group_size=2", "train.checkpoint_every=1"]
    demo.run_demo(tmp_path / "demo", load(RunConfig, "demo", [*train, "eval.tasks=3", "eval.budgets=[40, 90, 150]"]))
    records = json.loads((tmp_path / "demo" / "demo.json").read_text())
    points = {(r["policy"], r["budget"]) for r in records if r["record"] == "point"}
    assert points == {(p, b) for p in ("base", "base_serial", "trained") for b in (40, 90, 150)}
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "answer" in report and re.search(r"The result: with 150 tokens a task the trained model is right on \d+% of 3 ", report)


def test_bench_sampling_and_doctor(tmp_path):
    result = ramet("bench", "sampling", "--requests", "16", "--repeats", "1", "--json", str(tmp_path / "s.json"))
    assert result.returncode == 0, result.stderr
    backends = {r["backend"]: r for r in json.loads((tmp_path / "s.json").read_text()) if r["record"] == "backend"}
    assert set(backends) == {"ramet", "generate", "generate_batch"}
    assert all(r["tokens_per_second"] > 0 and r["requests"] >= 8 for r in backends.values())
    checked = ramet("doctor", "--json", str(tmp_path / "d.json"))
    assert checked.returncode == 0 and "3+4 -> 7" in checked.stdout
    for part in ("vllm", "openrlhf"):
        assert importlib.util.find_spec(part) is not None or f"pip install 'ramet[{part}]'" in checked.stdout


def signalled(folder: Path, number: int) -> tuple[int, str, int]:
    """Start a long training, send it a signal after two updates: status, what it said, and updates done."""
    command = ["train", "--name", "long", *(part for item in TINY for part in ("--set", item)), "--set", "train.updates=500"]
    metrics = folder / "runs" / "long" / "metrics.jsonl"
    started = [sys.executable, "-m", "ramet.cli.main", *command]
    with child(started, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            pass
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said, metrics.read_text().count("\n")


def test_ctrl_c_is_one_line_a_status_and_can_be_resumed(tmp_path):
    status, said, _ = signalled(tmp_path, signal.SIGINT)
    assert status == 130 and "run the same command again to resume" in said and "Traceback" not in said


def test_the_first_sigterm_ends_the_update_and_saves_it(tmp_path):
    status, said, done = signalled(tmp_path, signal.SIGTERM)
    assert status == 143 and "finishing what is running" in said and "run the same command again to resume" in said
    # Checkpoints come every 20 updates; this one came because of the signal.
    assert done % 20 and [path.name for path in (tmp_path / "runs" / "long" / "checkpoints").glob("step-*")] == [f"step-{done:06d}"]


def test_bench_kills_and_simulate_write_their_records(tmp_path):
    killed = ramet("bench", "kills", "--kills", "2", "--json", str(tmp_path / "k.json"))
    assert killed.returncode == 0, killed.stderr
    records = [r for r in json.loads((tmp_path / "k.json").read_text()) if r["record"] == "kills"]
    assert [r["job"] for r in records] == ["eval", "train"] and all(r["kills"] >= 2 for r in records)
    assert all(r["lost"] == r["duplicated"] == r["differing"] == 0 for r in records)
    simulated = ramet("bench", "simulate", "--seeds", "60", "--json", str(tmp_path / "s.json"))
    assert simulated.returncode == 0, simulated.stderr
    (record,) = [r for r in json.loads((tmp_path / "s.json").read_text()) if r["record"] == "simulate"]
    assert record["seeds"] == 60 and record["violations"] == 0 and min(record["faults_injected"], record["trees"], record["clones"]) > 50
    replayed = ramet("bench", "simulate", "--seed", "7", "--verbose")
    assert replayed.returncode == 0 and "Scenario(" in replayed.stdout and "tree 0" in replayed.stdout


def test_a_sum_may_begin_with_a_minus():
    assert ramet("run", "-3+4").returncode == 0


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
