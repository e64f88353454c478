"""The local trainer: the same run twice, a run that was killed, fixed steps, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import random
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch

from ramet.agents.budget import Budget
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.tree import Branch, Status, StopReason, Task, Tree, Turn, Usage, price
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import CheckpointError, ConfigError, PolicyError, RewardError, StorageError
from ramet.policy.checkpoint import latest_checkpoint
from ramet.policy.models import load_model
from ramet.policy.trainer import Trainer, run_trainer
from ramet.policy.update import TrainConfig, Verdict, learning_rate
from ramet.rewards.penalty import Prices, reference_penalties, saturating, scored

CONFIG = TrainConfig(updates=4, tasks=3, group_size=4, minibatches=2, checkpoint_every=2, learning_rate=1e-3)
TIMES = ("seconds_sampling", "seconds_training")


def judge(task: Task, tree: Tree) -> Verdict:
    """How much of the root's text is digits: something that noise earns, so that there is a gradient."""
    score = sum(15 < i < 60 for turn in tree.root.turns for i in turn.sampled) / max(tree.usage.generated, 1)
    penalties = Prices(generated=0.001).penalties(tree)
    return Verdict(score, penalties, scored(tree, score, penalties))


def draw(update: int) -> list[tuple[Task, Budget]]:
    rng = random.Random(update)
    return [
        (t, Budget(generated=rng.choice([12, 30]), answer_reserve=4, context=200))
        for t in RowsEnvironment((2, 6)).tasks("train", CONFIG.tasks, update)
    ]


def trainer(model, tokenizer, directory: Path, config: TrainConfig = CONFIG, seed: int = 0, judge_=judge) -> Trainer:
    return Trainer(copy.deepcopy(model), tokenizer, ControlTokenFormat(tokenizer), draw, judge_, config, directory, seed)


