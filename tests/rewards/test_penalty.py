"""More score never earns less, in every environment, whatever the prices."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.tree import Branch, Status, Task, Tree, Usage
from ramet.config import EnvConfig
from ramet.errors import RewardError
from ramet.rewards.penalty import Prices, scored

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


def environments(folder) -> list[tuple[EnvConfig, str]]:
    made = [(EnvConfig(kind="rows"), "iid"), (EnvConfig(kind="reference"), "iid"), (EnvConfig(kind="gym", task="leg_counting"), "iid")]
    for kind, row in ROWS.items():
        path = folder / f"{kind}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        made += [(EnvConfig(kind=kind, data=str(path), **({"metric": "f1"} if kind == "hotpotqa" else {})), "iid")]
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
    env = EnvConfig(kind="reference").build()
    assert 0 < env.grade(task, "7") < env.grade(task, "42") and env.grade(task, "no idea") == 0
    price = {"generated": 0.25}
    assert scored(tree(), env.grade(task, "7"), price, 0.0) == scored(tree(), env.grade(task, "no idea"), price, 0.0) == 0.0


@pytest.mark.parametrize(("score", "cost"), [(float("nan"), 0.0), (float("inf"), 0.0), (0.0, float("nan")), (1.0, float("inf"))])
@pytest.mark.parametrize("failure", ["priced", 0.0])
def test_what_is_not_finite_is_an_error_and_not_a_failure(score, cost, failure):
    with pytest.raises(RewardError, match="task t is not finite"):
        scored(tree(), score, {"a": cost}, failure)


def test_prices_are_of_the_whole_tree():
    assert Prices(generated=0.5, clones=0.25).penalties(tree(3)) == {"generated": 1.5, "clones": 0.0}
