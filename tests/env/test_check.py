"""What is wrong with an environment is found without a model, and a new one begins whole."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import ramet
from ramet.env.check import check
from ramet.env.outside import Outside
from ramet.env.registry import env_settings
from ramet.env.settings import EnvSettings, words
from ramet.env.simple import SimpleEnvironment, content
from ramet.errors import ConfigError
from ramet.policy.training.reward import RewardConfig
from ramet.runs import environments
from ramet.runs.environments import installed, write_package

ROWS = [{"question": f"What is {n} + 1?", "reference": str(n + 1)} for n in range(40)]


def right(task: Any, tree: Any) -> float:
    return float(tree.answer == task.reference)


class Given(EnvSettings):
    """An environment of this process alone."""

    kind: str = "given"

    def build(self, count: Any = words) -> Any:
        return Outside(ENV, self.kind)


ENV: Any = None


def problems(env: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, str]:
    """By check, without the other process."""
    monkeypatch.setitem(globals(), "ENV", env)
    monkeypatch.setattr("ramet.env.check._elsewhere", lambda *arguments: None)
    return {finding.check: finding.problem for finding in check(Given(), count=8, **options) if finding.problem}


def one(rng: random.Random) -> ramet.Task:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return ramet.Task.ask(f"{a}+{b}", f"What is {a} + {b}?", reference=a + b)


def test_the_packages_own_tasks_are_well() -> None:
    assert [finding.check for finding in check(env_settings("rows"), count=4) if finding.problem] == []


def test_a_whole_environment_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    for tasks in (one, ROWS, {"train": ROWS[:20], "iid": ROWS[20:30], "ood": ROWS[30:]}):
        env = SimpleEnvironment(tasks, lambda task, tree: tree.answer == str(task.reference))
        assert problems(env, monkeypatch) == {}
    parts = SimpleEnvironment(one, lambda task, tree: {"right": tree.answer == str(task.reference), "said": tree.answer is not None})
    assert problems(parts, monkeypatch, rewarding=RewardConfig(weights={"said": 0.0})) == {}


def test_what_is_wrong_is_said_by_the_check_that_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))

    def drifting(split: str, count: int, seed: int) -> list[ramet.Task]:
        return [ramet.Task.ask(f"{n}", f"{split} {seed} {n} {next(calls)}", reference="1") for n in range(count)]

    def shared(split: str, count: int, seed: int) -> list[ramet.Task]:
        return [ramet.Task.ask(f"{n}", f"{seed} {n}", reference="1") for n in range(count)]

    def constant(split: str, count: int, seed: int) -> list[ramet.Task]:
        return [ramet.Task.ask(f"{n}", f"{split} {n}", reference="1") for n in range(count)]

    def whole(split: str, count: int, seed: int) -> list[ramet.Task]:
        return [ramet.Task.ask(f"{n}", f"{split} {seed} {n}", {"a": "x"}, reference="1") for n in range(count)]

    def keys(split: str, count: int, seed: int) -> list[ramet.Task]:
        return [ramet.Task.ask(f"{n}", f"{split} {seed} {n}", {"a": "x", "A": "y"}, reference="1") for n in range(count)]

    def found(tasks: Any, reward: Any = right) -> str:
        [(name, problem)] = problems(SimpleEnvironment(tasks, reward), monkeypatch).items()
        return f"{name}: {problem}"

    assert "the same seed gives the same tasks: tasks('train', 8, 0) gives other tasks when it is called again" in found(drifting)
    assert "splits differ in content: task 0 of iid asks the same as task 0 of train" in found(shared)
    assert "the training tasks are the same, in the same order, for every seed" in found(constant)
    assert "prompts: document keys 'a' and 'A' differ only in case" in found(keys)
    assert "grades: task 0: the reference answer '1' scores 0, no better than no answer (0)" in found(whole, lambda task, tree: 0)
    assert "grades: task 0: empty text as an answer scores 1, no worse" in found(whole, lambda task, tree: tree.answer is not None)
    assert "grades: the reward of task 0 is nan" in found(whole, lambda task, tree: float("nan"))
    assert "grades: the reward of task 0 raised AttributeError" in found(whole, lambda task, tree: float(tree.answer.strip() == "1"))
    assert "tasks: the environment given raised KeyError in tasks" in found(lambda split, count, seed: {}["a"])


def test_tasks_that_another_process_draws_differently_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "unordered.py").write_text(
        "import ramet\n\ndef task(rng):\n    words = list({str(n) for n in range(2000)})\n    word = words[rng.randrange(2000)]\n"
        "    return ramet.Task.ask(word, f'Say {word}', reference=word)\n\n"
        "env = ramet.SimpleEnvironment(task, lambda task, tree: tree.answer == task.reference)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="another process draws other tasks for train; do not draw from sets"):
        ramet.check_environment("unordered:env")


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (ROWS[:2], "2 different rows cannot be divided"),
        ([{"question": "q"}] * 9, "1 different rows cannot be divided"),
        ([*ROWS, {"answer": "1"}], "tasks, row 41 has the field answer; a row takes id, question, documents, reference"),
        ([*ROWS, {"id": "a"}], "tasks, row 41 has no question"),
        ([*ROWS, {"question": 3}], "tasks, row 41: a question is text"),
        ([*ROWS, 3], "tasks, row 41 is of type int"),
        ([*ROWS, {"id": "7", "question": "q"}], "tasks: two tasks have the id 7"),
        ({"train": ROWS, "iid": ROWS[:3]}, "asks the same as task"),
        ({"iid": ROWS}, "tasks has no split train"),
        ({"train": ROWS, "test": ROWS}, "tasks has the split test; it takes train, and tune, iid, ood"),
        ({"train": ROWS, "iid": []}, "too few rows for the split iid"),
        (3, "tasks is of type int; give rows, a file of rows, or a function"),
        (lambda a, b: [], r"the tasks are a function of \(a, b\); give one of \(rng\), or of \(split, count, seed\)"),
    ],
)
def test_rows_that_cannot_be_used_are_one_line(tasks: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SimpleEnvironment(tasks, right)
    with pytest.raises(ConfigError, match=r"the reward takes \(task\), not \(task, tree\)"):
        SimpleEnvironment(ROWS, lambda task: 1.0)


def test_rows_are_divided_by_content_and_training_goes_on_in_epochs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    env, other = SimpleEnvironment(tmp_path / "rows.jsonl", right), SimpleEnvironment(ROWS[::-1], right)
    measured = {content(task) for task in env.tasks("iid", 100, 0)}
    assert len(measured) == 8 and measured == {content(task) for task in other.tasks("iid", 100, 1)}
    trained = [content(task) for task in env.tasks("train", 58, 0)]
    assert len(set(trained[:29])) == len(set(trained[29:])) == 29 and measured.isdisjoint(trained)
    assert measured.isdisjoint(tuned := {content(task) for task in env.tasks("tune", 100, 0)}) and tuned.isdisjoint(trained)
    assert env.fingerprint() != SimpleEnvironment([*ROWS[:-1], {"question": "another", "reference": "1"}], right).fingerprint()
    with pytest.raises(ConfigError, match="no split 'ood'"):
        env.tasks("ood", 1, 0)


def test_a_new_package_is_whole_and_says_what_it_cannot_be_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, module = write_package("own-bills-9", tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    assert (folder / "pyproject.toml").exists() and (folder / "tests" / f"test_{module}.py").exists()
    ramet.check_environment(f"{module}:environment")
    del sys.modules[module]
    for name, said in (
        ("own-bills-9", f"there is a module {module} already"), ("rows", "there is an environment rows already"),
        ("json", "there is a module json already"), ("../x", "not the name of a package"), ("Own", "not the name of a package"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            write_package(name, tmp_path)


def test_the_list_says_what_is_wrong_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    values = {"gone": "no_such_module:x", "rows": "own:rows", "number": "builtins:int"}
    points = {name: [EntryPoint(name, value, "ramet.environments")] for name, value in values.items()}
    monkeypatch.setattr(environments, "entries", lambda: points)
    monkeypatch.setattr(environments, "path_of", values.__getitem__)
    about = {(name, origin): text for name, origin, text in installed()}
    assert about["rows", "own:rows"] == "hidden by ramet's own: give it as own:rows"
    assert "there is no module 'no_such_module'" in about["gone", "no_such_module:x"]
    assert "without tasks and grade" in about["number", "builtins:int"]
