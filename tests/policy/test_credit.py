"""Credit estimators against the exact policy gradient of a game small enough to enumerate.

The game: the root answers 0, answers 1, or spawns two clones. Each clone says 0 or 1. The root then answers
0 or 1, knowing what both said. One softmax per information state; the reward is any function of
the tree. Everything is enumerated in float64: no sampling, no tolerance beyond rounding.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from ramet.agents.tree import Branch, Status, StopReason, Task, Tree, Turn, price
from ramet.errors import ConfigError
from ramet.policy.training.advantages import REPAIRS, SPREAD_FLOOR, ScoredTree, branch_mean, gated, grpo, ratio, rloo, selfcest
from ramet.policy.training.reward import Reward
from ramet.policy.training.update import TrainConfig, compute_advantages

STATES = {"root": 3, "clone0": 2, "clone1": 2, **{f"end{a}{b}": 2 for a in (0, 1) for b in (0, 1)}}


@dataclass(frozen=True)
class Leaf:
    """One outcome of the game: its tree, the (state, action) pairs of each branch, and its reward."""

    tree: Tree
    actions: tuple[tuple[tuple[str, int], ...], ...]
    reward: float


def turn(action: int, clones: tuple[Branch, ...] = ()) -> Turn:
    return Turn((action,), (0.0,), StopReason.END, clones=clones)


def branch(name: str, turns: tuple[Turn, ...]) -> Branch:
    return Branch(name, (), turns, Status.ANSWERED, str(turns[-1].sampled[0]))


def leaves(rng: np.random.Generator) -> list[Leaf]:
    found = []
    for action in (0, 1):
        root = branch("0", (turn(action),))
        found.append(Leaf(Tree("game", root, price(root)), ((("root", action),),), rng.normal()))
    for a, b, end in itertools.product((0, 1), repeat=3):
        clones = (branch("0.0", (turn(a),)), branch("0.1", (turn(b),)))
        root = branch("0", (turn(2, clones), turn(end)))
        actions = ((("root", 2), (f"end{a}{b}", end)), (("clone0", a),), (("clone1", b),))
        found.append(Leaf(Tree("game", root, price(root)), actions, rng.normal()))
    return found


def policy(rng: np.random.Generator) -> dict[str, np.ndarray]:
    tables = {}
    for state, size in STATES.items():
        p = np.exp(rng.normal(size=size))
        tables[state] = p / p.sum()
    return tables


def log_gradient(tables, state, action) -> np.ndarray:
    gradient = -tables[state].copy()
    gradient[action] += 1
    return gradient


def probability(tables, leaf) -> float:
    return float(np.prod([tables[s][a] for branch_ in leaf.actions for s, a in branch_]))


def term(tables, leaf, advantages) -> dict[str, np.ndarray]:
    """sum over branches of A_b * sum over actions of the log-probability gradient."""
    total = defaultdict(lambda: 0.0)
    for advantage, actions in zip(advantages, leaf.actions, strict=True):
        for state, action in actions:
            total[state] = total[state] + advantage * log_gradient(tables, state, action)
    return total


def exact(tables, game) -> dict[str, np.ndarray]:
    total = {state: np.zeros(size) for state, size in STATES.items()}
    for leaf in game:
        for state, value in term(tables, leaf, [leaf.reward] * len(leaf.actions)).items():
            total[state] += probability(tables, leaf) * value
    return total


def expected(tables, game, estimator, size) -> dict[str, np.ndarray]:
    """The estimator's expectation over all groups of `size` independent trees."""
    total = {state: np.zeros(n) for state, n in STATES.items()}
    for group in itertools.product(game, repeat=size):
        p = np.prod([probability(tables, leaf) for leaf in group])
        advantages = estimator([ScoredTree(leaf.tree, leaf.reward, texts=("answer:",) * len(leaf.actions)) for leaf in group])
        for leaf, a in zip(group, advantages, strict=True):
            for state, value in term(tables, leaf, a).items():
                total[state] += p * value / size
    return total


