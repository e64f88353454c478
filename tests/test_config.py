"""Configuration: what cannot be meant is refused in one line that names the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.budget import Budget
from ramet.attention.methods import Method
from ramet.env.registry import env_settings
from ramet.errors import ConfigError
from ramet.policy.training.update import TrainConfig
from ramet.rewards.penalty import Prices
from ramet.runs.presets import preset_names, source_name
from ramet.runs.renamed import KEYS, VALUES
from ramet.runs.settings import EvalConfig, RunConfig, load, traced, write
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
        ("eval.budgets=48,96", "eval.budgets takes a list in brackets, such as [256, 512, 1024], of whole numbers from 1 on (got '48,96')"),
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
        load(RunConfig, "nano", [override])
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
    for path, overrides in (("nano", [override]), (tmp_path / "old.toml", [])):
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
    default = load(RunConfig, "nano")
    changed = load(RunConfig, "nano", ["train.updates=50", "penalty.generated=0.5", "budget.seconds=60"])
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
    (tmp_path / "good.toml").write_text('model = "nano"\nseed = 4\nenv = { kind = "rows" }\n[budget]\nwidth = "unlimited"\n')
    assert load(RunConfig, tmp_path / "good.toml", ["seed=5"]).seed == 5
    assert load(RunConfig, tmp_path / "good.toml").budget.width is None
    (tmp_path / "marked.toml").write_text('\ufeffmodel = "modèle"\nenv = { kind = "rows" }\n', encoding="utf-8")
    assert load(RunConfig, tmp_path / "marked.toml").model == "modèle"


EXAMPLES = sorted(str(path) for path in (Path(__file__).parents[1] / "examples").glob("*.toml"))


@pytest.mark.parametrize("source", [*preset_names(), *EXAMPLES], ids=lambda source: Path(source).name)
def test_a_recipe_says_all_that_it_relies_on(source):
    """Nothing that is sampled, trained or measured with comes from a default, so a default can change without changing a recipe."""
    _, origins = traced(source)
    unset = {"train.dual_clip", "train.clone_scale"}  # off, and of another estimator
    for name, origin in origins.items():
        if name in ("model", "budgets", "tell_budget") or name.startswith(("budget.", "penalty.", "train.", "eval.")):
            assert origin == source_name(source) or name in unset, name


def test_the_defaults_are_no_recipe():
    config = RunConfig.model_validate({"model": "m", "env": {"kind": "gsm8k"}})
    train = config.train
    assert (train.temperature, train.kl_coef, train.estimator, train.lr_decay, train.max_grad_norm) == (1.0, 0.0, "rloo", 0.0, 1.0)
    assert train.learning_rate == 1e-6 and config.budgets == () and config.budget == Budget() and config.budget.context is None
    assert (config.train, config.eval, config.penalty) == (TrainConfig(), EvalConfig(), Prices())


@pytest.mark.parametrize(("text", "missing"), [("seed = 1", "model is missing"), ('model = "nano"', "env is missing"), ("", "model is")])
def test_a_config_without_a_model_or_an_environment_is_one_line(tmp_path, text, missing):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=missing) as error:
        load(RunConfig, tmp_path / "run.toml")
    assert "\n" not in str(error.value) and "begin from a preset: demo, hotpotqa, " in str(error.value)


def test_an_unknown_preset_lists_the_presets_and_the_closest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nanno").write_text("")
    with pytest.raises(ConfigError, match=r"'nanno'; did you mean 'nano'\? there are demo, .*; a file is given as nanno\.toml or"):
        load(RunConfig, "nanno")
    with pytest.raises(ConfigError, match="model is missing"):
        load(RunConfig, "./nanno")


def test_another_environment_than_the_presets_begins_with_its_own_defaults():
    config = load(RunConfig, "hotpotqa", ["env.data=x.jsonl", "env.kind=gsm8k"])
    assert config.env == env_settings("gsm8k", data="x.jsonl")
    assert load(RunConfig, "hotpotqa", ["env.kind=hotpotqa"]).env.metric == "f1", "the same one keeps what the preset says"
    assert load(RunConfig, "hotpotqa", ["env.kind=musique"]).env.metric == "em"


def test_every_setting_says_what_it_takes_and_its_value_is_of_that_kind():
    values = load(RunConfig, "nano").model_dump(mode="json")
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
    config = RunConfig(model="nano", seed=3, env=env_settings(), budget=budget)
    write(config, path)
    assert load(RunConfig, path) == config


@given(st.text(max_size=60))
def test_any_override_is_read_or_refused(text):
    try:
        load(RunConfig, "nano", [text])
    except ConfigError as error:
        assert str(error)


def test_the_settings_of_attention_are_those_of_the_method_that_they_build():
    config = load(RunConfig, "nano", ["attention.method=spava", "attention.anchor=8", "attention.passing=3"])
    assert config.attention.build() == Method("spava", anchor=8, passing=3)
    assert config.attention.model_copy(update={"method": "apb", "anchor": None, "passing": None}).build() == Method("apb")
