"""Training a VideoDRM by TRL's `RewardTrainer`: pre-tokenised rows, a collator of ours, nothing of the trainer replaced.

The vision tower is frozen. An answer is never cut: a pair that is longer than `max_tokens` is left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramet.errors import ConfigError, RewardError
from ramet.policy.lora import adapt
from ramet.policy.models import quiet
from ramet.policy.sft import Report, passes, run_to_the_end
from ramet.rewards.video.discriminative import VideoDRM
from ramet.rewards.video.pairs import Pair


@dataclass(frozen=True)
class DRMTraining:
    """Settings of one training. The defaults are for a pretrained model trained with adapters.

    steps          optimiser steps; None: `epochs` over the pairs
    batch          pairs a step
    at_once        pairs of one pass; a step adds up several
    learning_rate  by default 1e-4 with adapters, 1e-5 without
    lora_rank      0: all weights of the decoder are trained
    centring       weight of the mean squared sum of a pair's scores, which keeps scores around zero
    train_vision   train the tower too: only for models from nothing
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 64
    at_once: int = 16
    learning_rate: float | None = None
    warmup: float = 0.03
    lora_rank: int = 64
    centring: float = 0.0
    max_tokens: int = 16384
    train_vision: bool = False
    save_every: int = 100
    seed: int = 0
    bf16: bool = False


def train_drm(drm: VideoDRM, pairs: Sequence[Pair], config: DRMTraining, folder: Path, report: Report | None = None) -> dict[str, Any]:
    """Train in place; checkpoints lie in `folder/checkpoints`, from the last of which it goes on. Returns counts and the log.

    Raises `ConfigError` where TRL is missing, `RewardError` where no pair is left.
    """
    try:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer
    except ImportError:
        raise ConfigError("training a VideoDRM needs TRL: pip install 'ramet[reward]'") from None

    rows, long = _rows(drm, pairs, config.max_tokens)
    if not rows:
        raise RewardError(f"no pair is left to train on: {long} of {len(pairs)} are longer than {config.max_tokens} tokens")
    scorer = drm.scorer
    scorer.requires_grad_(True)
    if config.lora_rank:
        adapt(scorer, config.lora_rank, config.seed)
        scorer.score.requires_grad_(True)
    scorer.model.visual.requires_grad_(config.train_vision)
    rate = config.learning_rate or (1e-4 if config.lora_rank else 1e-5)
    checkpoints = folder / "checkpoints"
    arguments = RewardConfig(
        output_dir=str(checkpoints), learning_rate=rate, max_steps=config.steps or -1, num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch // passes(config.batch, config.at_once),
        gradient_accumulation_steps=passes(config.batch, config.at_once),
        lr_scheduler_type="cosine", warmup_steps=config.warmup, max_length=None, remove_unused_columns=False,
        center_rewards_coefficient=config.centring or None, save_steps=config.save_every, save_total_limit=1, logging_steps=10,
        bf16=config.bf16, use_cpu=scorer.device.type == "cpu", activation_checkpointing=False, report_to=[], seed=config.seed,
        disable_tqdm=True, dataloader_pin_memory=False, weight_decay=0.0,
    )  # fmt: skip
    with quiet():
        trainer = RewardTrainer(
            model=scorer, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=Collator(drm, pairs),
            processing_class=drm.tokenizer,
        )  # fmt: skip
        log = run_to_the_end(trainer, checkpoints, report)
    scorer.eval().requires_grad_(False)
    drm.forget()
    return {"pairs": len(rows), "too_long": long, "steps": trainer.state.global_step, "log": log}


def fits(drm: VideoDRM, pair: Pair, most: int) -> bool:
    """Is no answer of the pair too long?"""
    most = min(most, drm.scorer.config.get_text_config().max_position_embeddings)
    longest = max(len(drm.answer_ids(answer)) for answer in (pair.chosen, *pair.rejected))
    return len(drm.prompt(pair.video, pair.question).ids) + longest <= most


def _rows(drm: VideoDRM, pairs: Sequence[Pair], most: int) -> tuple[list[dict[str, Any]], int]:
    """A row for each chosen and rejected answer, and how many were too long."""
    rows: list[dict[str, Any]] = []
    long = 0
    most = min(most, drm.scorer.config.get_text_config().max_position_embeddings)
    margins = any(pair.margin is not None for pair in pairs)
    for number, pair in enumerate(pairs):
        prompt = list(drm.prompt(pair.video, pair.question).ids)
        chosen = drm.answer_ids(pair.chosen)
        for rejected in map(drm.answer_ids, pair.rejected):
            if len(prompt) + max(len(chosen), len(rejected)) > most:
                long += 1
                continue
            row = {"chosen_ids": chosen, "rejected_ids": rejected, "number": number}
            rows.append(row | ({"margin": pair.margin or 0.0} if margins else {}))
    return rows, long


@dataclass
class Collator:
    """Rows to the inputs of `Scorer`: all chosen answers, then all rejected ones."""

    drm: VideoDRM
    pairs: Sequence[Pair]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [self.drm.prompt(self.pairs[row["number"]].video, self.pairs[row["number"]].question) for row in rows]
        answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        inputs = self.drm.batch(prompts * 2, answers)
        if "margin" in rows[0]:
            inputs["margin"] = torch.tensor([row["margin"] for row in rows])
        return inputs
