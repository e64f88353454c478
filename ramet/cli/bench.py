"""`ramet bench` and `ramet attention`: benchmarks of this machine, and sequence-parallel attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ramet import storage, terminal
from ramet.errors import ConfigError, require

bench = typer.Typer(help="Measure this machine. Example: ramet bench sampling --json sampling.json", no_args_is_help=True)
attention = typer.Typer(
    help="Sequence-parallel attention: Spava and the methods it is compared with. Example: ramet attention plan", no_args_is_help=True
)

Seed = Annotated[int | None, typer.Option("--seed", help="Random seed of training, of the choice of tasks, and of sampling.")]


def _destination(path: Path | None) -> Path | None:
    """The path of a result, refused before the work if it cannot be written."""
    if path is not None:
        storage.writable(path)
        if storage.to_stdout(path):
            terminal.give_way()
    return path


Json = Annotated[
    Path | None, typer.Option("--json", callback=_destination, help="Write machine-readable results to this file; - is standard output.")
]


def _picture(path: Path | None) -> Path | None:
    """The path of a picture, refused before the work if it cannot be written or matplotlib is missing."""
    if path is not None:
        require("matplotlib", "--png")
    return _destination(path)


Png = Annotated[Path | None, typer.Option("--png", callback=_picture, help="Plot the result to this PNG file.")]
Hosts = Annotated[int, typer.Option(min=1, help="Hosts that share a context.")]
Anchor = Annotated[int | None, typer.Option(min=0, help="Rows that every block sees; by default 1/64 of the context.")]
Passing = Annotated[int | None, typer.Option(min=0, help="Rows that a block passes on; by default 1/128 of the context.")]


def numbers(option: str, text: str) -> list[int]:
    """The positive whole numbers of an option that takes several. Raises `ConfigError` for anything else."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--{option} takes whole numbers separated by commas (got {text!r})") from None
    if any(value < 1 for value in values):
        raise ConfigError(f"--{option} must be positive (got {text!r})")
    return values


