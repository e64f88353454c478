"""The same stored trees through the local trainer and through OpenRLHF's models on DeepSpeed: one algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-openrlhf")

import deepspeed
import openrlhf.utils
import ray
from deepspeed.utils import safe_get_full_grad

from ramet.agents.budget import Budget
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Task, Tree
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import PolicyError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.policy.openrlhf import install
from ramet.policy.openrlhf.actors import TreePolicy
from ramet.policy.openrlhf.experience import deal, evaluate, targets_of
from ramet.policy.openrlhf.flags import flags
from ramet.policy.openrlhf.settings import ClusterConfig, RunSpec
from ramet.policy.training.reward import Reward
from ramet.policy.training.rows import TrainingRow
from ramet.policy.training.trainer import Learner, Trainer
from ramet.policy.training.update import Group, LearningProblem, TrainConfig, compute_advantages, minibatches

TRAIN = TrainConfig(tasks=4, group_size=4, minibatches=1, kl_coef=0.1, temperature=0.7, batch_tokens=700, estimator="grpo")


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """Trees of the shipped model, some of them with clones, as they come out of a journal."""
    torch.set_num_threads(1)
    model, _, chat = load_model(BASE)
    tasks = RowsEnvironment((3, 16)).tasks("train", TRAIN.tasks, 0)
    budget = Budget(generated=256, depth=1, answer_reserve=8, context=768)

    async def main() -> dict[Any, Tree]:
        async with HFPolicy(model) as policy:
            runtime = Runtime(policy, chat, Sampling(TRAIN.temperature))
            jobs = [Job(task, budget, 100 * g + n, (g, n)) for g, task in enumerate(tasks) for n in range(TRAIN.group_size)]
            async with runtime.run_many(jobs) as trees:
                return {job.key: tree async for job, tree in trees}

    grown = anyio.run(main)
    stored = {key: Tree.of(json.loads(json.dumps(tree.record()))) for key, tree in grown.items()}
    assert stored == grown, "a journal gives back what it was given, to the last bit"
    assert any(tree.spawned for tree in stored.values())
    return [(task, [stored[g, n] for n in range(TRAIN.group_size)]) for g, task in enumerate(tasks)]


def judge(task: Task, tree: Tree) -> Reward:
    score = float(tree.answer is not None) - 0.001 * tree.usage.generated
    return Reward(score, {}, score)


def advantages(groups: list[Group], chat: Any) -> list[list[list[float]]]:
    return compute_advantages(groups, [[judge(task, tree) for tree in trees] for task, trees in groups], TRAIN.estimator, chat)


def disturb(parameters: Any) -> None:
    """Other weights than those that sampled, the same in both trainers: ratios and divergences that are not trivial."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise))


def arguments(made: RunSpec, monkeypatch: Any) -> Any:
    """What OpenRLHF's own parser and checks make of our flags."""

    class Parsed(Exception):
        pass

    def stop(args: Any) -> None:
        raise Parsed(args)

    monkeypatch.setattr(openrlhf.utils, "get_strategy", stop)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(Parsed) as parsed:
        install.run(made, flags(made, 768))
    monkeypatch.undo()
    return parsed.value.args[0]


def cluster_policy(train: TrainConfig, directory: Path, monkeypatch: Any, zero_stage: int = 2) -> Any:
    """A trainer of the cluster by itself, in float32, as OpenRLHF makes it from our flags."""
    cluster = ClusterConfig(
        trainers=1, engines=1, zero_stage=zero_stage, attn_implementation="sdpa", gradient_checkpointing=False, cpu=True
    )
    made = RunSpec(train, cluster, directory, BASE, "auto", "float32", 0, "job", True, lambda count: None)
    from openrlhf.utils.utils import get_strategy

    strategy = get_strategy(arguments(made, monkeypatch))
    actor = type("Told", (TreePolicy,), {"spec": made})(1, 0, None, None)
    actor.init_model_from_pretrained(strategy, str(BASE), 1, None)
    return actor


def given_to(actor: Any, parts: list[list[TrainingRow]], pad: int) -> list[int]:
    dealt = deal(parts, 1, TRAIN.batch_tokens, pad)
    for experience in dealt.experiences:
        actor.append(experience)
    return dealt.steps


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_advantages_loss_and_gradient(groups, tmp_path: Path, monkeypatch: Any, zero_stage: int) -> None:
    model, tokenizer, chat = load_model(BASE)
    given = advantages(groups, chat)
    parts = minibatches(groups, given, TRAIN)
    local = Trainer(Learner(HFPolicy(model), tokenizer, chat), LearningProblem(lambda update: [], judge), TRAIN, tmp_path / "local")
    disturb(model.parameters())
    model.train()
    local_loss = sum(values["loss"] for values, _, _ in local._backward(parts[0]))
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    actor = cluster_policy(TRAIN, tmp_path / "cluster", monkeypatch, zero_stage)
    engine = actor.actor.model
    weights = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0, enabled=zero_stage == 3):
        disturb(weights)
    steps = given_to(actor, parts, tokenizer.pad_token_id or 0)
    assert steps[0] > 2, "gradients are summed over several batches"
    found: dict[str, torch.Tensor] = {}

    def step() -> None:
        found.update({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})

    monkeypatch.setattr(engine, "step", step)
    batches = list(actor._batches)
    sums = actor.fit(0.0, steps=steps, rate=1e-4)

    assert [row.advantage for row in parts[0]] == [
        a for (_, trees), of in zip(groups, given, strict=True) for tree, per in zip(trees, of, strict=True) for a in per
    ]
    assert sorted(a for e in batches for a in targets_of(e).advantages[:, 0].tolist()) == sorted(
        torch.tensor([row.advantage for row in parts[0]]).tolist()
    ), "advantages are passed on as they are"
    assert sums["clipped"] > 0 and sums["kl"] > 0, "the test would not see either"
    assert sums["loss"] == pytest.approx(local_loss, abs=1e-4, rel=1e-4)
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= 1e-4 * scale, f"gradients differ by {worst:.2e} of {scale:.2e}"


