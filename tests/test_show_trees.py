"""`ramet show`: what a run has grown, chosen, on the terminal, where nothing that a model wrote can act."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ramet.agents.scripted import PlainFormat
from ramet.agents.transcripts import TREES, Transcript, Transcripts
from ramet.agents.tree import Branch, Status, StopReason, Tree, Turn, price
from ramet.cli.main import app
from ramet.errors import CheckpointError, ConfigError
from ramet.runs.transcripts import Choice, show_run

HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202e [red]x[/red]\r\n0: answered '42'"


def kept(number: int, said: str = "7", reward: float | None = None, error: str = "", **branch: Any) -> Transcript:
    turn = Turn(tuple(map(ord, said)), (-0.25,) * len(said), StopReason.END)
    root = Branch("0", (63,), (turn,), **{"status": Status.ANSWERED, "answer": said, **branch})
    tree = Tree(f"t{number // 2}", root, price(root))
    given = {} if reward is None else {"score": reward, "penalties": {"generated": 0.5}, "reward": reward - 0.5}
    place = {"update": number // 4, "group": number % 4 // 2, "number": number % 2}
    return Transcript(place, tree.task_id, tree, tuple(tree.texts(PlainFormat())), "7", given, error)


TREES_KEPT = [
    *(kept(number, str(number), float(number)) for number in range(6)),
    kept(6, "cut", None, answer=None, status=Status.OUT_OF_BUDGET, reason="generated"),
    kept(7, "said", None, "the reward of task t3 raised KeyError"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    Transcripts(tmp_path / "run" / TREES).append(TREES_KEPT)
    return tmp_path / "run"


def shown(capsys: pytest.CaptureFixture[str], run: Path, **choice: Any) -> list[str]:
    show_run(run, Choice(**choice), None)
    return capsys.readouterr().out.splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_a_run_is_shown_a_tree_on_a_line_the_last_ones_and_how_many_there_are(capsys, run):
    lines = shown(capsys, run, limit=3)
    assert rows(lines) == [
        ["t2", "update 1, group 0, tree 1", "5", "7", "4.500", "1", "1", "answered"],
        ["t3", "update 1, group 1, tree 0", "", "7", "", "1", "3", "out of budget ('generated')"],
        ["t3", "update 1, group 1, tree 1", "said", "7", "", "1", "4", "the reward of task t3 raised KeyError"],
    ]
    assert lines[-1] == f"the last 3 of 8 trees; {run / TREES} has 8"
    assert len(rows(shown(capsys, run))) == 8


def test_those_that_failed_are_those_without_an_answer_or_with_an_error(capsys, run):
    assert [row[1][-6:] for row in rows(shown(capsys, run, failed=True))] == ["tree 0", "tree 1"]
    assert shown(capsys, run, failed=True)[-1] == f"2 failed trees; {run / TREES} has 8"


def test_the_best_and_the_worst_and_those_of_a_task_are_shown_whole(capsys, run):
    best = shown(capsys, run, best=True)
    assert best[0].endswith("update 1, group 0, tree 1: score 5, penalties generated 0.5, reward 4.5; it is 7 --")
    assert "    model | 5" in best and best[-1] == f"1 of 8 trees; {run / TREES} has 8"
    assert "    model | 0" in shown(capsys, run, worst=True)
    assert [line for line in shown(capsys, run, best=True, worst=True) if "model" in line] == ["    model | 5", "    model | 0"]
    assert [line for line in shown(capsys, run, task="t1") if "model" in line] == ["    model | 2", "    model | 3"]
    assert [line for line in shown(capsys, run, task="t1", worst=True) if "model" in line] == ["    model | 2"]


def test_nothing_that_a_model_wrote_acts_on_the_terminal(capsys, tmp_path):
    Transcripts(tmp_path / TREES).append([kept(0, HOSTILE, 1.0, HOSTILE, reason=HOSTILE, objective=HOSTILE)])
    for choice in ({}, {"best": True}, {"failed": True}):
        text = "\n".join(shown(capsys, tmp_path, **choice))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text) and "[red]x[/red]" in text
        assert not any(line.startswith("0: answered '42'") for line in text.splitlines())


def test_what_is_shown_can_be_written_as_records(run, tmp_path):
    out = tmp_path / "out.json"
    show_run(run, Choice(best=True), out)
    head, record = json.loads(out.read_text())
    assert head["command"] == "show" and record["record"] == "transcript" and record["task"] == "t2" and record["reward"]["reward"] == 4.5
    assert "model | 5" in record["text"]
    assert CliRunner().invoke(app, ["show", str(run), "--failed", "--json", str(out)]).exit_code == 0
    failed = [record["failed"] for record in json.loads(out.read_text())[1:]]
    assert failed == ["out of budget ('generated')", "the reward of task t3 raised KeyError"]


def test_what_has_no_trees_is_one_line_that_says_so(run, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("{}\n")
    Transcripts(tmp_path / "none" / TREES).append([kept(0)])
    for folder, choice, error, said in (
        (tmp_path / "missing", Choice(), ConfigError, "there is no run folder"),
        (tmp_path / "old", Choice(), ConfigError, r"has no trees\.jsonl\.gz, which .* write unless transcript_mib is 0"),
        (tmp_path, Choice(), ConfigError, r"there are some in .*none, .*run"),
        (tmp_path / "old" / "metrics.jsonl", Choice(), CheckpointError, "is not a file of transcripts"),
        (run, Choice(task="t9"), ConfigError, "no tree of task 't9' among the 8"),
        (tmp_path / "none", Choice(best=True), ConfigError, "none of 1 trees .* has a reward"),
    ):
        with pytest.raises(error, match=said) as caught:
            show_run(folder, choice, None)
        assert "\n" not in str(caught.value)


def test_a_file_that_reached_its_limit_says_that_trees_are_missing(capsys, tmp_path):
    Transcripts(tmp_path / TREES, 10).append([kept(0)])
    assert shown(capsys, tmp_path)[-1] == "the file has reached its limit, transcript_mib: later trees are missing"
