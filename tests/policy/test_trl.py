"""Trees in TRL's GRPOTrainer: its gradient is that of our estimator, whatever the fan-out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ramet.agents.budget import Budget
from ramet.agents.tree import Task, Tree
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import ConfigError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.policy.training.reward import Reward
from ramet.policy.training.trainer import Learner, Trainer
from ramet.policy.training.trl import TreeRollouts
from ramet.policy.training.update import LearningProblem, TrainConfig, compute_advantages, minibatches

trl: Any = pytest.importorskip("trl", reason="TRL is not installed: pip install 'ramet[reward]'")

CLONES, GROUP, TASKS, LENGTH = 4, 4, 2, 256


def judge(task: Task, tree: Tree) -> Reward:
    score = 0.01 * tree.usage.generated
    return Reward(score, {}, score)


@pytest.fixture
def parts(monkeypatch: Any) -> tuple[Any, Any, Any, TreeRollouts]:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    model, tokenizer, chat = load_model(BASE)
    tokenizer.padding_side = "left"
    budget = Budget(generated=192, depth=1, answer_reserve=8, context=768, width=8)
    tasks = [(task, budget) for task in RowsEnvironment((12, 18)).tasks("train", TASKS, 3)]
    return model, tokenizer, chat, told(tasks, chat)


def told(tasks: Any, chat: Any) -> TreeRollouts:
    trees = TreeRollouts(tasks, judge, chat, CLONES, temperature=0.7)
    assert all(limited.clones == CLONES for _, limited in trees._tasks.values())
    # The shipped model has never been told how many clones are left, and spawns no more than it has rows of digits.
    trees._tasks = {task.id: (task, budget) for task, budget in tasks}
    return trees


def grpo(model: Any, tokenizer: Any, trees: TreeRollouts, tmp_path: Path, **changed: Any) -> Any:
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "save_strategy": "no", "beta": 0.0, "max_steps": 1, "loss_type": "dr_grpo", "scale_rewards": "none",
        "max_completion_length": LENGTH, "temperature": 0.7, "max_grad_norm": 1e9, "num_generations": GROUP * trees.rows,
        "per_device_train_batch_size": TASKS * GROUP * trees.rows, "disable_tqdm": True,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return trl.GRPOTrainer(
        model, args=trl.GRPOConfig(**settings | changed), train_dataset=trees.dataset(), reward_funcs=trees.reward, rollout_func=trees,
        processing_class=tokenizer, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )  # fmt: skip


def test_a_step_of_grpo_is_the_gradient_of_rloo(parts, tmp_path):
    model, tokenizer, chat, trees = parts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grpo(model, tokenizer, trees, tmp_path).train()
    found = {name: before[name] - p.detach() for name, p in model.named_parameters()}

    grown = trees.grown
    assert len(grown) == TASKS * GROUP and len({len(tree.branches) for tree in grown}) > 1, "trees of several widths"
    assert max(tree.usage.clones for tree in grown) <= CLONES, "the rows of a tree are enough for its clones"
    model, tokenizer, chat = load_model(BASE)
    tasks = {task.id: task for task, _ in trees._tasks.values()}
    groups = [(tasks[grown[i].task_id], grown[i : i + GROUP]) for i in range(0, len(grown), GROUP)]
    config = TrainConfig(minibatches=1, temperature=0.7, length_scale=LENGTH)
    advantages = compute_advantages(groups, [[judge(t, tree) for tree in of] for t, of in groups], "rloo", chat)
    ours = Trainer(Learner(HFPolicy(model), tokenizer, chat), LearningProblem(lambda update: [], judge), config, tmp_path)
    ours._backward(minibatches(groups, advantages, config)[0])
    # TRL's baseline has the tree's own reward in it, and it divides by rows, not by trees.
    constant = (GROUP - 1) / GROUP / trees.rows
    scale = max(float(p.grad.abs().max()) for p in model.parameters()) * constant
    for name, p in model.named_parameters():
        assert float((found[name] - p.grad * constant).abs().max()) < 1e-3 * scale, name


def test_a_resumed_run_grows_the_trees_that_it_would_have_grown(parts, tmp_path):
    """Not the first ones again; and with dropout turned off, as they were sampled."""
    model, tokenizer, chat, trees = parts
    budget = next(iter(trees._tasks.values()))[1]
    tasks = [(task, budget) for task in RowsEnvironment((12, 18)).tasks("train", 2 * TASKS, 3)]
    sampled: list[list[Any]] = []

    def grown(tree_model: Any, of: TreeRollouts, **options: Any) -> None:
        class Seen(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
                sampled.append([branch.ids for tree in of.grown for branch in tree.branches])

        made = grpo(tree_model, tokenizer, of, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        made.add_callback(Seen())
        made.train(**options)

    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    grown(model, told(tasks, chat))
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.0}
    grown(load_model(BASE)[0], told(tasks, chat), resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    first, second, resumed = sampled
    assert first != second and resumed == second


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"temperature": 1.0}, "temperature is 1 and trees are sampled at 0.7"),
        ({"num_generations": 6, "per_device_train_batch_size": 6}, "a tree takes 5 rows"),
    ],
)
def test_settings_that_do_not_fit_trees_are_refused(parts, tmp_path, changed, said):
    model, tokenizer, _, trees = parts
    with pytest.raises(ConfigError, match=said):
        grpo(model, tokenizer, trees, tmp_path, **changed).train()


def test_ids_must_tell_tasks_apart(parts):
    task, budget = next(iter(parts[3]._tasks.values()))
    with pytest.raises(ConfigError, match="two tasks have the same id"):
        TreeRollouts([(task, budget), (task, budget)], judge, parts[2], 2)
