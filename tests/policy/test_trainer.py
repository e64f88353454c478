"""The local trainer: the same run twice, a run that was killed, fixed steps, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen3MoeConfig

from ramet.agents.budget import Budget
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.transcripts import TREES, read_transcripts
from ramet.agents.tree import Branch, Status, StopReason, Task, Tree, Turn, Usage, price
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import CheckpointError, ConfigError, PolicyError, RewardError, StorageError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.checkpoint import latest_checkpoint
from ramet.policy.models.load import load_model, without_dropout
from ramet.policy.models.lora import adapt, adapted
from ramet.policy.training.identity import identity
from ramet.policy.training.reward import Reward, RewardConfig, RewardFunction
from ramet.policy.training.runlog import RunLog
from ramet.policy.training.trainer import Learner, Trainer, run_trainer
from ramet.policy.training.update import LearningProblem, TrainConfig, learning_rate
from ramet.rewards.penalty import Prices, saturating, scored, selfcest_penalties

CONFIG = TrainConfig(updates=4, tasks=3, group_size=4, minibatches=2, checkpoint_every=2, learning_rate=1e-3)
TIMES = ("seconds_sampling", "seconds_training")


def judge(task: Task, tree: Tree) -> Reward:
    """How much of the root's text is digits: something that noise earns, so that there is a gradient."""
    score = sum(15 < i < 60 for turn in tree.root.turns for i in turn.sampled) / max(tree.usage.generated, 1)
    penalties = Prices(generated=0.001).penalties(tree)
    return Reward(score, penalties, scored(tree, score, penalties))


def draw(update: int) -> list[tuple[Task, Budget]]:
    rng = random.Random(update)
    return [
        (t, Budget(generated=rng.choice([12, 30]), answer_reserve=4, context=200))
        for t in RowsEnvironment((2, 6)).tasks("train", CONFIG.tasks, update)
    ]


def trainer(model, tokenizer, directory: Path, config: TrainConfig = CONFIG, seed: int = 0, judge_=judge) -> Trainer:
    learner = Learner(HFPolicy(copy.deepcopy(model)), tokenizer, ControlTokenFormat(tokenizer))
    return Trainer(learner, LearningProblem(draw, judge_), config, directory, seed)


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


def grown(directory: Path) -> list[tuple]:
    """What was kept of a run's trees, in order, but for what the clock said."""
    return [
        (k.place, k.reward, k.texts, [branch.logprobs for branch in k.tree.branches], replace(k.tree.usage, seconds=0.0))
        for k in read_transcripts(directory / TREES)
    ]


def killing(at: int):
    def kill(metrics) -> None:
        if metrics["update"] == at:
            raise Killed

    return kill


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_run_continues_the_same_curve(random_model, nano_tokenizer, tmp_path, at):
    whole = trainer(random_model, nano_tokenizer, tmp_path / "whole")
    run_trainer(whole)

    with pytest.raises((Killed, BaseExceptionGroup)):
        run_trainer(trainer(random_model, nano_tokenizer, tmp_path / "cut"), killing(at))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "rew')  # what a crash in the middle of a write leaves
    resumed = trainer(random_model, nano_tokenizer, tmp_path / "cut")
    run_trainer(resumed)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    assert grown(tmp_path / "cut") == grown(tmp_path / "whole")


def test_a_run_keeps_every_tree_with_its_reward_and_its_text_unless_it_is_told_otherwise(random_model, nano_tokenizer, tmp_path):
    run = trainer(random_model, nano_tokenizer, tmp_path)
    run_trainer(run)
    kept = list(read_transcripts(tmp_path / TREES))
    places = [(k.place["update"], k.place["group"], k.place["number"]) for k in kept]
    assert places == [(u, g, n) for u in range(CONFIG.updates) for g in range(CONFIG.tasks) for n in range(CONFIG.group_size)]
    tasks = [task for update in range(CONFIG.updates) for task, _ in draw(update) for _ in range(CONFIG.group_size)]
    assert [(k.task, k.reference) for k in kept] == [(task.id, task.reference) for task in tasks]
    assert all(k.reward == asdict(judge(task, k.tree)) for k, task in zip(kept, tasks, strict=True))
    assert all(list(k.texts) == k.tree.texts(run.chat) for k in kept)
    rewards = [k.reward["reward"] for k in kept if k.place["update"] == 0]
    assert curve(tmp_path)[0]["reward"] == pytest.approx(sum(rewards) / len(rewards))
    other = trainer(random_model, nano_tokenizer, tmp_path / "none", CONFIG.model_copy(update={"updates": 1}))
    other.log = RunLog(tmp_path / "none", transcripts=0)
    run_trainer(other)
    assert not (tmp_path / "none" / TREES).exists()


