"""`ramet bench` and `ramet attention`: what this machine does, and how attention is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ramet import storage, terminal
from ramet.errors import ConfigError, require

bench = typer.Typer(help="Measure this machine. Example: ramet bench sampling --json sampling.json", no_args_is_help=True)
attention = typer.Typer(
    help="Sequence-parallel attention: Spava and what it is compared with. Example: ramet attention plan", no_args_is_help=True
)

Seed = Annotated[int | None, typer.Option("--seed", help="Seed of what is random: training, tasks that are measured, samples.")]


def _destination(path: Path | None) -> Path | None:
    """Where a result is to be written: refused before the work if it cannot be."""
    if path is not None:
        storage.writable(path)
        if storage.to_stdout(path):
            terminal.give_way()
    return path


Json = Annotated[
    Path | None, typer.Option("--json", callback=_destination, help="Write machine-readable results there; -: to standard output.")
]


def _picture(path: Path | None) -> Path | None:
    """The same of a picture, which also wants something that draws it."""
    if path is not None:
        require("matplotlib", "--png")
    return _destination(path)


Png = Annotated[Path | None, typer.Option("--png", callback=_picture, help="Draw the result there.")]
Hosts = Annotated[int, typer.Option(min=1, help="Hosts that share a context.")]
Anchor = Annotated[int | None, typer.Option(min=0, help="Rows that every block sees; by default 1/64 of the context.")]
Passing = Annotated[int | None, typer.Option(min=0, help="Rows that a block passes on; by default 1/128 of the context.")]


def numbers(option: str, text: str) -> list[int]:
    """The positive whole numbers of an option that takes several. Raises `ConfigError` for what is none."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--{option} must be whole numbers with commas between them (got {text!r})") from None
    if any(number < 1 for number in found):
        raise ConfigError(f"--{option} must be positive (got {text!r})")
    return found


