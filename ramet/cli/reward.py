"""`ramet reward`: video reward models, their training data and their benchmark."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from ramet.agents.drain import draining
from ramet.cli.bench import Json
from ramet.errors import ConfigError, require
from ramet.terminal import messages

logger = logging.getLogger(__name__)

reward = typer.Typer(
    help="Video reward models: data, training, judging, benchmarks. Example: ramet reward demo", no_args_is_help=True
)

_Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
_Out = Annotated[Path, typer.Option("--out", help="Run folder, from which the same command resumes.")]
_Pairs = Annotated[str, typer.Option("--pairs", help="Preference pairs (.jsonl, .json, .parquet).")]
_Videos = Annotated[Path | None, typer.Option("--videos", help="Folder of the videos; by default, that of the rows.")]
_Fields = Annotated[list[str] | None, typer.Option("--field", help="The column of a field, such as question=prompt. May be repeated.")]
_Frames = Annotated[int | None, typer.Option("--max-frames", min=1, help="Most frames per video; by default as trained, or 16.")]
_Fps = Annotated[float | None, typer.Option("--fps", min=0.01, help="Frames per second, up to --max-frames; by default --max-frames.")]
_Pixels = Annotated[int | None, typer.Option("--max-pixels", min=784, help="Most pixels per frame; by default as trained, or 100,352.")]
_Base = Annotated[str, typer.Option("--model", help="Directory of a vision-language model, or hf:owner/name.")]
_Model = Annotated[str, typer.Option("--model", help="A VideoDRM, a vision-language model that judges, or a fake such as fake:oracle.")]
_Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, help="Sampling temperature; by default as trained, or 1.")]
_Tokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens per output; by default as in training, or 512.")]
_Rank = Annotated[int, typer.Option("--lora-rank", min=0, help="Rank of LoRA adapters; 0 trains all weights of the decoder.")]
_Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps; by default one pass over the data.")]
_Rate = Annotated[float | None, typer.Option("--learning-rate", help="By default 1e-4 with adapters, 1e-5 without.")]


def _map(fields: list[str] | None) -> dict[str, str]:
    """The field map of --field options: column by field. Raises `ConfigError` for one of another form."""
    columns = {}
    for text in fields or []:
        name, equals, where = text.partition("=")
        if not equals or not name or not where:
            raise ConfigError(f"--field {text!r} is not of the form question=prompt")
        columns[name] = where
    return columns


def _video(frames: int | None, fps: float | None, pixels: int | None) -> dict[str, Any]:
    """The options on how a model watches videos, without those that were not given."""
    return {name: value for name, value in (("max_frames", frames), ("fps", fps), ("max_pixels", pixels)) if value is not None}


def _sampling(temperature: float | None, max_tokens: int | None) -> dict[str, Any]:
    """The sampling options, without those that were not given."""
    return {name: value for name, value in (("temperature", temperature), ("max_tokens", max_tokens)) if value is not None}


def _numbers(text: str, option: str) -> list[int]:
    """The positive whole numbers of an option, which may be empty. Raises `ConfigError` for anything else."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(n < 1 for n in numbers):
        raise ConfigError(f"{option} takes positive whole numbers separated by commas (got {text!r})")
    return numbers


@reward.command("demo")
def demo(
    seed: _Seed = 0,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds run folders.")] = Path("runs"),
    name: Annotated[str, typer.Option(help="Name of the run folder.")] = "reward-demo",
    json: Json = None,
) -> None:
    """Draw clips, build pairs, train a VideoDRM, and test whether it looks at the video. Takes a few minutes on two cores.

    Example: ramet reward demo --json demo.json
    """
    from ramet.recipes.reward_demo import run_reward_demo

    with draining(logger.warning):
        run_reward_demo(runs / name, seed, json)


@reward.command("build-pairs")
def build_pairs(
    questions: Annotated[str, typer.Option(help="Rows with id, video, question, answer, and optionally choices and category.")],
    out: _Out,
    answers: Annotated[list[str], typer.Option(help="What answers: a model directory, a file of answers, or guesser. May be repeated.")],
    videos: _Videos = None,
    field: _Fields = None,
    judge: Annotated[str | None, typer.Option(help="A model that judges pairs in both orders, with and without the video.")] = None,
    score_model: Annotated[str | None, typer.Option(help="A VideoDRM whose scores must agree.")] = None,
    weak: Annotated[str | None, typer.Option(help="A weak model: questions that it answers are too easy.")] = None,
    benchmark: Annotated[list[str] | None, typer.Option(help="Pairs of a benchmark to exclude. May be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Answers per question from each of --answers.")] = 8,
    blind: Annotated[int, typer.Option(min=0, help="Answers without the video per question, to drop questions that do not need it.")] = 4,
    easy: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of right answers at or above which a question is too easy.")] = 1.0,
    per_question: Annotated[int, typer.Option(min=1, help="Most pairs per question.")] = 2,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    seed: _Seed = 0,
    json: Json = None,
) -> None:
    """Make preference pairs from videos and questions with checkable answers, with a datasheet. Run again to resume.

    Example: ramet reward build-pairs --questions questions.jsonl --answers models/qwen --out runs/pairs
    """
    from ramet.rewards.video.build import BuildConfig
    from ramet.runs.reward_models import Overrides, Source
    from ramet.runs.reward_training import PairModels, build_command

    config = BuildConfig(n, blind, easy, per_question, seed=seed)
    models = PairModels(answers, judge, score_model, weak, benchmark or [])
    build_command(Source(questions, _map(field), videos), models, config, Overrides(_video(frames, fps, pixels)), out, json)


