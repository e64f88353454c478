"""Environments of other packages: by entry point or import path, with options that they check themselves, none of them trusted."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ramet.agents.tree import Task
from ramet.env import outside, registry
from ramet.env.outside import OutsideSettings
from ramet.env.registry import env_settings
from ramet.errors import ConfigError, RametError, RewardError, TaskError
from ramet.imports import provenance
from ramet.runs.settings import RunConfig, dumps, load

MODULE = """
from dataclasses import dataclass
from typing import Literal
import ramet
from ramet.env.settings import EnvSettings, words

def reward(task, tree):
    return tree.answer == task.reference

def task(rng):
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return ramet.Task.ask(f"{a}+{b}", f"What is {a} + {b}?", reference=str(a + b))

sums = ramet.SimpleEnvironment(tasks=task, reward=reward)

def made(sides: int = 6, loaded: bool = False):
    return ramet.SimpleEnvironment(tasks=task, reward=reward, name=f"dice {sides}")

@dataclass(frozen=True)
class Dice(ramet.Environment):
    sides: int = 6

    def tasks(self, split, count, seed):
        return [ramet.Task.ask(f"{split}-{seed}-{n}", f"{split} {seed} {n} {self.sides}", reference="1") for n in range(count)]

    def grade(self, task, answer, metric=None):
        return float(answer == task.reference)

class Settings(EnvSettings):
    kind: Literal["dice"] = "dice"
    sides: int = 6

    def build(self, count=words):
        return Dice(self.sides)

class Ungraded(ramet.Environment):
    def tasks(self, split, count, seed):
        return []

class Rewarded(ramet.Environment):
    reward = staticmethod(reward)

    def tasks(self, split, count, seed):
        return []

class Broken(Dice):
    def __init__(self):
        raise RuntimeError("no dice here")

class Tasks(Dice):
    gives = None
    def tasks(self, split, count, seed):
        if self.gives == "raise":
            raise KeyError("dice")
        return self.gives

