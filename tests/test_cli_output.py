"""What every command has: help, a version, completion, results where they are asked for, a status that says what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ramet
from ramet.agents import drain
from ramet.cli import main as cli
from ramet.cli import settings
from ramet.runs.settings import RunConfig, validate


def run(*arguments: object, expect: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["ramet", *map(str, arguments)])
        cli.main()
    assert (ended.value.code or 0) == expect


def test_the_module_is_the_command_and_has_a_version_and_short_help():
    for arguments, says in ((("--version",), ramet.__version__), (("-h",), "Usage:"), (("train", "-h"), "Example: ramet train")):
        done = subprocess.run([sys.executable, "-m", "ramet", *arguments], capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == 0 and says in done.stdout


def test_a_shell_completes_commands():
    environment = {**os.environ, "_RAMET_COMPLETE": "complete_bash", "COMP_WORDS": "ramet ev", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'ramet'; from ramet.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout.split() == ["eval"]


def test_the_settings_are_listed_and_as_a_file_read_back(capsys):
    run("config", "reference", "train")
    shown = " ".join(capsys.readouterr().out.split())
    assert "train.updates" in shown and "Updates of the whole run." in shown and "env.kind" not in shown
    run("config", "show", "--toml", "--set", "train.updates=7", "--set", 'model="a[/b]"')
    config = validate(RunConfig, tomllib.loads(capsys.readouterr().out))
    assert config.train.updates == 7 and config.model == "a[/b]"
    for command in (("reference", "trian"), ("show", "--section", "trian")):
        run("config", *command, expect=2)
        assert "there are model, backend" in " ".join(capsys.readouterr().err.split())


def test_it_is_said_where_each_value_comes_from(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('model = "nano"\nseed = 4\n[env]\nkind = "gsm8k"\nfields = { question = "q" }\n[train]\nupdates = 5\ntasks = 9\n')
    run("config", "show", path, "--set", "train.tasks=7", "--set", "server={concurrency=3}", "--json", "-")
    found = {r["name"]: (r["value"], r["from"]) for r in json.loads(capsys.readouterr().out)}
    assert found["seed"] == (4, str(path)) and found["env.kind"] == ("gsm8k", str(path)) and found["train.updates"] == (5, str(path))
    assert found["env.fields"] == ({"question": "q"}, str(path)) and found["env.levels"] == ([], "environment gsm8k")
    assert found["train.tasks"] == (7, "--set") and found["server.concurrency"] == (3, "--set")
    assert found["train.group_size"][1] == found["server.startup_timeout"][1] == "default"
    run("config", "show", path, "--set", "env={kind='rows'}", "--section", "env", "--json", "-")
    assert {r["name"]: r["from"] for r in json.loads(capsys.readouterr().out)} == {
        "env.kind": "--set", **dict.fromkeys(("env.operands", "env.ood_operands", "env.row", "env.largest"), "environment rows"),
    }  # fmt: skip


def test_the_page_of_settings_is_what_the_command_prints_and_every_setting_has_a_meaning():
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings.page(), "run: ramet config reference --markdown > docs/settings.md"
    assert not [row.name for _, _, rows in settings.sections() for row in rows if not row.meaning]


def test_a_result_on_standard_output_stands_there_alone(capsys):
    run("config", "show", "--section", "seed", "--json", "-")
    said = capsys.readouterr()
    assert json.loads(said.out)[-1]["name"] == "seed" and "default" in said.err


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "show_settings", lambda *_: pytest.fail("it has begun"))
    for path in (tmp_path, Path("/proc/none/x.json")):
        run("config", "show", "--json", path, expect=1)
        assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_its_status_and_one_line(number, status, capsys, monkeypatch):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(settings, "show_settings", lambda *_: signal.raise_signal(number))
    run("config", "show", expect=status)
    assert capsys.readouterr().err.strip() == "interrupted"
    for n, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(n, handler)
    monkeypatch.setattr(drain, "_signal", None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "1+2", "--budgett", "3"), "--budget"),
        (("eval", "--polcy", "x"), "--policy"),
        (("confg",), "config"),
        (("eval", "--name", ""), "is not the name of a folder"),
        (("train", "--name", ".."), "is not the name of a folder"),
    ],
)
def test_what_is_refused_says_what_was_meant(arguments, says, capsys):
    run(*arguments, expect=2)
    assert says in capsys.readouterr().err


def test_a_run_folder_is_named_after_the_model_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert [cli._last(name) for name in (".", "..", "./", "runs/nano", "hf:owner/name", "/")] == [
        "model", tmp_path.name, "model", "nano", "name", "model",
    ]  # fmt: skip
