"""The cluster trainer as far as it goes without OpenRLHF: settings, flags, plan, what is refused, GAE."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents import drain
from ramet.errors import BudgetExhausted, CheckpointError, ConfigError, Drained, EngineLost, PartLost, RewardError, RunLost, TaskError
from ramet.policy.openrlhf import supported
from ramet.policy.openrlhf.flags import flags, needs
from ramet.policy.openrlhf.placement import ModelDimensions, check_fits, place
from ramet.policy.openrlhf.settings import ClusterConfig, RunSpec
from ramet.policy.training.advantages import gae
from ramet.policy.training.update import LearningProblem, TrainConfig
from ramet.runs import cluster, cluster_process
from ramet.runs.settings import RunConfig, load

FOUR_BILLION = Path(__file__).parents[2] / "examples" / "shapes" / "4b"


def spec(tmp_path: Path, train: TrainConfig | None = None, dtype: str = "bfloat16", **cluster) -> RunSpec:
    return RunSpec(
        train or TrainConfig(), ClusterConfig(**cluster), tmp_path, FOUR_BILLION, "auto", dtype, 3, "job", True, lambda count: None
    )


def value(made: list[str], flag: str) -> str:
    return made[made.index(f"--{flag}") + 1]


def test_a_run_with_other_tasks_or_rewards_is_another_run(tmp_path):
    """As in the local trainer; what the recipe makes again in another process is the same."""

    def draw(update: int) -> list:
        return [update]

    def judge(worth: float):
        return lambda task, tree: worth

    run = spec(tmp_path)
    identified = run.identified(LearningProblem(draw, judge(1.0))).fingerprint
    assert identified == run.identified(LearningProblem(draw, judge(1.0))).fingerprint != run.fingerprint
    others = [LearningProblem(draw, judge(2.0)), LearningProblem(lambda update: [], judge(1.0))]
    assert len({identified, *(run.identified(problem).fingerprint for problem in others)}) == 3


def test_what_has_not_come_up_yet_is_waited_for_with_one_line(monkeypatch):
    monkeypatch.setattr(cluster_process, "POLL_SECONDS", 0)
    lines: list[str] = []
    lacks = iter(["1 GPUs where 2 are needed", "1 GPUs where 2 are needed", "", "not asked again"])
    assert cluster_process.wait_for(lambda: next(lacks), "more nodes to join", lines.append) == ""
    assert lines == ["1 GPUs where 2 are needed: waiting up to 60 seconds for more nodes to join"]
    assert next(lacks) == "not asked again"


def test_the_wait_ends_with_its_time_or_when_the_run_is_to_stop(monkeypatch):
    monkeypatch.setattr(cluster_process, "POLL_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(cluster_process, "WAIT_SECONDS", 0)
        assert cluster_process.wait_for(lambda: "too small", "more nodes", print) == "too small"

    def stopped() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "too small"

    with drain.draining(print), pytest.raises(Drained):
        cluster_process.wait_for(stopped, "more nodes", print)


def test_what_the_process_on_the_cluster_waits_for_is_shown_where_the_run_was_started(tmp_path, caplog):
    caplog.set_level("INFO", "ramet.runs.cluster")
    assert cluster._show_notice(tmp_path, "") == ""
    (tmp_path / "openrlhf").mkdir()
    cluster_process._announce(tmp_path, "waiting for nodes")
    shown = cluster._show_notice(tmp_path, "")
    assert cluster._show_notice(tmp_path, shown) == "waiting for nodes"
    assert [record.getMessage() for record in caplog.records if record.name == "ramet.runs.cluster"] == ["waiting for nodes"]


def test_one_configuration_becomes_flags(tmp_path):
    made = flags(spec(tmp_path, trainers=16, engines=2, tensor_parallel_size=4, critic=True, gamma=0.9), 4096)
    assert (
        (value(made, "actor.num_nodes"), value(made, "actor.num_gpus_per_node"))
        == ("2", "8")
        == (
            value(made, "critic.num_nodes"),
            value(made, "critic.num_gpus_per_node"),
        )
    )
    assert value(made, "algo.advantage.estimator") == "gae" and value(made, "algo.advantage.gamma") == "0.9"
    assert value(made, "data.max_len") == "4096" and "--vllm.enforce_eager" not in made and "--ds.adam_offload" not in made
    assert needs(ClusterConfig(trainers=16, engines=2, tensor_parallel_size=4, critic=True)) == {"GPU": 40, "CPU": 41}
    plain = flags(spec(tmp_path, trainers=4, offload=True), 4096)
    assert "--ds.adam_offload" in plain and not any(word.startswith("--critic") for word in plain)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": TrainConfig(lora_rank=8)}, "lora_rank to 0"),
        ({"dtype": "float32"}, "dtype to bfloat16"),
        ({"train": TrainConfig(tasks=1, group_size=2, minibatches=1), "trainers": 4}, "fewer than 4 trainers"),
    ],
)
def test_what_the_cluster_cannot_train_is_refused(tmp_path, changed, said):
    with pytest.raises(ConfigError, match=said):
        flags(spec(tmp_path, **changed), 1024)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ("trainers=12", "do not fill nodes"),
        ("tensor_parallel_size=16", "do not fill a node"),
        ("tensor_parallel_size=3", "do not fill a node"),
    ],
)
def test_what_does_not_fill_nodes_is_refused(given_, said):
    with pytest.raises(ConfigError, match=said):
        load(RunConfig, "nano", [f"openrlhf.{given_}"])


def test_another_release_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(supported, "version", lambda name: "0.12.0")
    with pytest.raises(ConfigError, match=r"openrlhf 0\.12\.0 is not supported: .*openrlhf 0\.11\.2"):
        supported.check()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_shape_counts_the_parameters_of_the_model(kind, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=300
    )
    config.save_pretrained(tmp_path)
    dimensions = ModelDimensions.from_config(tmp_path)
    assert dimensions.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert dimensions.kv == 2 * 3 * 2 * dimensions.keys // 2 * 2 and dimensions.layers == 3


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no configuration of a language model"):
        ModelDimensions.from_config(tmp_path)


def test_the_plan_of_four_billion_on_eight_gpus():
    dimensions = ModelDimensions.from_config(FOUR_BILLION)
    train = TrainConfig(batch_tokens=8192)
    assert round(dimensions.parameters / 1e9, 2) == 4.02 and dimensions.kv == 147_456
    placement = place(dimensions, train, ClusterConfig(), 8192)
    check_fits(placement)
    assert placement.nodes == [{"engine": 4, "trainer": 4}] and placement.sync == 2 * dimensions.parameters
    trainer = placement.parts[0].bytes
    assert trainer["optimiser"] == pytest.approx(12 * dimensions.parameters / 4) and trainer["reference"] == 0
    two = place(dimensions, train, ClusterConfig(trainers=16, engines=8), 8192)
    assert two.nodes == [{"engine": 8}, {"trainer": 8}, {"trainer": 8}]


def test_a_plan_that_cannot_fit_is_refused_with_the_numbers():
    dimensions = ModelDimensions.from_config(FOUR_BILLION)
    placement = place(dimensions, TrainConfig(kl_coef=0.1), ClusterConfig(trainers=1, zero_stage=2), 8192)
    with pytest.raises(ConfigError, match=r"GPU of the trainer needs 1[12]\d\.\d GiB of 75\.2 \(weights 7\.5, .*logits .*\): raise"):
        check_fits(placement)
    small = place(dimensions, TrainConfig(), ClusterConfig(gpu_memory=10, trainers=8), 8192)
    assert any("a GPU of the engine needs" in problem for problem in small.problems)


def slow_gae(values: list[float], reward: float, gamma: float, lam: float) -> list[float]:
    """By its definition: the sum of discounted temporal differences, in float64."""
    v = torch.tensor([*values, 0.0], dtype=torch.float64)
    r = torch.zeros(len(values), dtype=torch.float64)
    r[-1] = reward
    deltas = r + gamma * v[1:] - v[:-1]
    return [float(sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(values)))) for t in range(len(values))]


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.floats(-1, 1), st.floats(0.1, 1), st.floats(0, 1)
)  # fmt: skip
def test_gae_is_its_definition(values, reward, gamma, lam):
    advantages, returns = gae(values, reward, gamma, lam)
    assert advantages == pytest.approx(slow_gae(values, reward, gamma, lam), abs=1e-9)
    assert returns == pytest.approx([a + v for a, v in zip(advantages, values, strict=True)])


def test_gae_with_lambda_one_does_not_depend_on_what_comes_after():
    assert gae([0.3, -1.0, 0.7], 1.0)[0] == pytest.approx([0.7, 2.0, 0.3])


def test_the_plan_and_the_flags_of_the_command_line(tmp_path, monkeypatch, capsys):
    import sys

    from ramet.cli import main as cli

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ramet", "train", "--trainer", "openrlhf", "--runs", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    example = ["--config", str(FOUR_BILLION.parents[1] / "cluster.toml"), "--set", f"model={FOUR_BILLION}"]
    assert call(*example, "--plan", "--dry-run", "--json", str(tmp_path / "plan.json")) == 0
    said = capsys.readouterr().out
    assert "4.02 billion" in said and "--vllm.num_engines 4" in said and "python -m openrlhf.cli.train_ppo_ray" in said
    parts = {r["part"]: r for r in json.loads((tmp_path / "plan.json").read_text()) if r["record"] == "part"}
    assert parts["trainer"]["needed_gib"] < parts["trainer"]["offered_gib"]
    assert not list(tmp_path.glob("cluster*")), "nothing is started and nothing written"
    assert call(*example, "--plan", "--set", "openrlhf.gpu_memory=24") == 2
    assert "the run does not fit" in capsys.readouterr().err


def test_a_run_goes_on_elsewhere_but_not_as_another(tmp_path):
    from ramet.runs.cluster import _claim

    folder = tmp_path / "r"
    _claim(folder, load(RunConfig, "nano", ["openrlhf.address=http://one:8265"]))
    (folder / "metrics.jsonl").write_text("")
    moved = load(RunConfig, "nano", ["openrlhf.address=http://two:8265", "openrlhf.restarts=7"])
    _claim(folder, moved)
    assert load(RunConfig, folder / "config.toml") == moved
    with pytest.raises(ConfigError, match="another configuration or seed"):
        _claim(folder, load(RunConfig, "nano", ["openrlhf.address=http://two:8265", "openrlhf.lam=0.5"]))


def test_paths_are_whole_before_they_travel(tmp_path, monkeypatch):
    from ramet.runs.cluster import _absolute

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "q.jsonl").write_text("")
    given_ = load(RunConfig, "nano", ["model=model", "env.kind=gsm8k", "env.train=q.jsonl", "env.data=hub/name"])
    whole = _absolute(given_)
    assert (whole.model, whole.env.train, whole.env.data) == (str(tmp_path / "model"), str(tmp_path / "q.jsonl"), "hub/name")
    (tmp_path / "nano").mkdir()
    assert _absolute(load(RunConfig, "nano")).model == "nano", "the name of a shipped model is no path"


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        (Drained(), Drained),
        (PartLost("a node"), RunLost),
        (EngineLost("an engine"), RunLost),
        (RewardError("x"), RewardError),
        (TaskError("x"), TaskError),
        (BudgetExhausted("turns", 2, 1), BudgetExhausted),
    ],
)
def test_what_ended_a_run_is_raised_as_what_it_was(ended, kind, tmp_path, monkeypatch):
    config = load(RunConfig, "nano", ["openrlhf.restarts=1"])
    attempts: list[int] = []

    @contextmanager
    def started(config: RunConfig, directory: Path, command: list[str]) -> Iterator[Any]:
        attempts.append(1)
        (directory / "openrlhf").mkdir(exist_ok=True)
        cluster_process._write(directory, ended if len(attempts) < 3 else None)
        yield lambda: False, lambda: "exit status 1"

    monkeypatch.setattr(cluster, "_started", started)
    with pytest.raises(kind) as raised:
        cluster._run(config, tmp_path, True)
    assert str(ended) in str(raised.value) and raised.value.exit_code == ended.exit_code
    assert len(attempts) == (2 if kind is RunLost else 1)
    if kind is not RunLost:
        assert vars(raised.value) == vars(ended)
        attempts += [1]
    cluster._run(config, tmp_path, True)  # the third attempt is done


def test_a_job_that_leaves_no_word_is_lost(tmp_path, monkeypatch):
    @contextmanager
    def started(config: RunConfig, directory: Path, command: list[str]) -> Iterator[Any]:
        yield lambda: False, lambda: "exit status -9"

    monkeypatch.setattr(cluster, "_started", started)
    with pytest.raises(RunLost, match=r"has died \(exit status -9\); see .*openrlhf\.log; the last checkpoint"):
        cluster._run(load(RunConfig, "nano", ["openrlhf.restarts=0"]), tmp_path, True)


def test_an_environment_of_the_folder_in_which_a_run_is_started_is_found_by_its_actors_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "sums_here.py").write_text(
        "import ramet\n\ndef task(rng):\n    n = rng.randint(1, 999)\n    return ramet.Task.ask(f'{n}', f'Say {n}', reference=str(n))\n\n"
        "async def reward(task, tree):\n    return float(tree.answer == task.reference)\n\n"
        "sums = ramet.SimpleEnvironment(task, reward)\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load(RunConfig, "nano-openrlhf", ["env.kind=sums_here:sums", "train.tasks=3"])
    spec = cluster_process.run_spec(config, tmp_path / "r", True)
    program = (
        "import pickle, sys; from ramet.env.environment import answered; from ramet.policy.training.reward import Judge\n"
        "problem = pickle.load(sys.stdin.buffer).build_problem(len); task = problem.sample_tasks(0)[2][0]\n"
        "print(Judge(problem.reward_function, problem.rewarding).submit(task, answered(task, task.reference)).result().score)"
    )
    ran = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(spec), cwd="/", capture_output=True, timeout=120, check=True)
    assert ran.stdout == b"1.0\n"