@reward.command("train-drm")
def train_drm(
    model: _Base,
    pairs: _Pairs,
    out: _Out,
    videos: _Videos = None,
    field: _Fields = None,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    pooling: Annotated[str, typer.Option(help="last token, or mean over the answer.")] = "last",
    steps: _Steps = None,
    epochs: Annotated[float, typer.Option(min=0.01)] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Pairs per optimiser step.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Pairs per forward pass.")] = 16,
    learning_rate: _Rate = None,
    lora_rank: _Rank = 64,
    centring: Annotated[float, typer.Option(min=0.0, help="Weight of a penalty that keeps scores around zero, such as 0.01.")] = 0.0,
    train_vision: Annotated[bool, typer.Option("--train-vision", help="Train the vision tower too.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Hold weights and compute in bfloat16.")] = False,
    held_out: Annotated[float, typer.Option(min=0.001, max=0.9, help="Share of the videos on which calibration is measured.")] = 0.1,
    seed: _Seed = 0,
    json: Json = None,
) -> None:
    """Train a VideoDRM on preference pairs with TRL, and calibrate it on held-out videos. Run again to resume.

    Example: ramet reward train-drm --model models/qwen --pairs runs/pairs/pairs.jsonl --videos clips --out runs/drm
    """
    from ramet.policy.engines.vision import VideoSettings
    from ramet.rewards.video.discriminative import DRMSettings
    from ramet.rewards.video.train_drm import DRMTraining
    from ramet.runs.reward_models import Source
    from ramet.runs.reward_training import train_drm_command

    if pooling not in ("last", "mean"):
        raise ConfigError(f"no pooling {pooling!r}; there are last and mean")
    settings = DRMSettings(pooling, VideoSettings(**_video(frames, fps, pixels)))  # type: ignore[arg-type]
    config = DRMTraining(
        steps,
        epochs,
        batch,
        at_once,
        learning_rate,
        lora_rank=lora_rank,
        centring=centring,
        train_vision=train_vision,
        seed=seed,
        bf16=bf16,
    )
    train_drm_command(model, Source(pairs, _map(field), videos), settings, config, held_out, out, json)


@reward.command("sft-grm")
def sft_grm(
    model: _Base,
    pairs: _Pairs,
    out: _Out,
    videos: _Videos = None,
    field: _Fields = None,
    traces: Annotated[str | None, typer.Option(help="Verdicts: rows with a pair's id, forward (better answer first?), output.")] = None,
    judge: Annotated[str | None, typer.Option(help="Model whose verdicts are learned; by default, the model itself.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Votes per order.")] = 4,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    max_tokens: _Tokens = None,
    temperature: _Temperature = None,
    steps: _Steps = None,
    batch: Annotated[int, typer.Option(min=1, help="Verdicts per optimiser step.")] = 32,
    at_once: Annotated[int, typer.Option(min=1, help="Verdicts per forward pass.")] = 16,
    learning_rate: _Rate = None,
    lora_rank: _Rank = 64,
    seed: _Seed = 0,
) -> None:
    """Train a VideoGRM on verdicts that are right in both orders. Run again to resume.

    Example: ramet reward sft-grm --model models/qwen --pairs pairs.jsonl --out runs/grm-sft
    """
    from ramet.policy.training.sft import SFTTraining
    from ramet.runs.reward_models import Overrides, Source
    from ramet.runs.reward_training import sft_grm_command

    overrides = Overrides(_video(frames, fps, pixels), _sampling(temperature, max_tokens))
    config = SFTTraining(steps, 1.0, batch, at_once, learning_rate, lora_rank=lora_rank, seed=seed)
    sft_grm_command(model, Source(pairs, _map(field), videos), traces, judge, k, overrides, config, out)