def test_optimiser_steps_are_fixed_and_metrics_complete(random_model, nano_tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"updates": 1, "minibatches": 3, "epochs": 2, "kl_coef": 0.01})
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
    config = CONFIG.model_copy(update={"lora_rank": 4, "kl_coef": 0.01})
    whole = trainer(random_model, nano_tokenizer, tmp_path / "whole", config)
    run_trainer(whole)
    before = dict(random_model.named_parameters())
    for name, weight in whole.model.named_parameters():
        plain = before.get(name.replace(".base_layer.", "."))
        assert torch.equal(weight, plain) if plain is not None else "lora_" in name
    assert any(weight.abs().max() > 0 for name, weight in whole.model.named_parameters() if "lora_B" in name)

    with pytest.raises((Killed, BaseExceptionGroup)):
        run_trainer(trainer(random_model, nano_tokenizer, tmp_path / "cut", config), killing(2))
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


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Reward(1.0, {}, math.nan), "the reward of task .* is nan, which is not a finite number"),
        (Reward(math.inf, {}, 1.0), "the score of task .* is inf"),
        (Reward(1.0, {"words": -math.inf}, 1.0), "the penalty words of the reward of task .* is -inf"),
        (Reward(1.0, {}, "0.5"), "the reward of task .* is the text '0.5', not a number"),
        (Reward(1.0, {}, None), "the reward of task .* is None"),
        (None, "the reward of task .* is None, not a number, a dict of named numbers or a Reward"),
        ("0.5", "the reward of task .* is the text '0.5', not a number, a dict"),
        ({"right": 1.0, "brief": math.nan}, "the part brief of the reward of task .* is nan"),
        ({}, "the reward of task .* has no parts"),
        (10**400, "the reward of task .* is inf"),
        ([1.0], "the reward of task .* is of type list"),
    ],
)
def test_a_reward_that_is_no_number_is_not_blamed_on_the_learning_rate(random_model, nano_tokenizer, tmp_path, verdict, said):
    made = trainer(random_model, nano_tokenizer, tmp_path, judge_=lambda task, tree: verdict)
    with pytest.raises(RewardError, match=f"{said}.*fix"):
        anyio.run(made.update_in_service, 0)


def coarse(model) -> torch.nn.Module:
    return copy.deepcopy(model).bfloat16()


@pytest.mark.parametrize("rank", [0, 4])
def test_small_steps_move_a_model_in_bfloat16(random_model, nano_tokenizer, tmp_path, rank):
    """A step of 1e-6 rounds to nothing there: float32 copies, or adapters, take it."""
    config = CONFIG.model_copy(update={"learning_rate": 1e-6, "warmup": 0, "lora_rank": rank})
    whole = trainer(coarse(random_model), nano_tokenizer, tmp_path / "whole", config)
    before = {name: weight.detach().clone() for name, weight in whole._masters.weights.items()}
    run_trainer(whole)
    after = whole._masters.weights
    moved = sum(int((weight != before[name]).sum()) for name, weight in after.items())
    assert moved > 0.6 * sum(weight.numel() for weight in after.values())
    if rank:
        assert any((after[name] != before[name]).any() for name in after if "lora_A" in name)
    # What is left, and stored, is what was stepped.
    stored = load_file(tmp_path / "whole" / "checkpoints" / "step-000004" / ("adapters.safetensors" if rank else "model.safetensors"))
    left = dict(whole.model.named_parameters())
    for name, weight in after.items():
        assert torch.equal(weight, stored[name]) and torch.equal(weight, left[name]) and weight.dtype is torch.float32
    # A run that was cut goes on.
    with pytest.raises((Killed, BaseExceptionGroup)):
        run_trainer(trainer(coarse(random_model), nano_tokenizer, tmp_path / "cut", config), killing(2))
    resumed = trainer(coarse(random_model), nano_tokenizer, tmp_path / "cut", config)
    run_trainer(resumed)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert all(torch.equal(weight, resumed._masters.weights[name]) for name, weight in after.items())


