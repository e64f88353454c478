"""Each environment brings its own settings; the section `[env]` is one of them, told apart by its kind."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ramet.env import registry
from ramet.env.registry import KINDS, env_settings
from ramet.errors import ConfigError
from ramet.runs.settings import RunConfig, dumps, load, validate

OUTSIDE = """
from typing import Literal
from ramet.env.arithmetic import SelfcestEnvironment
from ramet.env.settings import EnvSettings, words

class {name}(EnvSettings):
    kind: Literal["{kind}"] = "{kind}"
    sides: int = 6

    def build(self, count=words):
        return SelfcestEnvironment(name="{kind}")
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.kind=gsm8k", "env.seconds=2.0"], "env: seconds does not belong to the environment gsm8k, which takes data, train, "),
        (["env.task=leg_counting"], "env: task does not belong to the environment rows, which takes operands, ood_operands, row, largest"),
        (["env.kind=gsm8k", "env.levals=[5]"], "unknown key 'env.levals'; did you mean 'levels'?"),
        (["env.kind=gsm8k", "env.levels=[9]"], "env.levels.0 takes a whole number from 1 to 5 (got 9)"),
        (["env.kind=gsm9k"], "env.kind takes one of "),
        (["env.kind=3"], "env.kind takes one of "),
        (["env.kind=[1]"], "env.kind takes one of "),
        (["env=5"], "env takes a section, with kind (one of "),
        (["env.kind=gym"], "names no task of reasoning-gym"),
    ],
)
def test_what_an_environment_does_not_take_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(RunConfig, "nano", overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_hold_their_own_options_only_and_read_back_the_same(kind: str, tmp_path: Path) -> None:
    options = {"task": "leg_counting"} if kind == "gym" else {}
    config = validate(RunConfig, {"model": "nano", "env": {"kind": kind, **options}})
    assert config.env == env_settings(kind, **options) and type(config.env) is KINDS[kind]
    assert set(config.model_dump()["env"]) == set(KINDS[kind].model_fields)
    path = tmp_path / "run.toml"
    path.write_text(dumps(config))
    assert load(RunConfig, path) == config


def bring(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str, value: str) -> None:
    (folder / "outside_dice.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "outside_dice", raising=False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("dice", value, group)])


def test_another_package_brings_an_environment_by_an_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bring(monkeypatch, tmp_path, OUTSIDE.format(name="Dice", kind="dice"), "outside_dice:Dice")
    kinds: Any = registry._load_kinds()
    assert kinds["dice"]().build().name == "dice" and set(KINDS) < set(kinds)


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import nothing_of_this_name", "outside_dice:Dice", "the environment dice cannot be imported from outside_dice:Dice: "),
        ("Dice = 3", "outside_dice:Dice", "is not a subclass of EnvSettings"),
        (OUTSIDE.format(name="Dice", kind="rows"), "outside_dice:Dice", "there is an environment rows already"),
    ],
)
def test_an_entry_point_that_brings_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, value: str, message: str
) -> None:
    bring(monkeypatch, tmp_path, source, value)
    with pytest.raises(ConfigError) as error:
        registry._load_kinds()
    assert message in str(error.value) and "\n" not in str(error.value)
