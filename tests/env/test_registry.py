"""Each environment brings its own settings; the section `[env]` is one of them, told apart by its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramet.env.registry import KINDS, env_settings
from ramet.errors import ConfigError
from ramet.runs.settings import RunConfig, dumps, load, validate


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
