"""Configuration: what cannot be meant is refused in one line that names the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.budget import Budget
from ramet.errors import ConfigError
from ramet.runs.renamed import KEYS, VALUES
from ramet.runs.settings import RunConfig, load, traced, write
from ramet.schema import Settings, takes


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.updatez=3", "unknown key 'train.updatez'; did you mean 'updates'"),
        ("foo=1", "unknown key 'foo'; there are model"),
        ("train.updates=0", "train.updates takes a whole number from 1 on (got 0)"),
        ("train.updates=many", "train.updates takes a whole number from 1 on (got 'many')"),
        ("train=5", "train takes a section, with updates, "),
        ("budget.generated=0", "budget.generated is 0"),
        ("budget.turns=0", "budget.turns is 0"),
        ("budget.seconds=0", "budget.seconds is 0"),
        ("budget.generated=5", "both limit generated tokens"),
        ("budget.depth=-1", "budget.depth takes a whole number from 0 on (got -1)"),
        ("budgets=[0]", "budgets.0 takes a whole number from 1 on (got 0)"),
        ("eval.budgets=48,96", "eval.budgets takes a list in brackets, such as [48, 64, 96], of whole numbers from 1 on (got '48,96')"),
        ("env.operands=[5,2]", "the smaller first"),
        ("env.operands=5", "such as [2, 24], of 2 whole numbers (got 5)"),
        ("env={kind='gsm8k', fields=3}", "env.fields takes a table in braces, such as {name = value} (got 3)"),
        ("env={kind='selfcest', graded='maybe'}", "env.graded takes true or false (got 'maybe')"),
        ("penalty.generated=-0.1", "penalty.generated takes a number from 0 on (got -0.1)"),
        ("penalty.generated=nan", "penalty.generated"),
        ("penalty.failure=zero", "penalty.failure takes a number of at most 0 or 'priced' (got 'zero')"),
        ("train.estimator=best", "train.estimator takes one of rloo, "),
        ("model=[1]", "model takes text (got [1])"),
        ("seed", "is not of the form"),
        (".x=1", "is not of the form"),
        ("seed.x=1", "seed takes a whole number"),
    ],
)
def test_overrides_that_cannot_be_meant(override, says):
    with pytest.raises(ConfigError) as error:
        load(RunConfig, None, [override])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not re.search(r"Input should|constrained|literal\[|valid (?:tuple|dictionary)", str(error.value))


@pytest.mark.parametrize(
    ("override", "says"),
    [(f"{old}=1", f"{old} is now called {new}") for old, new in KEYS.items()]
    + [(f"{key}={old}", f'{key} = "{old}" is now called "{new}"') for (key, old), new in VALUES.items()],
)
def test_a_setting_that_was_renamed_says_its_new_name(tmp_path, override, says):
    key, _, value = override.partition("=")
    section, _, name = key.rpartition(".")
    (tmp_path / "old.toml").write_text(f"{f'[{section}]' if section else ''}\n{name} = '{value}'\n")
    for path, overrides in ((None, [override]), (tmp_path / "old.toml", [])):
        with pytest.raises(ConfigError) as error:
            load(RunConfig, path, overrides)
        assert str(error.value) == says


def test_the_new_names_are_settings():
    properties = Settings(RunConfig)
    for name in KEYS.values():
        assert properties.at(name.split("."))[0] == name
    for (key, old), new in VALUES.items():
        allowed = takes(properties.at(key.split("."))[1]).replace(",", "").split()
        assert new in allowed and old not in allowed


def test_giving_one_key_of_a_section_leaves_its_others_as_they_are(tmp_path):
    default = RunConfig()
    changed = load(RunConfig, None, ["train.updates=50", "penalty.generated=0.5", "budget.seconds=60"])
    assert changed.train == default.train.model_copy(update={"updates": 50})
    assert changed.penalty == default.penalty.model_copy(update={"generated": 0.5})
    assert changed.budget == default.budget.model_copy(update={"seconds": 60.0})


def test_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read config"):
        load(RunConfig, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seed = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(RunConfig, tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(RunConfig, tmp_path / "binary.toml")
    (tmp_path / "good.toml").write_text('seed = 4\n[budget]\nwidth = "unlimited"\n')
    assert load(RunConfig, tmp_path / "good.toml", ["seed=5"]).seed == 5
    assert load(RunConfig, tmp_path / "good.toml").budget.width is None
    (tmp_path / "marked.toml").write_text('\ufeffmodel = "modèle"\n', encoding="utf-8")
    assert load(RunConfig, tmp_path / "marked.toml").model == "modèle"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_an_example_says_itself_what_the_recipe_of_the_nano_model_would_say_else(path):
    default = RunConfig()
    own = ["model", "budgets", "eval.tasks", "eval.budgets", "eval.ood_budgets"]
    for section in ("budget", "penalty", "train"):
        chosen = getattr(default, section)
        own += [f"{section}.{name}" for name, value in chosen if value != type(chosen).model_fields[name].default]
    _, origins = traced(path)
    assert "train.temperature" in own and not [name for name in own if origins[name] == "default"]


def test_every_setting_says_what_it_takes_and_its_value_is_of_that_kind():
    values = RunConfig().model_dump(mode="json")
    for name, schema in Settings(RunConfig).of(values):
        value = values
        for key in name.split("."):
            value = value[key]
        said = takes(schema)
        assert said and "another value" not in said, name
        assert Settings(RunConfig).at(name.split(".")) == (name, schema)
        if isinstance(value, list):
            assert "a list in brackets" in said
        elif isinstance(value, bool):
            assert said == "true or false"
        elif isinstance(value, int):
            assert "number" in said or str(value) in said


@given(
    st.builds(
        Budget,
        prefilled=st.none() | st.integers(1, 9),
        width=st.none() | st.integers(0, 9),
        turns=st.none() | st.integers(1, 9),
        depth=st.none() | st.integers(0, 3),
        seconds=st.none() | st.floats(0.1, 10),
    )
)
def test_what_is_written_reads_back_the_same(tmp_path_factory, budget):
    path = tmp_path_factory.mktemp("config") / "run.toml"
    config = RunConfig(seed=3, budget=budget)
    write(config, path)
    assert load(RunConfig, path) == config


@given(st.text(max_size=60))
def test_any_override_is_read_or_refused(text):
    try:
        load(RunConfig, None, [text])
    except ConfigError as error:
        assert str(error)