def test_the_weights_after_an_update(groups, tmp_path: Path, monkeypatch: Any) -> None:
    """Two minibatches, two epochs, clipped gradients: AdamW here and DeepSpeed's there."""
    train = TRAIN.model_copy(
        update={"minibatches": 2, "epochs": 2, "max_grad_norm": 0.02, "warmup": 0, "learning_rate": 1e-3, "weight_decay": 0.1}
    )
    model, tokenizer, chat = load_model(BASE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = minibatches(groups, advantages(groups, chat), train)
    local = Trainer(Learner(HFPolicy(model), tokenizer, chat), LearningProblem(lambda update: [], judge), train, tmp_path / "local")
    metrics = local._optimise(0, parts)
    actor = cluster_policy(train, tmp_path / "cluster", monkeypatch)
    sums = actor.fit(0.0, steps=given_to(actor, parts, tokenizer.pad_token_id or 0), rate=1e-3)
    assert sums["gradient_norm"] == pytest.approx(metrics["gradient_norm"], rel=1e-2) and sums["gradient_norm"] > 0.02, "it was clipped"
    after = dict(actor.actor.model.module.named_parameters())
    moved = max(float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters())
    worst = max(float((after[name].detach() - p.detach()).abs().max()) for name, p in model.named_parameters())
    # Where a gradient is all but zero, Adam makes a step of its rounding.
    mean = max(float((after[name].detach() - p.detach()).abs().mean()) for name, p in model.named_parameters())
    said = f"weights moved by {moved:.2e} and differ by {mean:.2e}, at most {worst:.2e}"
    assert moved > 1e-3 and mean < 0.01 * moved and worst <= moved, said


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_what_is_not_finite_stops_the_run(groups, tmp_path: Path, monkeypatch: Any, zero_stage: int) -> None:
    _, tokenizer, chat = load_model(BASE)
    parts = minibatches(groups, advantages(groups, chat), TRAIN)
    actor = cluster_policy(TRAIN, tmp_path, monkeypatch, zero_stage)
    steps = given_to(actor, parts, tokenizer.pad_token_id or 0)
    actor._batches[-1].info["weight"][0] = float("inf")
    with pytest.raises(PolicyError, match="a gradient is not finite"):
        actor.fit(0.0, steps=steps, rate=1e-4)


def test_every_token_is_dealt_once_and_all_trainers_step_together(groups) -> None:
    _, _, chat = load_model(BASE)
    parts = minibatches(groups, advantages(groups, chat), TRAIN.model_copy(update={"minibatches": 2}))
    for trainers in (1, 2, 3, 7):
        dealt = deal(parts, trainers, 700, 0)
        assert len(dealt.experiences) == trainers * sum(dealt.steps)
        assert dealt.tokens == [sum(sum(row.mask) for row in rows) for rows in parts]
        whole = sorted(tuple(row.ids) for rows in parts for row in rows)
        ids = []
        for experience in dealt.experiences:
            lengths = experience.attention_mask.sum(-1).tolist()
            ids += [tuple(s[:n].tolist()) for s, n, m in zip(experience.sequences, lengths, experience.action_mask, strict=True) if m.any()]
        assert sorted(ids) == whole
        weight = sum(float((targets_of(e).weights * e.action_mask).sum()) for e in dealt.experiences)
        assert weight == pytest.approx(sum(row.weight * sum(row.mask) for rows in parts for row in rows))


def test_gae_stands_on_sampled_tokens_only() -> None:
    """Two spans with a tool message between them: as if they followed one another."""
    mask = [False, True, True, False, False, True]
    row = TrainingRow([5, 6, 7, 8, 9, 4], mask, [0.0] * 6, 0.8, 1.0, [0] * 6)
    (experience,) = deal([[row]], 1, 100, 0).experiences
    values = torch.tensor([[0.1, 0.5, 9.0, 9.0, 0.4]])
    evaluate(experience, values, 0.9, 0.5)
    apart = torch.tensor([[0.1, 0.5, 0.4]])
    from ramet.policy.training.advantages import gae

    expected, returns = gae(apart[0].tolist(), 0.8, 0.9, 0.5)
    chosen = experience.action_mask[0]
    assert experience.advantages[0, chosen].tolist() == pytest.approx(expected)
    assert experience.returns[0, chosen].tolist() == pytest.approx(returns)
    assert float(experience.advantages[0, ~chosen].abs().sum()) == 0 == float(experience.values[0, ~chosen].abs().sum())
