"""The learning loop in one file does what the trainer does, step by step."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.policy.training.trainer import Learner, Trainer
from ramet.policy.training.update import LearningProblem, TrainConfig
from ramet.recipes import minimal

TASKS, TREES, UPDATES = 3, 4, 3


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(minimal, "TASKS", TASKS)
    monkeypatch.setattr(minimal, "TREES", TREES)


def trainer(directory: Path, seed: int, **changed: Any) -> Trainer:
    """The full trainer, told to do what the file does."""
    model, tokenizer, chat = load_model(BASE)
    config = TrainConfig(
        updates=UPDATES, tasks=TASKS, group_size=TREES, minibatches=1, warmup=0, learning_rate=minimal.LEARNING_RATE, estimator="rloo",
        max_grad_norm=minimal.CLIP, temperature=minimal.TEMPERATURE, length_scale=minimal.LENGTH, batch_tokens=minimal.BATCH_TOKENS,
        **changed,
    )  # fmt: skip
    learner = Learner(HFPolicy(model, max_batch=TASKS * TREES), tokenizer, chat)
    return Trainer(learner, LearningProblem(partial(minimal.tasks_of, seed=seed), minimal.reward_of), config, directory, seed)


def trained(seed: int) -> tuple[list[tuple[int, float, float]], list[torch.Tensor]]:
    """What the file reports of each update, and its weights after the last."""
    model, _, chat = load_model(BASE)
    reported: list[tuple[int, float, float]] = []
    anyio.run(minimal.train, model, chat, UPDATES, seed, lambda *line: reported.append(line))
    return reported, [weight.detach() for weight in model.parameters()]


def test_the_gradient_is_that_of_the_trainer_on_the_same_trees(tmp_path):
    full = trainer(tmp_path, 0)
    expected: list[torch.Tensor] = []
    full.optimizer.register_step_pre_hook(lambda *_: expected.extend(weight.grad.clone() for weight in full.model.parameters()))

    async def both() -> tuple[Any, list[torch.Tensor]]:
        model, _, chat = load_model(BASE)
        async with HFPolicy(model, max_batch=TASKS * TREES) as policy:
            groups = await minimal.sample(policy, chat, 0, 0)
        async with full.policy:
            trees = await full.rollout(0)
            await full.update(0)
        assert [[b.ids for b in tree.branches] for _, g in groups for tree in g] == [
            [b.ids for b in tree.branches] for _, g in trees for tree in g
        ]
        minimal.backward(model, groups)
        torch.nn.utils.clip_grad_norm_(model.parameters(), minimal.CLIP)
        return [weight.grad for weight in model.parameters()]

    found = anyio.run(both)
    assert sum(float(gradient.norm()) for gradient in expected) > 0.01
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_a_seed_trains_the_weights_and_earns_the_rewards_of_the_trainer_and_of_itself(tmp_path):
    (reported, weights), again = trained(1), trained(1)
    assert reported == again[0] and all(map(torch.equal, weights, again[1]))
    assert trained(2)[0] != reported

    metrics: list[dict[str, Any]] = []
    full = trainer(tmp_path, 1)
    anyio.run(full.train, metrics.append)
    assert reported == [(m["update"], pytest.approx(m["reward"]), m["spawn_rate"]) for m in metrics]
    for mine, theirs in zip(weights, full.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-6)


def test_it_is_short_and_a_number_of_updates_that_is_none_is_refused_in_a_line():
    assert len(Path(minimal.__file__).read_text(encoding="utf-8").splitlines()) <= 200
    done = subprocess.run(
        [sys.executable, "-m", "ramet.recipes.minimal", "--updates", "0"], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 2 and "at least 1, not 0" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
