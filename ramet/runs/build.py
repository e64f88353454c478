"""From a `RunConfig` to things that run: model, trainer, entries to measure.

What needs torch is imported where it is made: a server is measured without it.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.growth import seed_of
from ramet.agents.journal import fingerprint
from ramet.agents.tree import Task, Tree
from ramet.env.grading import reward_function
from ramet.env.instructions import instructed
from ramet.env.questions import Questions
from ramet.env.settings import words
from ramet.errors import ConfigError, require
from ramet.policy.engines.openai import ChatPolicy, CompletionsPolicy, ResponsesPolicy, WireFormat
from ramet.policy.models.catalogue import find, weights_id
from ramet.policy.openrlhf.settings import FREE
from ramet.policy.training.reward import Reward, RewardConfig, to_reward
from ramet.policy.training.runlog import RunLog
from ramet.policy.training.update import LearningProblem
from ramet.runs.equipment import equipment_of
from ramet.runs.settings import RunConfig, ServerConfig

if TYPE_CHECKING:
    from ramet.policy.engines.hf import HFPolicy
    from ramet.policy.training.trainer import Trainer


def open_model(config: RunConfig, path: Path | None = None) -> tuple[Any, Any, ChatFormat]:
    """The configured model (or the one at `path`), with the configured number of threads."""
    import torch

    from ramet.policy.models.load import auto_device, load_model

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device: str = config.device
    if device == "auto":
        device = auto_device()
    return load_model(path or find(config.model), config.chat, getattr(torch, config.dtype), device)


def open_engine(config: RunConfig, model: str | Path) -> tuple[Any, ChatFormat, Callable[[str], int]]:
    """The configured backend, for measuring: (policy, to be used as a context manager; chat format; the token count of a text).

    `model` is a directory or a name; for a chat server, the server's name for it ("" for its first).
    """
    if config.named_by_server:
        wire = WireFormat()
        kind = ResponsesPolicy if config.backend == "responses" else ChatPolicy
        return kind(config.url, wire, config.server.model or str(model) or None, **_spoken_to(config.server)), wire, words
    if config.backend == "vllm":
        require("vllm", "the backend vllm")
    from ramet.policy.models.tokenizer import load_tokenizer

    path = find(str(model))
    if config.attention.method != "dense":
        return _shared_engine(config, path)
    if config.backend == "transformers":
        weights, tokenizer, chat = open_model(config, path)
        # Room for the documents of some thirty tasks: methods come one after another, and begin alike.
        policy: Any = engine_of(config, weights, tokenizer, chat, prefix_bytes=2**31)
    else:
        tokenizer, chat = load_tokenizer(path, config.chat)
        if config.backend == "completions":
            policy = CompletionsPolicy(config.url, config.server.model or None, **_spoken_to(config.server))
        else:
            from ramet.policy.engines.vllm import VLLMPolicy

            policy = VLLMPolicy(path, dtype=config.dtype)
    return policy, chat, token_count(tokenizer)


def _spoken_to(server: ServerConfig) -> dict[str, Any]:
    """The keyword arguments of a server's policy."""
    return {
        "concurrency": server.concurrency, "seconds": server.timeout, "wait": server.startup_timeout, "names": server.names,
        "extra": server.extra_body, "headers": server.headers, "fold_system": server.fold_system,
    }  # fmt: skip


def _shared_engine(config: RunConfig, path: Path) -> tuple[Any, ChatFormat, Callable[[str], int]]:
    """The engine of a model on several workers."""
    from transformers import AutoConfig

    from ramet.policy.engines.sequence_parallel import SequenceParallelPolicy
    from ramet.policy.engines.vision import VideoReader
    from ramet.policy.models.tokenizer import load_tokenizer

    tokenizer, chat = load_tokenizer(path, config.chat)
    model, video = AutoConfig.from_pretrained(path, local_files_only=True), None
    if hasattr(model, "vision_config"):
        video = config.env.video_settings()
        chat.placeholder_ids = VideoReader(model, tokenizer, video).ids
    policy = SequenceParallelPolicy(path, config.attention, dtype=config.dtype, threads=config.threads, video=video)
    return policy, chat, token_count(tokenizer)


def engine_of(config: RunConfig, model: Any, tokenizer: Any, chat: ChatFormat, **options: Any) -> HFPolicy:
    """The transformers backend of a model, with vision for a vision-language model."""
    from ramet.policy.engines.hf import HFPolicy

    options["max_batch"] = config.train.max_batch
    if not hasattr(model.config, "vision_config"):
        return HFPolicy(model, **options)
    from ramet.policy.engines.vision import VideoReader, VisionPolicy

    reader = VideoReader(model.config, tokenizer, config.env.video_settings())
    chat.placeholder_ids = reader.ids
    return VisionPolicy(model, reader, **options)


