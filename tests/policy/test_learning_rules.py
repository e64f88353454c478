"""What a run of learning must not get wrong, each of which a curve would not show: which tasks, which tool, which weights, which seeds."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from ramet.agents.budget import Budget
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.journal import Journal
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tree import StopReason, Task, Tree
from ramet.benchmarks.evaluation import baselines
from ramet.benchmarks.evaluation.harness import Backend, MethodEntry, Workload, measure
from ramet.env.arithmetic import RowsEnvironment, parse_sum, spell
from ramet.env.splits import part_of
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.training.reward import Reward, compute_reward
from ramet.policy.training.rows import token_logprobs
from ramet.policy.training.trainer import Learner, Trainer
from ramet.policy.training.update import LearningProblem, TrainConfig, compute_advantages, minibatches
from ramet.runs.build import learning_problem
from ramet.runs.settings import RunConfig, load

CONFIG = TrainConfig(updates=2, tasks=2, group_size=4, minibatches=2, learning_rate=3e-3, warmup=0)


def draw(update: int) -> list[tuple[Task, Budget]]:
    tasks = RowsEnvironment((2, 6)).tasks("train", CONFIG.tasks, update)
    return [(task, Budget(generated=24, answer_reserve=4, context=200)) for task in tasks]


def judge(task: Task, tree: Tree) -> Reward:
    score = random.Random(tree.seed).random()
    return Reward(score, {}, score)


def trainer(model, tokenizer, directory: Path, **changed: object) -> Trainer:
    config = CONFIG.model_copy(update=changed)
    learner = Learner(HFPolicy(copy.deepcopy(model)), tokenizer, ControlTokenFormat(tokenizer))
    return Trainer(learner, LearningProblem(draw, judge), config, directory)


def updates(made: Trainer, count: int) -> list[dict]:
    async def main() -> list[dict]:
        async with made.policy:
            return [await made.update(update) for update in range(count)]

    return anyio.run(main)


def content(task: Task) -> str:
    return spell([value for row in task.documents.values() for value in parse_sum(row)], signed=True)


def test_a_run_learns_from_training_tasks_alone():
    sample_tasks = learning_problem(load(RunConfig, "nano"), len).sample_tasks
    drawn = [task for update in range(10) for task, _ in sample_tasks(update)]
    assert {part_of(content(task)) for task in drawn} == {"train"} and len({task.id for task in drawn}) == len(drawn)


def test_only_who_may_spawn_is_trained_with_the_tool():
    for spawn, depths in ((True, {1}), (False, {0})):
        sample_tasks = learning_problem(load(RunConfig, "nano"), len, spawn).sample_tasks
        assert {budget.depth for update in range(5) for _, budget in sample_tasks(update)} == depths


def test_repeats_of_a_task_are_sampled_with_seeds_of_their_own(nano_tokenizer, tmp_path):
    chat, seeds = ControlTokenFormat(nano_tokenizer), []

    class Noting:
        version, context = 0, None

        async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
            seeds.append(request.seed)
            ids = tuple(chat.turn("Answer: 7"))
            return Sample(ids, (0.0,) * len(ids), StopReason.END)

    async def main() -> None:
        env, entry = RowsEnvironment(), MethodEntry("base", baselines.tree, Sampling(), 0)
        with Journal(tmp_path / "journal", "job") as journal:
            workload = Workload("iid", env.tasks("iid", 4, 0), [20, 30], Budget(), 0, repeats=3)
            await measure(entry, env, workload, Backend(Noting(), chat), journal)

    anyio.run(main)
    assert len(seeds) == len(set(seeds)) == 4 * 2 * 3


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_before_the_first_step_the_trainer_s_probabilities_are_the_sampler_s(random_model, nano_tokenizer, tmp_path, temperature):
    """At any temperature: the ratio is 1, nothing is clipped."""
    made = trainer(random_model, nano_tokenizer, tmp_path, temperature=temperature, minibatches=1)
    [metrics] = updates(made, 1)
    assert abs(metrics["behaviour_log_ratio"]) < 1e-5 and metrics["clip_fraction"] == 0


def test_after_a_step_the_ratio_is_to_the_weights_that_sampled(random_model, nano_tokenizer, tmp_path):
    """A ratio to the weights as they are would stay 1, and nothing would ever be clipped."""
    made = trainer(random_model, nano_tokenizer, tmp_path, epochs=6, learning_rate=1e-2)
    [metrics] = updates(made, 1)
    assert abs(metrics["behaviour_log_ratio"]) > 1e-3 and 0 < metrics["clip_fraction"] < 1


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_first_step_follows_the_gradient_of_advantage_times_log_probability(random_model, nano_tokenizer, tmp_path, temperature):
    """The trainer's step against autograd of the sum written out, in one batch a row."""
    made = trainer(random_model, nano_tokenizer, tmp_path, temperature=temperature, minibatches=1, max_grad_norm=1e9, estimator="rloo")
    seen: list[list[torch.Tensor]] = []
    step = made.optimizer.step
    made.optimizer.step = lambda *a, **k: (seen.append([p.grad.clone() for p in made.model.parameters()]), step(*a, **k))[1]

    async def groups() -> list:
        async with made.policy:
            grown = await made.rollout(0)
            await made.update(0)
            return grown

    before = copy.deepcopy(made.model).double()
    grown = anyio.run(groups)
    verdicts = [[compute_reward(judge, task, tree) for tree in trees] for task, trees in grown]
    [rows] = minibatches(grown, compute_advantages(grown, verdicts, "rloo", made.chat), made.config)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = before(torch.tensor([row.ids])).logits[0, :-1] / temperature
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        loss = loss - row.weight * row.advantage * chosen[torch.tensor(row.mask[1:])].sum()
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in before.parameters())
    for ours, exact in zip(seen[0], before.parameters(), strict=True):
        assert torch.allclose(ours.double(), exact.grad, atol=1e-4 * largest)


def test_the_divergence_is_from_the_weights_that_training_began_with(random_model, nano_tokenizer, tmp_path):
    """0 while nothing has changed; afterwards that of the model from a copy kept aside, on the rows that were trained."""
    start = copy.deepcopy(random_model).eval()
    made = trainer(random_model, nano_tokenizer, tmp_path, kl_coef=0.1, minibatches=1)
    first, second = updates(made, 1)[0], None
    assert first["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    moved = copy.deepcopy(made.model).eval()
    grown: list = []
    rollout = made.rollout

    async def keeping(*arguments: Any) -> list:
        grown.extend(await rollout(*arguments))
        return grown

    made.rollout = keeping

    async def again() -> dict:
        async with made.policy:
            return await made.update(1)

    second = anyio.run(again)
    verdicts = [[compute_reward(judge, task, tree) for tree in trees] for task, trees in grown]
    [rows] = minibatches(grown, compute_advantages(grown, verdicts, "rloo", made.chat), made.config)
    total = tokens = 0.0
    with torch.no_grad():
        for row in rows:
            _, _, kl = token_logprobs(moved, torch.tensor([row.ids]), 1.0, start)
            total, tokens = total + float(kl[0][torch.tensor(row.mask)].sum()), tokens + sum(row.mask)
    assert second["kl_to_reference"] == pytest.approx(total / tokens, rel=1e-3) and total / tokens > 1e-5
