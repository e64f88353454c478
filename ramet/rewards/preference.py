"""A reward model for text: any sequence classifier with one output, which scores whole answers.

reward = PreferenceModel(path)
reward.score("What is 2+2?", "It is 4.")
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ramet.agents.chat import chat_format, turn_end
from ramet.agents.encoding import TextEncoder
from ramet.agents.tree import Message
from ramet.errors import CheckpointError, RewardError, first_line


class PreferenceModel:
    """Scores (question, answer) pairs with the model in a directory, formatted by its chat template if it has one."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not (path / "config.json").exists():
            raise CheckpointError(f"{path} is not a model directory: it has no config.json")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._model = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True).eval()
        except Exception as error:  # transformers raises many classes for a broken directory
            raise CheckpointError(f"reward model {path} cannot be loaded: {first_line(error)}") from error
        self._encode = TextEncoder(self._tokenizer)
        if self._model.config.num_labels != 1:
            raise CheckpointError(f"{path} has {self._model.config.num_labels} outputs; a reward model has one")

    @torch.inference_mode()
    def score(self, question: str, answer: str) -> float:
        """The score of an answer; higher is better. Raises `RewardError` for text beyond the context and scores that are not finite."""
        if self._tokenizer.chat_template:
            chat = chat_format("auto", self._tokenizer)
            ids = [*chat.render([Message("user", question)], tools=()), *self._encode(answer), turn_end(chat)]
        else:
            ids = self._encode(f"{question}\n{answer}")
        limit = self._model.config.max_position_embeddings
        if len(ids) > limit:
            raise RewardError(f"{len(ids)} tokens are more than the reward model's {limit}; nothing is scored in part")
        value = float(self._model(input_ids=torch.tensor([ids], device=self._model.device)).logits[0, 0])
        if not math.isfinite(value):
            raise RewardError(f"the reward model gives {value}; its weights are broken")
        return value