@bench.command("sampling")
def bench_sampling(
    model: Annotated[str, typer.Option(help="nano, or a model directory.")] = "nano",
    requests: Annotated[int, typer.Option(min=8, help="Requests of the workload.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; backends take turns within each.")] = 3,
    backend: Annotated[str, typer.Option(help="transformers, or vllm: as many trees compared with LLM.generate.")] = "transformers",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare the sampling throughput on ragged tree workloads with `model.generate`, in one run.

    Example: ramet bench sampling --json sampling.json
    """
    if backend == "vllm":
        from ramet.benchmarks.speed.vllm_sampling import bench_vllm as bench_
    elif backend == "transformers":
        from ramet.benchmarks.speed.sampling import bench_sampling as bench_
    else:
        raise ConfigError(f"no backend {backend!r}; there are transformers and vllm")
    bench_(model, requests, repeats, seed or 0, json)


def method_of(name: str, anchor: int | None, passing: int | None) -> Any:
    """The attention method called `name`, a `ramet.attention.methods.Method`."""
    from ramet.attention.methods import Method

    return Method(name, anchor, passing)  # type: ignore[arg-type]


@attention.command("plan")
def attention_plan(
    context: Annotated[int, typer.Option(min=0, help="Rows before the question.")] = 32768,
    query: Annotated[int, typer.Option(min=1, help="Rows of the question.")] = 64,
    hosts: Hosts = 4,
    method: Annotated[str, typer.Option(help="dense, ring, zigzag, ulysses, star, apb or spava.")] = "spava",
    anchor: Anchor = None,
    passing: Passing = None,
    png: Png = None,
    json: Json = None,
) -> None:
    """Print which rank holds which rows, and which rows attend to which.

    Example: ramet attention plan --context 131072 --hosts 8 --png plan.png
    """
    from ramet.benchmarks.speed.attention import show_plan

    show_plan(method_of(method, anchor, passing), context, query, hosts, png, json)


@attention.command("check")
def attention_check(
    model: Annotated[str, typer.Option(help="nano, a model directory or a run folder.")] = "nano",
    hosts: Hosts = 4,
    context: Annotated[int, typer.Option(min=0, help="Random tokens before the question.")] = 500,
    query: Annotated[int, typer.Option(min=1, help="Random tokens of the question.")] = 16,
    anchor: Anchor = None,
    passing: Passing = None,
    dtype: Annotated[str, typer.Option(help="float32, or float64 for almost no rounding and twice the memory.")] = "float32",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare a model's logits with those of dense attention on this machine; hosts are simulated one after another.

    Example: ramet attention check --model nano --hosts 4
    """
    from ramet.benchmarks.speed.attention import check

    check(model, [method_of(name, anchor, passing) for name in ("spava", "apb")], hosts, context, query, seed or 0, json, dtype)


@bench.command("reward-server")
def bench_reward_server(
    model: Annotated[str, typer.Option(help="Directory of a VideoDRM.")],
    questions: Annotated[str, typer.Option(help="Rows with id, video, question, answer, choices.")],
    videos: Annotated[Path | None, typer.Option(help="Folder of the videos; by default the file's own.")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Test a reward server with many clients: whether every answer is the model's own, and its speed compared with direct calls.

    Example: ramet bench reward-server --model runs/reward-demo/drm --questions runs/reward-demo/held-out/questions.jsonl
    """
    from ramet.benchmarks.speed.reward_server import bench_server

    bench_server(model, questions, videos, clients, repeats, seed or 0, json)


@bench.command("cluster")
def bench_cluster(
    engines: Annotated[int, typer.Option(min=2, help="Simulated engines.")] = 1000,
    updates: Annotated[int, typer.Option(min=1, help="Simulated updates, each with its own seed.")] = 3,
    png: Png = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare ways to place a tree's requests, with the real runtime on a simulated cluster of engines under a virtual clock.

    Example: ramet bench cluster --engines 1000 --json cluster.json --png cluster.png
    """
    from ramet.benchmarks.speed.cluster_sim import bench_cluster

    bench_cluster(engines, updates, seed or 0, png, json)


@bench.command("scaling")
def bench_scaling(
    trees: Annotated[int, typer.Option(min=8, help="Trees of one update per eight GPUs.")] = 512,
    fixed: Annotated[bool, typer.Option("--fixed", help="The same number of trees for any number of GPUs.")] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Model training on 8 to 1,024 GPUs: how long an update takes and what limits it. What this machine can measure is measured.

    Example: ramet bench scaling --json scaling.json
    """
    from ramet.benchmarks.speed.scaling import bench_scaling

    bench_scaling(trees, fixed, seed or 0, json)


@bench.command("simulate")
def bench_simulate(
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; by default 10,000, or 1 if --seed is given.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The first seed.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the scenario of each seed, its trees, and tracebacks.")] = False,
    json: Json = None,
) -> None:
    """Grow random trees under random faults, one interleaving per seed, and check the invariants.

    Example: ramet bench simulate --seeds 10000 --json simulate.json
    """
    from ramet.benchmarks.faults.simulate import bench_simulate

    bench_simulate(seeds or (10_000 if seed is None else 1), seed or 0, verbose, json)


@bench.command("runtime")
def bench_runtime(
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 3,
    json: Json = None,
) -> None:
    """Measure what a clone costs in CPU and memory, compared with a task in a plain anyio task group.

    Example: ramet bench runtime --json runtime.json
    """
    from ramet.benchmarks.speed.fanout import bench_runtime

    bench_runtime(repeats, json)


@bench.command("kills")
def bench_kills(
    kills: Annotated[int, typer.Option(min=1, help="Kills of each command.")] = 200,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Kill a small eval and a small train at random moments, resume them, and compare with undisturbed runs.

    Example: ramet bench kills --kills 20
    """
    from ramet.benchmarks.faults.kills import bench_kills
    from ramet.runs.commands import small_commands

    bench_kills(small_commands(seed or 0), kills, seed or 0, json)


@attention.command("bench")
@bench.command("attention")
def bench_attention(
    method: Annotated[str, typer.Option(help="all, or names separated by commas.")] = "all",
    hosts: Annotated[str, typer.Option(help="Numbers of hosts for the critical path.")] = "2,4,8,16",
    length: Annotated[str, typer.Option(help="Numbers of tokens for the critical path.")] = "8192,32768,131072",
    wall_length: Annotated[str, typer.Option(help="Tokens for two real processes over gloo; empty: skip them.")] = "8192,16384,32768",
    query: Annotated[int, typer.Option(min=1, help="How many of the tokens are the question.")] = 64,
    bandwidth: Annotated[float, typer.Option(min=1e-3, help="Bandwidth of the link between hosts, in GB/s.")] = 12.5,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement.")] = 3,
    png: Png = None,
    json: Json = None,
) -> None:
    """Time attention methods at the shapes of Qwen2.5-3B: each host on its critical path, and two real processes.

    Example: ramet bench attention --method spava,zigzag --hosts 8 --length 32768 --json attention.json
    """
    from ramet.benchmarks.speed.attention_speed import TimingPlan, bench_attention

    lists = (numbers("hosts", hosts), numbers("length", length), numbers("wall-length", wall_length))
    bench_attention(TimingPlan(method, *lists, query, bandwidth, repeats), png, json)


@bench.command("needle")
def bench_needle(
    model: Annotated[str, typer.Option(help="smollm2-135m, or a model directory.")] = "smollm2-135m",
    length: Annotated[int, typer.Option(min=64, help="Tokens per text.")] = 8100,
    hosts: Annotated[str, typer.Option(help="Numbers of hosts; --anchors and --passings are tried with the first.")] = "4,2,8",
    anchors: Annotated[str, typer.Option(help="For Spava: the context length divided by the length of the anchor.")] = "256,16",
    passings: Annotated[str, typer.Option(help="For Spava: the context length divided by the rows that a block passes on.")] = "256,32",
    depths: Annotated[int, typer.Option(min=1, help="Positions of the code in the text.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Texts per position.")] = 2,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the journal, results.json and needle.png.")] = Path("runs/needle"),
) -> None:
    """Measure what approximate attention loses on a real model: retrieval of a code from a long text, divergence from dense attention, and
    recall. Run again to resume.

    Example: ramet bench needle --model smollm2-135m --hosts 4
    """
    from ramet.benchmarks.speed.attention_quality import NeedlePlan, bench_needle

    lists = (numbers("hosts", hosts), numbers("anchors", anchors), numbers("passings", passings))
    bench_needle(model, NeedlePlan(length, *lists, depths, samples, seed or 0), out)
