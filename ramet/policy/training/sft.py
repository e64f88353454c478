"""Supervised fine-tuning on demonstrations, before reinforcement learning.

Uses transformers' own `Trainer` on sequences of token ids with a mask of the tokens to learn. Sequences may contain videos; the
vision tower is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ramet.agents.tree import Segment
from ramet.errors import CheckpointError
from ramet.policy.engines.vision import VideoReader, VideoSequence, model_inputs
from ramet.policy.models.load import steady_context
from ramet.policy.models.lora import adapt, trainable
from ramet.terminal import quiet

IGNORED = -100
"""The label of a token that is not learned, as transformers has it."""
Report = Callable[[dict[str, float]], None]
"""Called with each entry of a trainer's log."""


@dataclass(frozen=True)
class Example:
    """One sequence: `mask` is True for the tokens to learn, `media` what the placeholders among the ids stand for, in order."""

    ids: Sequence[int]
    mask: Sequence[bool]
    media: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class SFTTraining:
    """Settings of training with transformers. The defaults suit a pretrained model with LoRA adapters.

    steps          optimiser steps; None: `epochs` passes over the data
    batch          rows per optimiser step
    at_once        rows per forward pass, at most; a step accumulates the gradients of several
    learning_rate  by default 1e-4 with adapters, 1e-5 without
    warmup         of the learning rate: a share of the steps below 1, a number of steps from 1 on
    lora_rank      0: all weights of the decoder are trained
    save_every     optimiser steps between checkpoints
    bf16           compute in bfloat16 where autocast allows it
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 32
    at_once: int = 16
    learning_rate: float | None = None
    warmup: float = 0.03
    lora_rank: int = 64
    save_every: int = 200
    seed: int = 0
    bf16: bool = False

    def arguments(self, folder: Path, device: torch.device) -> dict[str, Any]:
        """Arguments of transformers' `TrainingArguments`. The rows of a step are divided into equal forward passes."""
        passes = next(n for n in range(1, self.batch + 1) if self.batch % n == 0 and self.batch // n <= self.at_once)
        return {
            "output_dir": str(folder), "learning_rate": self.learning_rate or (1e-4 if self.lora_rank else 1e-5),
            "max_steps": self.steps or -1, "num_train_epochs": self.epochs, "per_device_train_batch_size": self.batch // passes,
            "gradient_accumulation_steps": passes, "lr_scheduler_type": "cosine", "warmup_steps": self.warmup, "weight_decay": 0.0,
            "remove_unused_columns": False, "save_steps": self.save_every, "save_total_limit": 1, "logging_steps": 10, "bf16": self.bf16,
            "use_cpu": device.type == "cpu", "report_to": [], "seed": self.seed, "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip


def fine_tune(
    model: Any, examples: Sequence[Example], pad: int, config: SFTTraining, folder: Path, reader: VideoReader | None = None,
    report: Report | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train the model in place, from the last checkpoint in `folder` on. Returns the log of losses.

    Raises `CheckpointError` if no token is to be learned, or an example is longer than the model's context (`steady_context`).
    """
    from transformers import Trainer, TrainingArguments

    if not any(any(example.mask) for example in examples):
        raise CheckpointError("no example has a token to learn")
    longest, limit = max(len(example.ids) for example in examples), steady_context(model.config)
    if longest > limit:
        raise CheckpointError(f"an example of {longest} tokens is longer than the {limit} that the model can be trained on")
    model.requires_grad_(True)
    if config.lora_rank:
        adapt(model, config.lora_rank, config.seed)
    if reader is not None:
        model.model.visual.requires_grad_(False)
    arguments = TrainingArguments(**config.arguments(folder, model.device))
    with quiet(), in_float32(model):
        collator = _Collator(model.config, pad, reader)
        trainer = Trainer(model=model, args=arguments, train_dataset=list(examples), data_collator=collator)
        log = run_to_the_end(trainer, folder, report)
    model.eval()
    return log


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, the trainable weights are float32: in bfloat16 most updates would round to nothing (see `masters`)."""
    before = {name: weight.dtype for name, weight in trainable(model).items()}
    for weight in trainable(model).values():
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for name, weight in trainable(model).items():
            weight.data = weight.data.to(before[name])


WEIGHTS = "trained.safetensors"
"""File of a checkpoint of transformers: the trainable weights, by the names of the model's parameters."""


def run_to_the_end(trainer: Any, folder: Path, report: Report | None) -> list[dict[str, float]]:
    """Run a trainer of transformers from the last complete checkpoint in `folder`. Returns its log of losses; `report` gets each entry.

    The trainable weights are stored beside each checkpoint under the names of the parameters: transformers stores vision-language models
    and models with adapters under other names, and would then load a part of them without an error.
    """
    from transformers import PrinterCallback, TrainerCallback

    class WeightsCallback(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if report is not None and logs and "loss" in logs:
                report({"step": state.global_step, **logs})

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights = {name: weight.detach().contiguous() for name, weight in trainable(model).items()}
            path = folder / f"checkpoint-{state.global_step}"
            save_file(weights, path / f"{WEIGHTS}.draft")
            (path / f"{WEIGHTS}.draft").replace(path / WEIGHTS)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if last is not None:
                saved = load_file(last / WEIGHTS)
                with torch.no_grad():
                    for name, weight in trainable(model).items():
                        weight.copy_(saved[name])

    complete = [path for path in folder.glob("checkpoint-*") if (path / WEIGHTS).exists() and (path / "trainer_state.json").exists()]
    last = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    trainer.add_callback(WeightsCallback())
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@dataclass
class _Collator:
    config: Any
    pad: int
    reader: VideoReader | None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        inputs = self._inputs(examples)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for place, example in enumerate(examples):
            learned = torch.tensor(example.mask)
            labels[place, : len(example.ids)] = torch.where(learned, torch.tensor(example.ids), IGNORED)
        return inputs | {"labels": labels}

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        if self.reader is not None:
            sequences = [VideoSequence(e.ids, tuple(self.reader(s).video for s in e.media)) for e in examples]
            return model_inputs(self.config, sequences, self.pad)
        ids = [torch.tensor(e.ids) for e in examples]
        padded = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": padded(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": padded([torch.ones_like(row) for row in ids], batch_first=True),
        }