def test_a_merged_checkpoint_keeps_what_adapters_add_to_a_coarse_model(random_model, nano_tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"learning_rate": 1e-5, "warmup": 0, "lora_rank": 4})
    made = trainer(coarse(random_model), nano_tokenizer, tmp_path, config)
    run_trainer(made)
    plain, _, _ = load_model(tmp_path / "checkpoints" / "step-000004")
    base = dict(coarse(random_model).named_parameters())
    added = {name: weight - base[name].float() for name, weight in plain.named_parameters() if name.endswith("q_proj.weight")}
    for name, part in adapted(made.model).items():
        if name.endswith("q_proj"):
            assert torch.allclose(added[f"{name}.weight"], part.get_delta_weight("default"), rtol=0, atol=1e-7)
    assert all((value != 0).float().mean() > 0.9 for value in added.values())
    # bfloat16 would have lost most of it.
    assert all(((base[name] + value.bfloat16()) == base[name]).float().mean() > 0.5 for name, value in added.items())


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_nothing_is_dropped_out_in_an_update(nano_tokenizer, tmp_path, kind):
    """The first step of the first update has the weights that sampled: every ratio is 1, and the base is not left."""
    ids = {"vocab_size": len(nano_tokenizer), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    config = {
        "gpt2": lambda: GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=512),
        "opt": lambda: OPTConfig(**ids, **shape, ffn_dim=32, word_embed_proj_dim=32, layerdrop=0.5),
        "llama": lambda: LlamaConfig(**ids, **shape, intermediate_size=32, attention_dropout=0.3),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    run = CONFIG.model_copy(update={"updates": 1, "minibatches": 1, "kl_coef": 0.1})
    learner = Learner(HFPolicy(model), nano_tokenizer, ControlTokenFormat(nano_tokenizer))
    run_trainer(Trainer(learner, LearningProblem(draw, judge), run, tmp_path))
    (metrics,) = curve(tmp_path)
    assert abs(metrics["behaviour_log_ratio"]) < 1e-5 and metrics["clip_fraction"] == 0 and abs(metrics["kl_to_reference"]) < 1e-6


def test_dropout_can_be_turned_off_in_a_model_that_others_train():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_adapters_that_would_miss_experts_are_refused_by_name(nano_tokenizer):
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8,
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"do not support fused experts such as model\.layers\.0\.mlp\.experts\.gate_up_proj; train all weights"
    ):
        adapt(AutoModelForCausalLM.from_config(config), 4, 0)


def test_adapters_that_would_miss_a_router_are_refused_by_name(random_model):
    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 16))

    model = copy.deepcopy(random_model)
    model.model.layers[0].mlp.gate = Router()
    with pytest.raises(ConfigError, match=r"do not support model\.layers\.0\.mlp\.gate\.weight, which is not a torch\.nn\.Linear"):
        adapt(model, 4, 0)


