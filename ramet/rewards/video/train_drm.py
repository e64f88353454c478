"""Training a VideoDRM with TRL's `RewardTrainer`, on tokenised rows and with our own collator.

The vision encoder is frozen by default. Answers are never truncated: a pair that is longer than `max_tokens` is left out and counted, and
so is one whose video cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramet.errors import RewardError, require
from ramet.policy.models.lora import adapt
from ramet.policy.training.sft import Report, SFTTraining, in_float32, run_to_the_end
from ramet.rewards.video.discriminative import VideoDRM
from ramet.rewards.video.pairs import PreferencePair, readable
from ramet.terminal import quiet


@dataclass(frozen=True)
class DRMTraining(SFTTraining):
    """Settings of one training; rows are pairs. See `SFTTraining`.

    centring       weight of the mean squared sum of a pair's scores, which keeps scores near zero
    train_vision   also train the vision encoder, which only models trained from scratch need
    """

    batch: int = 64
    save_every: int = 100
    centring: float = 0.0
    max_tokens: int = 16384
    train_vision: bool = False


def train_drm(
    drm: VideoDRM, pairs: Sequence[PreferencePair], config: DRMTraining, folder: Path, report: Report | None = None
) -> dict[str, Any]:
    """Train in place, resuming from the last checkpoint in `folder/checkpoints`. Returns counts and the log.

    Raises `ConfigError` if TRL is missing, `RewardError` if no pair is left.
    """
    require("trl", "training a VideoDRM")
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    usable, faults = readable(pairs, drm.reader)
    rows, long = _rows(drm, usable, config.max_tokens)
    if not rows:
        unread = f", and the videos of {len(faults)} cannot be read, such as: {faults[0]}" if faults else ""
        raise RewardError(f"no pair is left to train on: {long} of {len(pairs)} are longer than {config.max_tokens} tokens{unread}")
    scorer = drm.scorer
    scorer.requires_grad_(True)
    if config.lora_rank:
        adapt(scorer, config.lora_rank, config.seed)
        scorer.score.requires_grad_(True)
    scorer.model.visual.requires_grad_(config.train_vision)
    checkpoints = folder / "checkpoints"
    known = {each.name for each in fields(RewardConfig)}
    recomputing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"  # by release
    arguments = RewardConfig(
        **config.arguments(checkpoints, scorer.device), max_length=None, center_rewards_coefficient=config.centring or None,
        **{recomputing: False},
    )  # fmt: skip
    with quiet(), in_float32(scorer):
        trainer = RewardTrainer(
            model=scorer, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=Collator(drm, usable),
            processing_class=drm.tokenizer,
        )  # fmt: skip
        log = run_to_the_end(trainer, checkpoints, report)
    scorer.eval().requires_grad_(False)
    drm.forget()
    return {"pairs": len(rows), "too_long": long, "unreadable": len(faults), "steps": trainer.state.global_step, "log": log}


def fits(drm: VideoDRM, pair: PreferencePair, max_tokens: int) -> bool:
    """Whether the pair's video can be read and none of its answers is too long."""
    return bool(readable([pair], drm.reader)[0]) and not _rows(drm, [pair], max_tokens)[1]


def _rows(drm: VideoDRM, pairs: Sequence[PreferencePair], max_tokens: int) -> tuple[list[dict[str, Any]], int]:
    """A row for each chosen and rejected answer, and how many were too long."""
    rows: list[dict[str, Any]] = []
    long = 0
    max_tokens = min(max_tokens, drm.scorer.config.get_text_config().max_position_embeddings)
    margins = any(pair.margin is not None for pair in pairs)
    for number, pair in enumerate(pairs):
        prompt = list(drm.prompt(pair.video, pair.question).ids)
        chosen = drm.answer_ids(pair.chosen)
        for rejected in map(drm.answer_ids, pair.rejected):
            if len(prompt) + max(len(chosen), len(rejected)) > max_tokens:
                long += 1
                continue
            row = {"chosen_ids": chosen, "rejected_ids": rejected, "number": number}
            rows.append(row | ({"margin": pair.margin or 0.0} if margins else {}))
    return rows, long


@dataclass
class Collator:
    """Rows to the inputs of `ScalarHeadModel`: all chosen answers, then all rejected ones."""

    drm: VideoDRM
    pairs: Sequence[PreferencePair]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of 2 n sequences for n rows, with `margin` [n] where the rows have one."""
        prompts = [self.drm.prompt(self.pairs[row["number"]].video, self.pairs[row["number"]].question) for row in rows]
        answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        inputs = self.drm.batch(prompts * 2, answers)
        if "margin" in rows[0]:
            inputs["margin"] = torch.tensor([row["margin"] for row in rows])
        return inputs
