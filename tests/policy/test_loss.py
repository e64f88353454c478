"""The loss against its formula, token by token in float64, and rows against their trees."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from ramet.agents.tree import Branch, Status, StopReason, Tree, Turn, price
from ramet.policy.training.loss import policy_loss
from ramet.policy.training.rows import batches, rows_of, token_logprobs


def random_branch(rng: random.Random, name: str, depth: int) -> Branch:
    turns = []
    for _ in range(rng.randint(1, 3)):
        n = rng.randint(0, 6)
        clones = tuple(random_branch(rng, f"{name}.{i}", depth - 1) for i in range(rng.randint(0, 3))) if depth else ()
        sampled = tuple(rng.randrange(100) for _ in range(n))
        turns.append(
            Turn(
                sampled,
                tuple(-rng.random() for _ in range(n)),
                StopReason.END,
                appended=tuple(rng.randrange(100) for _ in range(rng.randint(0, 4))),
                clones=clones,
            )
        )
    return Branch(name, tuple(rng.randrange(100) for _ in range(rng.randint(1, 5))), tuple(turns), Status.ANSWERED, "1")


@pytest.mark.parametrize("seed", range(20))
def test_every_sampled_token_is_trained_exactly_once(seed):
    rng = random.Random(seed)
    root = random_branch(rng, "0", 2)
    tree = Tree("t", root, price(root))
    rows = rows_of(tree, [1.0] * len(tree.branches), 0.5)
    assert sum(sum(row.mask) for row in rows) == sum(len(t.sampled) for b in tree.branches for t in b.turns)
    by_ids = [(tuple(row.ids), tuple(row.logprobs)) for row in rows]
    assert by_ids == [(tuple(b.ids), tuple(b.logprobs)) for b in tree.branches if b.generated]
    assert {row.weight for row in rows} <= {0.5}  # the tree's, whatever its fan-out
    for row in rows:
        assert len(row.ids) == len(row.mask) == len(row.logprobs)


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_row_once_and_little_padding(seed):
    rng = random.Random(seed)
    rows = [[rng.randrange(9, 99) for _ in range(rng.randint(1, 200))] for _ in range(100)]
    made = batches(rows, 1024)
    assert sorted(i for batch in made for i in batch.members) == list(range(100))
    for batch in made:
        assert batch.ids.numel() <= 1024 or len(batch.members) == 1
        for place, i in enumerate(batch.members):
            assert batch.ids[place, : len(rows[i])].tolist() == rows[i]
            assert not batch.ids[place, len(rows[i]) :].any()
    assert sum(batch.ids.numel() for batch in made) < 1.15 * sum(map(len, rows))


def test_how_rows_are_batched_changes_no_logprob(random_model):
    rng = random.Random(0)
    rows = [[rng.randrange(9, 200) for _ in range(rng.randint(2, 60))] for _ in range(12)]
    model = random_model.double()
    with torch.no_grad():
        alone = [token_logprobs(model, torch.tensor([row]))[0][0] for row in rows]
        for batch in batches(rows, 200):
            together, _, _ = token_logprobs(model, batch.ids)
            for place, i in enumerate(batch.members):
                assert torch.allclose(together[place, : len(rows[i])], alone[i], atol=1e-6)
    random_model.float()


def test_divergence_and_entropy_are_those_of_the_distributions(random_model):
    """Against sums over the vocabulary in Python, float64."""
    model, other = random_model.double(), copy.deepcopy(random_model).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        ids = torch.randint(9, 200, (2, 6), generator=torch.Generator().manual_seed(0))
        _, entropy, kl = token_logprobs(model, ids, 0.7, other)
        for i in range(2):
            for j in range(1, 6):
                p, q = (torch.softmax(m(input_ids=ids[i : i + 1, :j]).logits[0, -1] / 0.7, -1).tolist() for m in (model, other))
                assert float(entropy[i, j]) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)
                assert float(kl[i, j]) == pytest.approx(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)), abs=1e-5)
    assert not kl[:, 0].any() and not token_logprobs(model, ids)[2].any()
    random_model.float()


def slow_loss(new, old, advantages, weights, mask, divergence, clip, kl) -> float:
    total = 0.0
    for i in range(new.shape[0]):
        for j in range(new.shape[1]):
            if mask[i, j]:
                rho = math.exp(float(new[i, j] - old[i, j]))
                a = float(advantages[i, j])
                total -= float(weights[i, j]) * min(rho * a, min(max(rho, 1 - clip[0]), 1 + clip[1]) * a)
                total += float(weights[i, j]) * kl * float(divergence[i, j])
    return total


@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_its_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    new, old, kl, adv = (torch.randn(4, 9, generator=generator, dtype=torch.float64) * 0.4 for _ in range(4))
    weights = torch.rand(4, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    sums = policy_loss(new, old, adv, weights, mask, torch.zeros_like(new), kl, (0.1, 0.3), 0.05)
    assert float(sums.loss) == pytest.approx(slow_loss(new, old, adv, weights, mask, kl, (0.1, 0.3), 0.05), abs=1e-12)
    assert int(sums.tokens) == int(mask.sum())


def test_dual_clipping_bounds_the_push_on_a_token_that_has_become_likely():
    """Golden values with c = 3: only where the advantage is negative, and only past a ratio of 3. There nothing is pushed any more."""
    ratio, advantage = torch.tensor([[10.0, 2.0, 0.5, 10.0, 0.5]]).double(), torch.tensor([[-1.0, -1.0, -1.0, 1.0, 1.0]]).double()
    new = ratio.log().requires_grad_()
    none, one = torch.zeros(1, 5).double(), torch.ones(1, 5).double()
    sums = policy_loss(new, none, advantage, one, torch.ones(1, 5, dtype=torch.bool), none, none, dual_clip=3.0)
    sums.loss.backward()
    assert float(sums.loss.detach()) == pytest.approx(3.0 + 2.0 + 0.8 - 1.2 - 0.5)
    assert new.grad.tolist() == [pytest.approx([0.0, 2.0, 0.0, 0.0, -0.5])]


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient with respect to each log-probability is -weight * advantage, and 0 where masked."""
    new = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0]] * 3, dtype=torch.bool)
    policy_loss(new, new.detach(), advantages, weights, mask, torch.zeros(3, 5), torch.zeros(3, 5)).loss.backward()
    assert torch.allclose(new.grad, torch.where(mask, -weights * advantages, 0.0))


def test_padding_with_wild_values_leaves_no_trace():
    new = torch.tensor([[0.0, 800.0]], requires_grad=True)
    sums = policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]), *torch.zeros(2, 1, 2))
    sums.loss.backward()
    assert float(sums.loss.detach()) == -1.0 and new.grad.tolist() == [[-1.0, 0.0]]