def distance(a, b) -> float:
    return max(float(np.abs(a[state] - b[state]).max()) for state in STATES)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rloo_is_unbiased(seed, size):
    rng = np.random.default_rng(seed)
    game, tables = leaves(rng), policy(rng)
    assert sum(probability(tables, leaf) for leaf in game) == pytest.approx(1)
    assert distance(expected(tables, game, rloo, size), exact(tables, game)) < 1e-12


def test_branch_mean_has_the_bias_that_it_states():
    rng = np.random.default_rng(0)
    game, tables = leaves(rng), policy(rng)
    got = expected(tables, game, branch_mean, 2)
    assert distance(got, exact(tables, game)) > 0.01
    # Each tree's log-probability gradient is scaled by 1/N of its own branches, baseline included.
    mean = sum(probability(tables, leaf) * leaf.reward for leaf in game)
    scaled = {state: np.zeros(n) for state, n in STATES.items()}
    for leaf in game:
        n = len(leaf.actions)
        for state, value in term(tables, leaf, [(leaf.reward - mean) / n] * n).items():
            scaled[state] += probability(tables, leaf) * value
    assert distance(got, scaled) < 1e-12


def test_grpo_divides_by_the_spread_and_is_biased_for_it():
    rng = np.random.default_rng(2)
    game, tables = leaves(rng), policy(rng)
    tree = game[0].tree
    rewards = (1.0, 0.0, 0.5, 0.7)
    got = grpo([ScoredTree(tree, r) for r in rewards])
    by_hand = (np.array(rewards) - np.mean(rewards)) * 4 / 3 / (np.std(rewards, ddof=1) + SPREAD_FLOOR)
    assert [advantages[0] for advantages in got] == pytest.approx(by_hand)
    flat = lambda g: np.concatenate([g[s] for s in STATES])  # noqa: E731
    mine, truth = flat(expected(tables, game, grpo, 2)), flat(exact(tables, game))
    cosine = mine @ truth / np.linalg.norm(mine) / np.linalg.norm(truth)
    assert 0.5 < cosine < 0.999
    equal = grpo([ScoredTree(tree, 0.3)] * 3)
    assert all(a == 0 for advantages in equal for a in advantages)


def test_selfcest_is_biased_and_moves_with_the_origin_of_the_reward():
    rng = np.random.default_rng(1)
    game, tables = leaves(rng), policy(rng)
    halved = lambda group: selfcest(group, clone_scale=1 / 2.5)  # noqa: E731
    got = expected(tables, game, halved, 2)
    truth = exact(tables, game)
    # Even up to scale (it divides by a standard deviation) it is another direction.
    flat = lambda g: np.concatenate([g[s] for s in STATES])  # noqa: E731
    cosine = flat(got) @ flat(truth) / np.linalg.norm(flat(got)) / np.linalg.norm(flat(truth))
    assert cosine < 0.99
    shifted = [Leaf(leaf.tree, leaf.actions, leaf.reward + 5.0) for leaf in game]
    assert distance(expected(tables, shifted, rloo, 2), truth) < 1e-12
    repaired = lambda group: selfcest([ScoredTree(i.tree, i.reward, 0.3, i.texts) for i in group])  # noqa: E731
    before, after = expected(tables, game, repaired, 2), expected(tables, shifted, repaired, 2)
    assert np.linalg.norm(after["clone0"] - before["clone0"]) > 0.1 * np.linalg.norm(before["clone0"])


def test_selfcest_ratio_golden_values():
    assert ratio(1.0, 1.0) == 1.0
    assert ratio(1.0, 1.0 / 2.5) == pytest.approx(0.4)
    assert ratio(0.7, 0.0) == 0.0
    assert ratio(0.0, 0.05) == 1.5  # r = 0 counts as positive and saturates
    # S = 0.04 with one repair of 0.05: c = 0.04, r = -0.01 flips the sign and saturates.
    assert ratio(0.04 - 0.05, 0.04) == -1.5
    assert ratio(-0.2, -0.2) == 1.0