@bench.command("sampling")
def bench_sampling(
    model: Annotated[str, typer.Option(help="nano, or a model directory.")] = "nano",
    requests: Annotated[int, typer.Option(min=8, help="Requests of the workload.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; backends take turns within each.")] = 3,
    backend: Annotated[str, typer.Option(help="transformers; or vllm: that many trees beside LLM.generate.")] = "transformers",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Sampling throughput on ragged tree workloads beside `model.generate`, in one run.

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
    """Print which rank holds what, and who attends to what.

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
    dtype: Annotated[str, typer.Option(help="float32, or float64: hardly any rounding, twice the memory.")] = "float32",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare a model's logits with those of dense attention on this machine, hosts simulated one after another.

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
    """Many clients of one reward server: is every answer the model's own, and how fast beside direct calls.

    Example: ramet bench reward-server --model runs/reward-demo/drm --questions runs/reward-demo/held-out/questions.jsonl
    """
    from ramet.benchmarks.speed.reward_server import bench_server

    bench_server(model, questions, videos, clients, repeats, seed or 0, json)


@bench.command("cluster")
def bench_cluster(
    engines: Annotated[int, typer.Option(min=2, help="Simulated engines.")] = 1000,
    updates: Annotated[int, typer.Option(min=1, help="Simulated updates, a seed each.")] = 3,
    png: Png = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Where should a tree's requests go? The real runtime on a simulated cluster of engines, under a virtual clock.

    Example: ramet bench cluster --engines 1000 --json cluster.json --png cluster.png
    """
    from ramet.benchmarks.speed.cluster_sim import bench_cluster

    bench_cluster(engines, updates, seed or 0, png, json)


@bench.command("scaling")
def bench_scaling(
    trees: Annotated[int, typer.Option(min=8, help="Trees of an update for every eight GPUs.")] = 512,
    fixed: Annotated[bool, typer.Option("--fixed", help="The same trees for any number of GPUs.")] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Training on 8 to 1,024 GPUs by a model: what an update takes and what limits it. What this machine can measure, it measures.

    Example: ramet bench scaling --json scaling.json
    """
    from ramet.benchmarks.speed.scaling import bench_scaling

    bench_scaling(trees, fixed, seed or 0, json)


@bench.command("simulate")
def bench_simulate(
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; by default 10,000, or 1 if --seed is given.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The first one.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print what each seed stands for, its trees, and tracebacks.")] = False,
    json: Json = None,
) -> None:
    """Grow random trees under random faults, an interleaving a seed, and check what must always hold.

    Example: ramet bench simulate --seeds 10000 --json simulate.json
    """
    from ramet.benchmarks.faults.simulate import bench_simulate

    bench_simulate(seeds or (10_000 if seed is None else 1), seed or 0, verbose, json)


@bench.command("runtime")
def bench_runtime(
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 3,
    json: Json = None,
) -> None:
    """What a clone costs in CPU and memory, beside a task of a bare anyio task group.

    Example: ramet bench runtime --json runtime.json
    """
    from ramet.benchmarks.speed.fanout import bench_runtime

    bench_runtime(repeats, json)


@bench.command("kills")
def bench_kills(
    kills: Annotated[int, typer.Option(min=1, help="Of each job.")] = 200,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Kill a small eval and a small train at random moments, resume them, and compare with undisturbed runs.

    Example: ramet bench kills --kills 20
    """
    from ramet.benchmarks.faults.kills import bench_kills
    from ramet.runs.jobs import small_commands

    bench_kills(small_commands(seed or 0), kills, seed or 0, json)


@attention.command("bench")
@bench.command("attention")
def bench_attention(
    method: Annotated[str, typer.Option(help="all, or names with commas between them.")] = "all",
    hosts: Annotated[str, typer.Option(help="Numbers of hosts, for the critical path.")] = "2,4,8,16",
    length: Annotated[str, typer.Option(help="Tokens, for the critical path.")] = "8192,32768,131072",
    wall_length: Annotated[str, typer.Option(help="Tokens, for two real processes over gloo; empty: not measured.")] = "8192,16384,32768",
    query: Annotated[int, typer.Option(min=1, help="Rows of the question, of the tokens.")] = 64,
    bandwidth: Annotated[float, typer.Option(min=1e-3, help="Of the link between hosts, in GB/s.")] = 12.5,
    repeats: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 3,
    png: Png = None,
    json: Json = None,
) -> None:
    """Attention methods at the shapes of Qwen2.5-3B: each host's time on its critical path, and two real processes.

    Example: ramet bench attention --method spava,zigzag --hosts 8 --length 32768 --json attention.json
    """
    from ramet.benchmarks.speed.attention_speed import bench_attention

    lists = (numbers("hosts", hosts), numbers("length", length), numbers("wall-length", wall_length))
    bench_attention(method, *lists, query, bandwidth, repeats, png, json)


@bench.command("needle")
def bench_needle(
    model: Annotated[str, typer.Option(help="smollm2-135m, or a model directory.")] = "smollm2-135m",
    length: Annotated[int, typer.Option(min=64, help="Tokens of a text.")] = 8100,
    hosts: Annotated[str, typer.Option(help="Numbers of hosts; the lengths below are tried on the first.")] = "4,2,8",
    anchors: Annotated[str, typer.Option(help="Of Spava: the anchor is one part in so many of the context.")] = "256,16",
    passings: Annotated[str, typer.Option(help="Of Spava: a block passes on one part in so many.")] = "256,32",
    depths: Annotated[int, typer.Option(min=1, help="Places of the code in the text.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Texts for each place.")] = 2,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the journal, results.json and needle.png.")] = Path("runs/needle"),
) -> None:
    """What approximate attention loses on a real model: a code in a long text, divergence from dense, recall. Resumes.

    Example: ramet bench needle --model smollm2-135m --hosts 4
    """
    from ramet.benchmarks.speed.attention_quality import bench_needle

    lists = (numbers("hosts", hosts), numbers("anchors", anchors), numbers("passings", passings))
    bench_needle(model, length, *lists, depths, samples, seed or 0, out)