@reward.command("train-grm")
def train_grm(
    model: _Base,
    pairs: _Pairs,
    out: _Out,
    videos: _Videos = None,
    field: _Fields = None,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    max_tokens: _Tokens = None,
    updates: Annotated[int, typer.Option(min=1)] = 100,
    duels: Annotated[int, typer.Option(min=2, help="Duels per update: pairs times two orders.")] = 16,
    group_size: Annotated[int, typer.Option(min=2, help="Samples per duel.")] = 8,
    learning_rate: Annotated[float, typer.Option()] = 1e-6,
    kl_coef: Annotated[float, typer.Option(min=0.0, help="Coefficient of the KL divergence from the model at the start.")] = 0.0,
    lora_rank: _Rank = 0,
    seed: _Seed = 0,
) -> None:
    """Train a VideoGRM by reinforcement learning on its verdicts, with both orders in a batch. Run again to resume.

    Example: ramet reward train-grm --model runs/grm-sft/grm --pairs pairs.jsonl --out runs/grm
    """
    from ramet.policy.training.update import TrainConfig
    from ramet.runs.reward_models import Overrides, Source
    from ramet.runs.reward_training import train_grm_command

    overrides = Overrides(_video(frames, fps, pixels), _sampling(None, max_tokens))
    config = TrainConfig(
        updates=updates, tasks=duels, group_size=group_size, learning_rate=learning_rate, kl_coef=kl_coef, lora_rank=lora_rank,
        temperature=1.0,
    )
    with draining(logger.warning):
        train_grm_command(model, Source(pairs, _map(field), videos), overrides, config, seed, out)


@reward.command("score")
def score(
    model: _Model,
    question: Annotated[str, typer.Option()],
    answer: Annotated[list[str], typer.Option(help="May be repeated.")],
    video: Annotated[str | None, typer.Option(help="Video file, or a folder of pictures; by default, none.")] = None,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    json: Json = None,
) -> None:
    """Score answers to a question about a video.

    Example: ramet reward score --model runs/drm/drm --video clip.mp4 --question "What colour is the car?" --answer red --answer blue
    """
    from ramet.runs.reward_measuring import score_command
    from ramet.runs.reward_models import Overrides

    score_command(model, Overrides(_video(frames, fps, pixels)), video, question, answer, json)


@reward.command("judge")
def judge(
    model: _Model,
    question: Annotated[str, typer.Option()],
    first: Annotated[str, typer.Option(help="One answer.")],
    second: Annotated[str, typer.Option(help="Another answer.")],
    video: Annotated[str | None, typer.Option(help="Video file, or a folder of pictures; by default, none.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Votes per order.")] = 1,
    order: Annotated[str, typer.Option(help="both orders, or one at random.")] = "both",
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    max_tokens: _Tokens = None,
    temperature: _Temperature = None,
    seed: _Seed = 0,
) -> None:
    """Judge which of two answers is better, by votes in both orders.

    Example: ramet reward judge --model models/qwen --video clip.mp4 --question "What happens?" --first "A cat" --second "A dog" -k 5
    """
    from ramet.agents.tree import Segment
    from ramet.rewards.video.judge import AnswerPair
    from ramet.runs.reward_measuring import judge_command
    from ramet.runs.reward_models import Overrides

    overrides = Overrides(_video(frames, fps, pixels), _sampling(temperature, max_tokens))
    pair = AnswerPair("duel", None if video is None else Segment(video), question, first, second)
    judge_command(model, overrides, pair, k, order, seed)  # type: ignore[arg-type]