number = 3
def nothing(): return 3
"""


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "outside_dice.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "outside_dice", raising=False)
    import outside_dice

    yield outside_dice
    del sys.modules["outside_dice"]


def points(monkeypatch: pytest.MonkeyPatch, *values: tuple[str, str]) -> None:
    monkeypatch.setattr(outside, "entry_points", lambda group: [EntryPoint(name, value, group) for name, value in values])


def run_config(**env: Any) -> RunConfig:
    return RunConfig.model_validate({"model": "nano", "env": env})


@pytest.mark.parametrize(
    ("name", "options", "called"),
    [
        ("sums", {}, "simple"),
        ("made", {"sides": 8}, "dice 8"),
        ("made", {"sides": "8", "loaded": "yes"}, "dice 8"),
        ("Dice", {"sides": 8}, "Dice"),
        ("Settings", {"sides": 8}, "Dice"),
        ("Rewarded", {}, "Rewarded"),
    ],
)
def test_a_path_names_an_environment_or_what_makes_one_of_options(
    dice: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, options: dict[str, Any], called: str
) -> None:
    points(monkeypatch, ("dice", f"outside_dice:{name} [extra]"))
    for kind in (f"outside_dice:{name}", "dice"):
        config = run_config(kind=kind, options=options)
        env = config.env.build()
        assert env.name == called and env.splits == ("iid",) and env.canonical(" A b") == "a b"
        assert config.env.code == (f"outside_dice:{name}",) and config.code() == [provenance(f"outside_dice:{name}")]
        if name != "Rewarded":
            [task] = env.tasks("train", 1, 3)
            assert env.tasks("train", 1, 3) == [task] and env.grade(task, task.reference) == 1.0 and env.grade(task, None) == 0.0
        (tmp_path / "run.toml").write_text(dumps(config))
        assert load(RunConfig, tmp_path / "run.toml") == config
        assert load(RunConfig, "nano", [f"env.kind={kind}"]).env == OutsideSettings(kind=kind)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"kind": "dyce"}, "env.kind takes one of .*, package.module:name, .* .got 'dyce'."),
        ({"kind": "outside_dice:Dyce"}, "env.kind: outside_dice has no Dyce; did you mean Dice"),
        ({"kind": "no_such_package:Dice"}, "env.kind: there is no module 'no_such_package'"),
        ({"kind": "outside_dice:"}, "env.kind: 'outside_dice:' is not of the form package.module:name"),
        ({"kind": "outside_dice:number"}, "env.kind: outside_dice:number is of type int, neither an environment nor what makes one"),
        ({"kind": "outside_dice:Ungraded"}, "outside_dice:Ungraded is the class Ungraded, without grade; ramet.Environment has all but"),
        ({"kind": "builtins:int"}, "builtins:int is the class int, without tasks and grade"),
        ({"kind": "outside_dice:Dice", "sides": 8}, r"env: sides is no setting of ramet's; .* is given as env\.options\.sides"),
        ({"kind": "outside_dice:Dice", "options": {"side": 8}}, r"env\.options of outside_dice:Dice: side: .*; it takes sides"),
        ({"kind": "outside_dice:Dice", "options": {"sides": "six"}}, r"env\.options of outside_dice:Dice: sides: .* integer"),
        ({"kind": "outside_dice:Settings", "options": {"sides": "six"}}, r"env\.options of outside_dice:Settings: sides: .* integer"),
        ({"kind": "outside_dice:sums", "options": {"sides": 8}}, "is an environment as it stands, which takes no options"),
        ({"kind": "outside_dice:Dice", "options": 8}, r"env\.options takes a table"),
        ({"kind": "rows", "options": {}}, "env: options does not belong to the environment rows"),
    ],
)
def test_what_is_no_environment_is_one_line(dice: Any, tmp_path: Path, env: dict[str, Any], said: str) -> None:
    from ramet.runs.settings import validate

    with pytest.raises(ConfigError, match=said) as error:
        validate(RunConfig, {"model": "nano", "env": env})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"), [("Broken", "cannot be made: RuntimeError: no dice here"), ("nothing", "is of type int, without name and splits")]
)
def test_an_environment_that_cannot_be_made_is_one_line(dice: Any, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config(kind=f"outside_dice:{name}").env.build()


def test_a_broken_package_stops_only_those_who_ask_for_it(dice: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    twice = [("twice", "outside_dice:sums"), ("twice", "outside_dice:Dice")]
    points(monkeypatch, ("bad", "no_such_package:x"), ("rows", "outside_dice:sums"), *twice)
    registry._hides.cache_clear()
    assert env_settings("rows").build().name == "rows"
    assert "rows is ramet's own; there is also outside_dice:sums" in caplog.text
    with pytest.raises(ConfigError, match=r"env.kind: there is no module 'no_such_package'"):
        env_settings("bad")
    with pytest.raises(ConfigError, match="two environments called twice: outside_dice:sums and outside_dice:Dice; give one as "):
        env_settings("twice")


TASK = Task.ask("t", "q")


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ("raise", r"outside_dice:Tasks raised KeyError in tasks\('iid', 2, 0\): 'dice'"),
        (None, "raised TypeError in tasks"),
        ([1], "gives a int, not a Task"),
        ([], "gives 0 tasks"),
        ([TASK] * 3, "gives 3 tasks"),
        ([TASK] * 2, "two tasks of the split iid the id 't'"),
        ([Task("t", ())], "a task 't' whose messages are not a list of Message"),
        ([Task.ask("", "q")], "whose id is no text"),
        ([Task.ask("t", "\ud800")], "with '\\\\ud800', which is no character"),
        ([Task.ask("t", "q", {"a": "\udfff"})], "with '\\\\udfff', which is no character"),
        ([Task.ask("t", "q", {"a": b"x"})], "with a document that is neither text nor a part of a video"),  # type: ignore[dict-item]
    ],
)
def test_tasks_are_checked_as_they_come(dice: Any, gives: Any, said: str) -> None:
    dice.Tasks.gives = gives
    with pytest.raises(TaskError, match=f"the environment outside_dice:Tasks|{said}") as error:
        run_config(kind="outside_dice:Tasks").env.build().tasks("iid", 2, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grade", [float("nan"), "1", None, KeyError("x"), SystemExit(1)])
def test_grades_are_checked_as_they_come(dice: Any, grade: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, task: Task, answer: str | None, metric: str | None = None) -> Any:
        if isinstance(grade, BaseException):
            raise grade
        return grade

    monkeypatch.setattr(dice.Dice, "grade", broken)
    with pytest.raises((RewardError, TaskError)) as error:
        run_config(kind="outside_dice:Dice").env.build().grade(TASK, "1")
    assert isinstance(error.value, RametError) and "t" in str(error.value)


def test_the_instruction_is_the_environments_own_or_the_usual_one(dice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = run_config(kind="outside_dice:sums").env
    assert settings.language and "Answer:" in settings.instruction(True)
    monkeypatch.setattr(dice.sums, "instruction", "")
    assert not settings.language and settings.instruction(True) == ""


def test_what_is_wrong_with_tasks_or_a_reward_is_said_before_a_model_is_loaded(dice: Any) -> None:
    from ramet.runs.commands import data_records

    dice.Tasks.gives = "raise"
    with pytest.raises(TaskError, match="outside_dice:Tasks raised KeyError"):
        data_records(run_config(kind="outside_dice:Tasks"), training=True)
    config = load(RunConfig, "nano", ["reward.function=outside_dice:made"])
    with pytest.raises(ConfigError, match=r"reward.function: outside_dice has no judge"):
        data_records(load(RunConfig, "nano", ["reward.function=outside_dice:judge"]))
    assert data_records(config) == []
