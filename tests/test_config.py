"""Configuration: what cannot be meant is refused in one line that names the key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.budget import Budget
from ramet.config import RunConfig, load, write
from ramet.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.updatez=3", "unknown key 'train.updatez'; did you mean 'updates'"),
        ("foo=1", "unknown key 'foo'; there are model"),
        ("train.updates=0", "train.updates: Input should be greater than or equal to 1"),
        ("budget.generated=0", "budget.generated is 0"),
        ("budget.turns=0", "budget.turns is 0"),
        ("budget.seconds=0", "budget.seconds is 0"),
        ("budget.generated=5", "both limit generated tokens"),
        ("budget.depth=-1", "budget.depth"),
        ("budgets=[0]", "budgets.0"),
        ("env.operands=[5,2]", "the smaller first"),
        ("reward.generated=-0.1", "reward.generated"),
        ("reward.generated=nan", "reward.generated"),
        ("train.estimator=best", "train.estimator"),
        ("seed", "is not of the form"),
        (".x=1", "is not of the form"),
        ("seed.x=1", "seed"),
    ],
)
def test_overrides_that_cannot_be_meant(override, says):
    with pytest.raises(ConfigError) as error:
        load(RunConfig, None, [override])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_giving_one_key_of_a_section_leaves_its_others_as_they_are(tmp_path):
    default = RunConfig()
    changed = load(RunConfig, None, ["train.updates=50", "reward.generated=0.5", "budget.seconds=60"])
    assert changed.train == default.train.model_copy(update={"updates": 50})
    assert changed.reward == default.reward.model_copy(update={"generated": 0.5})
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