@pytest.mark.parametrize("name", ["learning_rate", "temperature", "kl_coef", "max_grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_settings_are_finite(name, value):
    with pytest.raises(ValueError, match="finite"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_run(random_model, nano_tokenizer, tmp_path, value):
    def bad(task: Task, tree: Tree) -> Reward:
        return Reward(value, {}, scored(tree, value, {}))

    with pytest.raises(RewardError, match="fix the reward function"):
        anyio.run(trainer(random_model, nano_tokenizer, tmp_path, judge_=bad).update_in_service, 0)


def test_a_reward_that_failed_leaves_all_samples_of_the_update_to_the_mended_one(random_model, nano_tokenizer, tmp_path):
    def made(reward: RewardFunction) -> Trainer:
        learner = Learner(HFPolicy(copy.deepcopy(random_model)), nano_tokenizer, ControlTokenFormat(nano_tokenizer))
        return Trainer(learner, LearningProblem(draw, reward, compared=False), CONFIG, tmp_path)

    with pytest.raises(RewardError, match="raised ZeroDivisionError"):
        anyio.run(made(lambda task, tree: 1 / 0).update_in_service, 0)
    [samples] = (tmp_path / "rollouts").glob("*.jsonl")
    before = samples.read_bytes()
    metrics = anyio.run(made(judge).update_in_service, 0)
    assert samples.read_bytes() == before and metrics["reward"] != 0


def test_a_judge_is_not_asked_twice_for_a_tree_of_an_interrupted_update(random_model, nano_tokenizer, tmp_path):
    asked: list[float] = []

    def drawn(task: Task, tree: Tree) -> float:
        """Another number each time, and the eleventh not at all."""
        asked.append(random.random())
        if len(asked) == 11:
            raise ConnectionError("the judge is away")
        return asked[-1]

    def made() -> Trainer:
        learner = Learner(HFPolicy(copy.deepcopy(random_model)), nano_tokenizer, ControlTokenFormat(nano_tokenizer))
        problem = LearningProblem(draw, drawn, rewarding=RewardConfig(concurrency=1), compared=False)
        return Trainer(learner, problem, CONFIG, tmp_path)

    with pytest.raises(RewardError, match="the judge is away"):
        anyio.run(made().update_in_service, 0)
    metrics = anyio.run(made().update_in_service, 0)
    trees = CONFIG.tasks * CONFIG.group_size
    assert len(asked) == trees + 1 and metrics["reward"] == pytest.approx((sum(asked) - asked[10]) / trees)


def test_a_failure_is_worth_what_is_said_whatever_it_cost():
    tree = Tree("t", Branch("0", (), (), Status.ANSWERED, "1"), Usage())
    assert scored(tree, 1.0, {"generated": 0.2}, failure=-0.5) == 0.8
    assert scored(tree, 0.0, {"generated": 0.2}, failure=-0.5) == -0.5
    assert scored(tree, 0.0, {"generated": 0.2}) == -0.2


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig(updates=110, warmup=10, learning_rate=1.0, lr_decay=0.8)
    rates = [learning_rate(config, update) for update in range(110)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 == max(rates)
    assert rates[60] == pytest.approx(0.6) and rates[-1] == pytest.approx(0.2, abs=0.01)
    assert set(map(partial(learning_rate, TrainConfig(warmup=0)), range(200))) == {TrainConfig().learning_rate}


def test_a_reward_that_raises_stops_the_run(random_model, nano_tokenizer, tmp_path):
    def bad(task: Task, tree: Tree) -> Reward:
        raise ZeroDivisionError("in the reward")

    with pytest.raises(RewardError, match="raised ZeroDivisionError: in the reward; fix the reward function"):
        anyio.run(trainer(random_model, nano_tokenizer, tmp_path, judge_=bad).update_in_service, 0)
    # The trees that it was asked about can be looked at, until a run that goes on has grown them again.
    kept = list(read_transcripts(tmp_path / TREES))
    assert len(kept) == 12 and all("raised ZeroDivisionError" in k.failed and not k.reward for k in kept)
    trainer(random_model, nano_tokenizer, tmp_path, judge_=bad).resume()
    assert not list(read_transcripts(tmp_path / TREES))


def test_another_runs_folder_is_refused(random_model, nano_tokenizer, tmp_path):
    run_trainer(trainer(random_model, nano_tokenizer, tmp_path, CONFIG.model_copy(update={"updates": 2})))
    with pytest.raises(ConfigError, match="a run with another seed and config; choose another --name"):
        trainer(random_model, nano_tokenizer, tmp_path, seed=5).resume()


def scaled(factor: float) -> RewardFunction:
    def judge_(task: Task, tree: Tree) -> Reward:
        return Reward(1.0, {}, factor * tree.usage.generated)

    return judge_


def test_a_run_whose_reward_has_changed_is_not_resumed(random_model, nano_tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"updates": 2})
    run_trainer(trainer(random_model, nano_tokenizer, tmp_path, config, judge_=scaled(0.5)))
    assert trainer(random_model, nano_tokenizer, tmp_path, config, judge_=scaled(0.5)).resume() == 2
    for other in (scaled(0.25), judge):
        with pytest.raises(ConfigError, match="a run with another reward function"):
            trainer(random_model, nano_tokenizer, tmp_path, config, judge_=other).resume()


BONUS = 1.0


def helped(task: Task, tree: Tree) -> float:
    return scaled(BONUS)(task, tree).reward


class Table:
    def __init__(self, price: float):
        self.price, self.seen = price, []

    def __call__(self, task: Task, tree: Tree) -> float:
        return self.price

    def method(self, task: Task, tree: Tree) -> float:
        return self.price


def test_what_a_function_depends_on_is_part_of_its_identity(monkeypatch):
    def counting() -> RewardFunction:
        calls, count = [], 0

        def judge_(task: Task, tree: Tree) -> Reward:
            nonlocal count
            count += 1
            calls.append(task)
            return Reward(0.0, {}, 0.0)

        return judge_

    same = [scaled(1.0), helped, Table(1.0), partial(helped, tree=1), Prices(generated=0.1).penalties]
    before = [identity(each) for each in same]
    assert len(set(before)) == len(same) and before == [identity(each) for each in same]
    assert identity(Prices(generated=0.1).penalties) != identity(Prices(generated=0.2).penalties)
    assert identity(Table(1.0)) != identity(Table(2.0)) and identity(partial(helped, tree=1)) != identity(partial(helped, tree=2))
    lines = {}
    for body in ("return 1", "return 2"):
        exec(f"def typed(task, tree):\n    {body}", lines)
        lines[body] = identity(lines["typed"])
    assert lines["return 1"] != lines["return 2"]
    # What it changes as it goes is not.
    made = counting()
    first = identity(made)
    made(Task("t", ()), None)
    assert identity(made) == first
    monkeypatch.setitem(globals(), "BONUS", 2.0)
    assert identity(helped) != before[1]


def test_checkpoints_that_do_not_fit_or_are_damaged_are_refused(random_model, nano_tokenizer, tmp_path):
    from ramet.recipes.nano.pretrain import PretrainConfig, build_model

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


def test_selfcest_penalties_golden_values():
    assert saturating(768, 512, 256, 0.3) == pytest.approx(0.190, abs=5e-4)
    assert saturating(1024, 512, 256, 0.3) == pytest.approx(0.259, abs=5e-4)
    assert saturating(2048, 512, 256, 0.3) == pytest.approx(0.299, abs=5e-4)
    assert saturating(1024, 512, 512, 0.2) == pytest.approx(0.126, abs=5e-4)
    assert saturating(512, 512, 256, 0.3) == 0.0


def test_selfcest_penalties_take_the_worst_turns_longest_clone():
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
    got = selfcest_penalties(Tree("t", root, price(root)))
    assert got == pytest.approx({"root_length": 0.190, "clone_length": 0.126, "calls": 0.1}, abs=5e-4)
    tree = Tree("t", root, price(root))
    assert Prices(preset="selfcest", clones=0.5).penalties(tree) == {**got, "clones": 0.5 * 4}


def _with_context(context: int, at_update: int = 0):
    def drawn(update: int) -> list[tuple[Task, Budget]]:
        return [(t, b.model_copy(update={"context": context}) if update == at_update else b) for t, b in draw(update)]

    return drawn


def test_a_run_that_can_sample_nothing_ends_with_the_limit_and_leaves_no_checkpoint(random_model, nano_tokenizer, tmp_path):
    made = trainer(random_model, nano_tokenizer, tmp_path)
    made.sample_tasks = _with_context(8)
    with pytest.raises(ConfigError, match=r"nothing was sampled for any tree .* a prompt of \d+ tokens .* budget's context of 8 tokens"):
        run_trainer(made)
    assert latest_checkpoint(made.checkpoints) is None and [m["starved"] for m in made.log.read()] == [1.0]


def test_trees_that_found_no_room_are_counted(random_model, nano_tokenizer, tmp_path):
    made = trainer(random_model, nano_tokenizer, tmp_path, CONFIG.model_copy(update={"updates": 2}))
    made.sample_tasks = _with_context(8, at_update=1)
    run_trainer(made)
    assert [m["starved"] for m in made.log.read()] == [0.0, 1.0]