def test_selfcest_advantages_by_hand():
    rng = np.random.default_rng(0)
    tree = leaves(rng)[2].tree
    texts = ("root", "Answer: 1", "no mark")
    group = [ScoredTree(tree, r, texts=texts) for r in (1.0, 0.0, 0.5, 0.5)]
    std = np.std([1.0, 0.0, 0.5, 0.5], ddof=1) + 1e-6
    got = selfcest(group)
    assert got[0] == pytest.approx([0.5 / std] * 3)
    assert got[1] == pytest.approx([-0.5 / std, 0.0, 0.0])  # r = 0 silences the clones of a wrong tree
    assert got[2] == [0.0, 0.0, 0.0]


def test_what_scales_and_repairs_reaches_the_selfcest_estimator():
    """By hand: mathematics (a clone's reward is r / 2.5), one root with a repaired call, which its clones do not pay for."""
    tree = leaves(np.random.default_rng(0))[2].tree
    task, chat = Task("game", ()), SimpleNamespace(text=lambda ids: "Answer: 1")
    verdicts = [Reward(1.0, {REPAIRS: 0.05}, 0.95), Reward(1.0, {}, 1.0), Reward(0.0, {}, 0.0), Reward(0.5, {}, 0.5)]
    (got,) = compute_advantages([(task, [tree] * 4)], [verdicts], "selfcest", chat, clone_scale=1 / 2.5)
    rewards = np.array([0.95, 1.0, 0.0, 0.5])
    roots = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    clones = roots * np.array([1.0 / 2.5 / 0.95, 0.4, 0.0, 0.4])
    assert [a[0] for a in got] == pytest.approx(roots.tolist()) and [a[1] for a in got] == pytest.approx(clones.tolist())
    with pytest.raises(ValueError, match="clone_scale belongs to the estimator selfcest; rloo gives"):
        TrainConfig(clone_scale=0.4)


def test_gate_needs_both_length_and_a_missing_mark():
    long = Branch("0.0", (), (Turn((5,) * 193, (0.0,) * 193, StopReason.LENGTH),), Status.OUT_OF_BUDGET, None)
    short = Branch("0.0", (), (Turn((5,) * 192, (0.0,) * 192, StopReason.LENGTH),), Status.OUT_OF_BUDGET, None)
    assert gated(long, "no mark") and not gated(long, "ANSWER: 3") and not gated(short, "no mark")


@pytest.mark.parametrize("size", range(2, 12))
@pytest.mark.parametrize("estimator", [rloo, grpo, branch_mean, selfcest])
def test_equal_rewards_teach_exactly_nothing(estimator, size):
    """Their mean may be rounded (three times 0.1); what is left of that is no signal, and no clone's ratio scales it."""
    trees = [leaf.tree for leaf in leaves(np.random.default_rng(0))]
    for reward in (0.1, 0.7, 1 / 3, -0.88, 1e-9, 1.0):
        group = [ScoredTree(tree, reward, texts=("",) * len(tree.branches)) for tree in itertools.islice(itertools.cycle(trees), size)]
        assert all(a == 0 for advantages in estimator(group) for a in advantages)
    group = [ScoredTree(tree, 0.1 + 1e-9 * (n == 0), texts=("",) * len(tree.branches)) for n, tree in enumerate(trees[:size])]
    assert all(a != 0 for advantages in estimator(group) for a in advantages)


def test_a_group_of_one_has_no_baseline():
    tree = leaves(np.random.default_rng(0))[0].tree
    for estimator in (rloo, grpo, branch_mean, selfcest):
        with pytest.raises(ConfigError, match="at least two"):
            estimator([ScoredTree(tree, 1.0, texts=("",))])