@reward.command("bench")
def bench(
    model: _Model,
    pairs: _Pairs,
    out: _Out,
    videos: _Videos = None,
    field: _Fields = None,
    conditions: Annotated[
        str, typer.Option(help="Which video is shown, and how: right, wrong, none, reversed, shuffled, separated by commas.")
    ] = "right,wrong,none",
    k: Annotated[str, typer.Option("-k", help="Votes per order; several numbers separated by commas.")] = "1",
    order: Annotated[str, typer.Option(help="both orders, or random: one order per pair, by the seed.")] = "both",
    temperature: _Temperature = None,
    max_tokens: _Tokens = None,
    pointwise: Annotated[bool, typer.Option("--pointwise", help="Have a model that judges rate answers one by one.")] = False,
    ties: Annotated[float, typer.Option(help="What a tie of scores counts: 0 or 0.5.")] = 0.0,
    frames: Annotated[str, typer.Option("--max-frames", help="Most frames per video, with commas; by default as trained, or 16.")] = "",
    pixels: _Pixels = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many pairs, the first ones.")] = None,
    seed: _Seed = 0,
    json: Json = None,
) -> None:
    """Measure how often a reward model prefers the better answer with the right video, another one, and none. Run again to resume.

    Example: ramet reward bench --model runs/drm/drm --pairs pairs.jsonl --out runs/bench --json bench.json
    """
    from ramet.benchmarks.evaluation.video_reward import CONDITIONS, BenchmarkProtocol
    from ramet.runs.reward_measuring import BenchmarkPlan, bench_command
    from ramet.runs.reward_models import Overrides, Source

    chosen = [c.strip() for c in conditions.split(",") if c.strip()]
    for condition in chosen:
        if condition not in CONDITIONS:
            raise ConfigError(f"no condition {condition!r}; there are {', '.join(CONDITIONS)}")
    if order not in ("both", "random") or ties not in (0.0, 0.5):
        raise ConfigError("--order is both or random, --ties is 0 or 0.5")
    if not chosen:
        raise ConfigError("--conditions is empty: name at least one")
    mode: Any = "pointwise" if pointwise else "pairwise"
    protocol = BenchmarkProtocol(mode, order=order, ties=ties, seed=seed)  # type: ignore[arg-type]
    plan = BenchmarkPlan(chosen, _numbers(k, "-k"), _numbers(frames, "--max-frames"), limit)
    overrides = Overrides(_video(None, None, pixels), _sampling(temperature, max_tokens))
    bench_command(model, Source(pairs, _map(field), videos), protocol, plan, overrides, out, json)


@reward.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a benchmark run.")],
    other: Annotated[Path | None, typer.Argument(help="Another run, to compare pair by pair.")] = None,
    ties: Annotated[float, typer.Option(help="What a tie of scores counts: 0 or 0.5.")] = 0.0,
    json: Json = None,
) -> None:
    """Recompute the results of a benchmark run from its records; for two runs, also their difference with a sign test over videos.

    Example: ramet reward report runs/bench-drm runs/bench-grm
    """
    from ramet.runs.reward_measuring import report_command

    report_command(run, other, ties, json)


@reward.command("best-of-n")
def best_of_n(
    model: _Model,
    questions: Annotated[str, typer.Option(help="Rows with id, video, question, answer, and optionally choices.")],
    answers: Annotated[str, typer.Option(help="What answers: a model directory, a file of answers, or guesser.")],
    out: _Out,
    videos: _Videos = None,
    field: _Fields = None,
    ns: Annotated[str, typer.Option("-n", help="Numbers of answers to pick from, separated by commas.")] = "1,2,4,8",
    method: Annotated[str, typer.Option(help="For a model that judges: knockout or round-robin.")] = "knockout",
    k: Annotated[int, typer.Option("-k", min=1, help="Votes per order.")] = 1,
    temperature: _Temperature = None,
    max_tokens: _Tokens = None,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
    seed: _Seed = 0,
    json: Json = None,
) -> None:
    """Measure the accuracy of picking the best of N answers, compared with pass@N, the majority vote and chance.

    Example: ramet reward best-of-n --model runs/drm/drm --questions questions.jsonl --answers guesser --out runs/best
    """
    from ramet.runs.reward_measuring import SelectionPlan, best_of_n_command
    from ramet.runs.reward_models import Overrides, Source

    if method not in ("knockout", "round-robin"):
        raise ConfigError(f"no method {method!r}; there are knockout and round-robin")
    plan = SelectionPlan(_numbers(ns, "-n"), method, k, seed)  # type: ignore[arg-type]
    overrides = Overrides(_video(frames, fps, pixels), _sampling(temperature, max_tokens))
    best_of_n_command(model, Source(questions, _map(field), videos), answers, plan, overrides, out, json)


@reward.command("serve")
def serve(
    model: _Model,
    videos: Annotated[Path, typer.Option(help="The only folder from which videos are read.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8765,
    linked: Annotated[list[Path] | None, typer.Option(help="Folder outside it to which links in it may lead. May be repeated.")] = None,
    frames: _Frames = None,
    fps: _Fps = None,
    pixels: _Pixels = None,
) -> None:
    """Serve scores over HTTP, also in OpenRLHF's protocol. The bearer token is taken from RAMET_REWARD_TOKEN, or a new one is printed.

    Example: RAMET_REWARD_TOKEN=... ramet reward serve --model runs/drm/drm --videos clips
    """
    require("starlette", "ramet reward serve", "reward")
    from ramet.env.longvideo import TOKEN
    from ramet.rewards.video.server import serve as run
    from ramet.runs.reward_models import Overrides, open_reward

    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    served = open_reward(model, Overrides(_video(frames, fps, pixels)), "score")
    which_token = f"token of {TOKEN}" if os.environ.get(TOKEN) else f"token {token}"
    messages.print(f"{served.name} on http://{host}:{port}/score and /get_reward, bearer {which_token}")
    run(served, videos, token, host, port, linked or [])