def curve(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(trainer_: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer_.model.parameters()]


def test_the_same_seed_gives_the_same_curve_and_weights(random_model, nano_tokenizer, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = trainer(random_model, nano_tokenizer, tmp_path / name, seed=seed)
        run_trainer(made)
        runs.append((curve(tmp_path / name), weights(made)))
    assert runs[0][0] == runs[1][0] and all(map(torch.equal, runs[0][1], runs[1][1]))
    assert runs[0][0] != runs[2][0]
    assert not all(map(torch.equal, runs[0][1], list(random_model.parameters())))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_run_continues_the_same_curve(random_model, nano_tokenizer, tmp_path, at):
    whole = trainer(random_model, nano_tokenizer, tmp_path / "whole")
    run_trainer(whole)

    def kill(metrics) -> None:
        if metrics["update"] == at:
            raise Killed

    with pytest.raises((Killed, BaseExceptionGroup)):
        run_trainer(trainer(random_model, nano_tokenizer, tmp_path / "cut"), kill)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "rew')  # what a crash in the middle of a write leaves
    resumed = trainer(random_model, nano_tokenizer, tmp_path / "cut")
    run_trainer(resumed)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_optimiser_steps_are_fixed_and_metrics_complete(random_model, nano_tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"updates": 1, "minibatches": 3, "epochs": 2, "kl": 0.01})
    run_trainer(trainer(random_model, nano_tokenizer, tmp_path, config))
    (metrics,) = curve(tmp_path)
    assert metrics["optimizer_steps"] == 6
    assert {"reward", "accuracy", "spawn_rate", "generated", "critical_path", "penalty_generated", "clip_fraction", "gradient_norm"} <= set(
        metrics
    )
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["reward"] == pytest.approx(metrics["accuracy"] - metrics["penalty_generated"])
    assert list((tmp_path / "tensorboard").iterdir())


def test_adapters_are_trained_alone_resume_and_merge_into_a_plain_model(random_model, nano_tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"lora_rank": 4, "kl": 0.01})
    whole = trainer(random_model, nano_tokenizer, tmp_path / "whole", config)
    run_trainer(whole)
    before = dict(random_model.named_parameters())
    for name, weight in whole.model.named_parameters():
        plain = before.get(name.replace(".base_layer.", "."))
        assert torch.equal(weight, plain) if plain is not None else "lora_" in name
    assert any(weight.abs().max() > 0 for name, weight in whole.model.named_parameters() if "lora_B" in name)

    def kill(metrics) -> None:
        if metrics["update"] == 2:
            raise Killed

    with pytest.raises((Killed, BaseExceptionGroup)):
        run_trainer(trainer(random_model, nano_tokenizer, tmp_path / "cut", config), kill)
    resumed = trainer(random_model, nano_tokenizer, tmp_path / "cut", config)
    run_trainer(resumed)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    plain, _, _ = load_model(tmp_path / "whole" / "checkpoints" / "step-000004")
    ids = torch.randint(10, 60, (2, 40))
    with torch.inference_mode():
        assert torch.allclose(plain(ids).logits, whole.model.eval()(ids).logits, atol=1e-5)
        assert not torch.allclose(plain(ids).logits, random_model(ids).logits, atol=1e-5)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_training_moves_the_policy_towards_reward(random_model, nano_tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"updates": 25, "tasks": 3, "group_size": 8, "learning_rate": 5e-3, "checkpoint_every": 25})
    run_trainer(trainer(random_model, nano_tokenizer, tmp_path, config))
    rewards = [m["reward"] for m in curve(tmp_path)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_run(random_model, nano_tokenizer, tmp_path, value):
    def bad(task: Task, tree: Tree) -> Verdict:
        return Verdict(value, {}, scored(tree, value, {}))

    with pytest.raises(RewardError, match="fix the reward function"):
        anyio.run(trainer(random_model, nano_tokenizer, tmp_path, judge_=bad).update_in_service, 0)


def test_a_failure_is_worth_what_is_said_whatever_it_cost():
    tree = Tree("t", Branch("0", (), (), Status.ANSWERED, "1"), Usage())
    assert scored(tree, 1.0, {"generated": 0.2}, failure=-0.5) == 0.8
    assert scored(tree, 0.0, {"generated": 0.2}, failure=-0.5) == -0.5
    assert scored(tree, 0.0, {"generated": 0.2}) == -0.2


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig(updates=110, warmup=10, learning_rate=1.0, decay=0.8)
    rates = [learning_rate(config, update) for update in range(110)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 == max(rates)
    assert rates[60] == pytest.approx(0.6) and rates[-1] == pytest.approx(0.2, abs=0.01)
    assert set(map(partial(learning_rate, TrainConfig(warmup=0)), range(200))) == {TrainConfig().learning_rate}


def test_a_reward_that_raises_stops_the_run(random_model, nano_tokenizer, tmp_path):
    def bad(task: Task, tree: Tree) -> Verdict:
        raise ZeroDivisionError("in the reward")

    with pytest.raises(RewardError, match="raised ZeroDivisionError: in the reward; fix the reward function"):
        anyio.run(trainer(random_model, nano_tokenizer, tmp_path, judge_=bad).update_in_service, 0)


def test_another_runs_folder_is_refused(random_model, nano_tokenizer, tmp_path):
    run_trainer(trainer(random_model, nano_tokenizer, tmp_path, CONFIG.model_copy(update={"updates": 2})))
    with pytest.raises(ConfigError, match="another seed or configuration"):
        trainer(random_model, nano_tokenizer, tmp_path, seed=5).resume()


def test_checkpoints_that_do_not_fit_or_are_damaged_are_refused(random_model, nano_tokenizer, tmp_path):
    from ramet.nano.pretrain import PretrainConfig, build_model

    run_trainer(trainer(random_model, nano_tokenizer, tmp_path, CONFIG.model_copy(update={"updates": 2})))
    config = CONFIG.model_copy(update={"updates": 2})
    wider = build_model(nano_tokenizer, PretrainConfig(layers=2, width=64, heads=2, feed_forward=64, context=512))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trainer(wider, nano_tokenizer, tmp_path, config).resume()
    path = latest_checkpoint(tmp_path / "checkpoints")
    (path / "optimizer.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="remove it to resume"):
        trainer(random_model, nano_tokenizer, tmp_path, config).resume()


def test_a_disk_that_refuses_is_one_clear_line_and_keeps_the_older_checkpoint(random_model, nano_tokenizer, tmp_path, monkeypatch):
    made = trainer(random_model, nano_tokenizer, tmp_path, CONFIG.model_copy(update={"updates": 2}))
    run_trainer(made)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made.model, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        made.save(4)
    assert latest_checkpoint(made.checkpoints).name == "step-000002"
    assert sorted(p.name for p in made.checkpoints.iterdir()) == ["step-000002"]


def test_a_policy_that_breaks_stops_the_run_and_is_not_a_zero(random_model, nano_tokenizer, tmp_path):
    made = trainer(random_model, nano_tokenizer, tmp_path)
    with torch.no_grad():
        made.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PolicyError, match="not finite"):
        anyio.run(made.update_in_service, 0)


def test_reference_penalties_golden_values():
    assert saturating(768, 512, 256, 0.3) == pytest.approx(0.190, abs=5e-4)
    assert saturating(1024, 512, 256, 0.3) == pytest.approx(0.259, abs=5e-4)
    assert saturating(2048, 512, 256, 0.3) == pytest.approx(0.299, abs=5e-4)
    assert saturating(1024, 512, 512, 0.2) == pytest.approx(0.126, abs=5e-4)
    assert saturating(512, 512, 256, 0.3) == 0.0


def test_reference_penalties_take_the_worst_turns_longest_clone():
    def said(n: int, clones=()) -> Turn:
        return Turn((5,) * n, (0.0,) * n, StopReason.END, clones=tuple(clones))

    def clone(name: str, n: int) -> Branch:
        return Branch(name, (), (said(n),), Status.ANSWERED, "1")

    root = Branch(
        "0",
        (),
        (said(500, [clone("0.0", 100), clone("0.1", 1024)]), said(268, [clone("0.2", 768)]), said(0, [clone("0.3", 1)])),
        Status.ANSWERED,
        "1",
    )
    got = reference_penalties(Tree("t", root, price(root)))
    assert got == pytest.approx({"root_length": 0.190, "clone_length": 0.126, "calls": 0.1}, abs=5e-4)
    tree = Tree("t", root, price(root))
    assert Prices(preset="reference", clones=0.5).penalties(tree) == {**got, "clones": 0.5 * 4}


def _with_context(context: int, at_update: int = 0):
    def drawn(update: int) -> list[tuple[Task, Budget]]:
        return [(t, b.model_copy(update={"context": context}) if update == at_update else b) for t, b in draw(update)]

    return drawn


def test_a_run_that_can_sample_nothing_ends_with_the_limit_and_leaves_no_checkpoint(random_model, nano_tokenizer, tmp_path):
    made = trainer(random_model, nano_tokenizer, tmp_path)
    made.draw = _with_context(8)
    with pytest.raises(ConfigError, match=r"nothing was sampled for any tree .* a prompt of \d+ tokens .* budget's context of 8 tokens"):
        run_trainer(made)
    assert latest_checkpoint(made.checkpoints) is None and [m["starved"] for m in made.log.read()] == [1.0]


def test_trees_that_found_no_room_are_counted(random_model, nano_tokenizer, tmp_path):
    made = trainer(random_model, nano_tokenizer, tmp_path, CONFIG.model_copy(update={"updates": 2}))
    made.draw = _with_context(8, at_update=1)
    run_trainer(made)
    assert [m["starved"] for m in made.log.read()] == [0.0, 1.0]
