"""More score never earns less, in every environment, whatever the prices."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.tree import Branch, Status, StopReason, Task, Tree, Turn, Usage, price
from ramet.env.registry import env_settings
from ramet.env.settings import EnvSettings
from ramet.errors import RewardError
from ramet.rewards.penalty import Prices, scored
from ramet.runs.build import learning_problem
from ramet.runs.settings import RunConfig, validate

ROWS = {
    "gsm8k": {"question": "How many?", "answer": "12 and 30.\n#### 42"},
    "math": {"problem": "How many?", "solution": "They are \\boxed{42}.", "level": "Level 1", "type": "Algebra"},
    "hotpotqa": {
        "_id": "h", "question": "Who?", "answer": "Ann of the Hall", "supporting_facts": [["A", 0]],
        "context": [["A", ["Ann of the Hall."]], ["B", ["Nothing."]]],
    },
}  # fmt: skip
SAID = (None, "", "no idea", "7", "40", "42", "Ann", "Ann of the Hall", "0")
COSTS = (0.0, 0.05, 0.2, 0.7, 3.0)


def tree(generated: int = 0) -> Tree:
    return Tree("t", Branch("0", (), (), Status.ANSWERED, "1"), Usage(generated=generated))


def environments(folder) -> list[tuple[EnvSettings, str]]:
    made = [(env_settings("rows"), "iid"), (env_settings("selfcest"), "iid"), (env_settings("gym", task="leg_counting"), "iid")]
    for kind, row in ROWS.items():
        path = folder / f"{kind}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        made += [(env_settings(kind=kind, data=str(path), **({"metric": "f1"} if kind == "hotpotqa" else {})), "iid")]
    return made


def test_in_every_environment_more_score_never_earns_less(tmp_path):
    for config, split in environments(tmp_path):
        env = config.build()
        task = env.tasks(split, 1, 0)[0]
        grades = sorted({env.grade(task, answer) for answer in (*SAID, str(task.reference))})
        assert grades[0] == 0.0 and len(grades) > 1, config.kind
        for failure, (less, more), cost, other in itertools.product(("priced", 0.0, -0.5), itertools.combinations(grades, 2), COSTS, COSTS):
            earned = scored(tree(), more, {"generated": cost}, failure)
            assert earned >= scored(tree(), less, {"generated": cost}, failure)
            if less == 0:
                assert earned >= scored(tree(), less, {"generated": other}, failure), config.kind


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 9), st.floats(0, 9), st.one_of(st.just("priced"), st.floats(-2, 0)))
def test_the_rule(one, other, cost, other_cost, failure):
    less, more = sorted((one, other))
    assert scored(tree(), more, {"a": cost}, failure) >= scored(tree(), less, {"a": cost}, failure)
    if more > 0:
        assert scored(tree(), more, {"a": cost}, failure) >= scored(tree(), 0.0, {"a": other_cost}, failure)
    assert scored(tree(), one, {"a": min(cost, other_cost)}, failure) >= scored(tree(), one, {"a": max(cost, other_cost)}, failure)


def test_a_wrong_number_is_worth_what_no_idea_is_and_not_less(tmp_path):
    """Where a wrong number earns partial credit that its price exceeds."""
    task = Task("t", (), reference=42)
    env = env_settings(kind="selfcest").build()
    assert 0 < env.grade(task, "7") < env.grade(task, "42") and env.grade(task, "no idea") == 0
    cost = {"generated": 0.25}
    assert scored(tree(), env.grade(task, "7"), cost, 0.0) == scored(tree(), env.grade(task, "no idea"), cost, 0.0) == 0.0


@pytest.mark.parametrize(("score", "cost"), [(float("nan"), 0.0), (float("inf"), 0.0), (0.0, float("nan")), (1.0, float("inf"))])
@pytest.mark.parametrize("failure", ["priced", 0.0])
def test_what_is_not_finite_is_an_error_and_not_a_failure(score, cost, failure):
    with pytest.raises(RewardError, match="task t is not finite"):
        scored(tree(), score, {"a": cost}, failure)


def test_prices_are_of_the_whole_tree():
    assert Prices(generated=0.5, clones=0.25).penalties(tree(3)) == {"generated": 1.5, "clones": 0.0}


def lengths(root: int, clone: int = 0, calls: int = 0) -> Tree:
    """A root of `root` tokens whose first `calls` turns each start a clone of `clone` tokens."""

    def said(count: int, *clones: Branch) -> Turn:
        return Turn((5,) * count, (0.0,) * count, StopReason.END, clones=clones)

    turns = [said(0, Branch(f"0.{n}", (), (said(clone),), Status.ANSWERED, "1")) for n in range(calls)]
    branch = Branch("0", (), (*turns, said(root)), Status.ANSWERED, "1")
    return Tree("t", branch, price(branch))


@pytest.mark.parametrize(
    ("root", "clone", "calls", "score", "plain", "maths"),
    [
        (512, 512, 2, 1.0, 1.0, 1.0),
        (768, 0, 0, 1.0, 1 - 0.190, 1 - 0.190),
        (1024, 0, 0, 0.0, -0.259, 0.0),
        (1024, 1024, 1, 1.0, 1 - 0.259 - 0.126, 1 - 0.259 - 0.126),
        (2048, 1024, 6, 0.1, 0.1 - 0.299 - 0.126 - 0.4, 0.0),
        (2048, 4096, 1, 1.0, 1 - 0.299 - 0.200, 1 - 0.499),
        (100_000, 100_000, 1, 1.0, 1 - 0.3 - 0.2, 0.5),
        (0, 0, 5, 0.04, 0.04 - 0.3, 0.04),
    ],
)
def test_the_presets_are_the_releases_formulas(root, clone, calls, score, plain, maths):
    """Golden values computed with the SELFCEST release's formulas, negative ones included: rewards have no floor."""
    grown = lengths(root, clone, calls)
    for preset, wanted in (("selfcest", plain), ("selfcest_maths", maths)):
        prices = Prices(preset=preset)
        assert prices.reward(grown, score, prices.penalties(grown)) == pytest.approx(wanted, abs=1.1e-3)
        dearer = Prices(preset=preset, clones=0.01)
        assert dearer.reward(grown, score, dearer.penalties(grown)) == pytest.approx(wanted - 0.01 * calls, abs=1.1e-3)


def test_a_preset_has_its_own_rule_for_failures():
    with pytest.raises(ValueError, match='the preset selfcest has its own rule for failures; set failure to "priced"'):
        Prices(preset="selfcest", failure=0.0)


def test_what_training_earns_under_a_preset_is_its_formula():
    config = validate(RunConfig, {"model": "nano", "env": {"kind": "rows"}, "penalty": {"preset": "selfcest"}})
    verdict = learning_problem(config, len).reward_function(Task("t", (), reference=2), lengths(1024, 0, 5))
    assert verdict.reward == pytest.approx(verdict.score - 0.259 - 0.3, abs=1e-3) and verdict.reward < 0