def token_count(tokenizer: Any) -> Callable[[str], int]:
    """Tokens of a text, by this tokenizer."""
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def score_name(config: RunConfig) -> str:
    """What the score of a tree is called in tables and pictures: accuracy, or what else it is graded by."""
    if config.reward.function:
        return "score"
    metric = getattr(config.env, "metric", "em")
    return {"em": "accuracy", "reward": "reward model's score"}.get(metric, metric)


def engine_id(config: RunConfig, model: str | Path) -> str:
    """The identity of an engine in a journal: its weights, or the name that a chat server has for them."""
    return f"{config.backend} {config.server.model or model}" if config.named_by_server else weights_id(find(str(model)))


def learning_problem(config: RunConfig, count: Callable[[str], int], spawn: bool = True) -> LearningProblem:
    """The configured tasks and reward of a training run, for any trainer. `count` returns the tokens of a text."""
    env = config.env.build(count)
    # The two functions refer to what their results depend on, and to nothing else: all of that is compared when a run is resumed.
    seed, tasks_each, budgets = config.seed, config.train.tasks, config.budgets
    instruction = config.env.instruction(spawn) if config.env.language else ""
    budget = config.budget if spawn else config.budget.model_copy(update={"depth": 0})

    def sample_tasks(update: int) -> list[tuple[Task, Budget]]:
        rng = random.Random(f"budgets/{seed}/{update}")
        if isinstance(env, Questions):
            tasks = env.training(update * tasks_each, tasks_each, seed)
        else:
            tasks = env.tasks("train", tasks_each, seed_of(seed, "tasks", update))
        if instruction:
            tasks = [instructed(task, instruction) for task in tasks]
        return [(task, budget.model_copy(update={"generated": rng.choice(budgets)}) if budgets else budget) for task in tasks]

    grade, weights, prices = reward_function(env, config.reward.function), config.reward.weights, config.penalty

    def priced(value: Any, task: Task, tree: Tree) -> Reward:
        given = to_reward(value, task, weights)
        penalties = prices.penalties(tree)
        earned = prices.reward(tree, given.reward, penalties)
        for name, penalty in given.penalties.items():
            penalties[name] = penalties.get(name, 0.0) + penalty
        return Reward(given.score, penalties, earned, given.parts)

    async def priced_later(value: Awaitable[Any], task: Task, tree: Tree) -> Reward:
        return priced(await value, task, tree)

    def reward_of(task: Task, tree: Tree) -> Reward | Awaitable[Reward]:
        value = grade(task, tree)
        return priced_later(value, task, tree) if inspect.isawaitable(value) else priced(value, task, tree)

    # The code of other packages is compared by `claim_folder`.
    return LearningProblem(sample_tasks, reward_of, rewarding=rewarding(config), compared=not config.code())


def rewarding(config: RunConfig) -> RewardConfig:
    """How trees are rewarded: without a time limit where grading waits for a server, within limits of its own."""
    return config.reward.model_copy(update={"timeout": math.inf}) if config.env.waits and not config.reward.function else config.reward


def run_fingerprint(config: RunConfig, spawn: bool) -> str:
    """The identity of a training run: its settings, data and initial weights."""
    settings = config.identity()
    settings["openrlhf"] = {name: value for name, value in settings["openrlhf"].items() if name not in FREE}
    return fingerprint(settings, config.env.files(), spawn, weights_id(find(config.model)))


def make_trainer(config: RunConfig, directory: Path, spawn: bool = True) -> Trainer:
    """A trainer of the configured model; without `spawn` the tool is never offered."""
    from ramet.policy.training.trainer import Learner, Trainer

    if config.backend != "transformers":
        raise ConfigError(f"training samples with the backend transformers; {config.backend} measures only")
    if config.attention.method != "dense":
        raise ConfigError("training samples with dense attention; attention.method is for measuring")
    model, tokenizer, chat = open_model(config)
    engine = engine_of(config, model, tokenizer, chat)
    learner = Learner(engine, tokenizer, chat, config.tell_budget == "all", equipment_of(config, open_engine))
    problem = replace(learning_problem(config, token_count(tokenizer), spawn), fingerprint=run_fingerprint(config, spawn))
    return Trainer(learner, problem, config.train, directory, config.seed, config.transcript_bytes)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a training run, by update. A line that is not whole is left out."""
    return RunLog(directory).read()
