"""Load a model directory: weights, tokenizer, chat format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ramet.agents.chat import ChatFormat
from ramet.errors import CheckpointError, first_line
from ramet.policy.models.tokenizer import load_tokenizer
from ramet.terminal import quiet

Inputs = Callable[[torch.nn.Module], Mapping[str, torch.Tensor]]
"""What a batch gives a model: by the names of its arguments."""


def auto_device() -> str:
    """A GPU where torch finds one; an empty CUDA_VISIBLE_DEVICES keeps to the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def steady_context(config: Any) -> int:
    """The longest context in which a token is turned by its position alone, and not by how long the longest row of its batch is.

    Rotary embeddings of the kinds longrope and dynamic change all angles of a batch once one of its rows is longer than what
    the model was first trained on.
    """
    text = config.get_text_config()
    longest: int = text.max_position_embeddings
    said = getattr(text, "rope_parameters", None) or {}
    for rope in [said, *(each for each in said.values() if isinstance(each, dict))]:
        if rope.get("rope_type") == "longrope":
            longest = min(longest, rope.get("original_max_position_embeddings") or longest)
    return longest


def without_dropout(model: torch.nn.Module) -> None:
    """Turn off everything that is dropped at random in training, for good: what was sampled was computed without it."""
    for part in model.modules():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(part, torch.nn.modules.dropout._DropoutNd))):
                setattr(part, name, 0.0)


def load_model(path: Path, chat: str = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any, ChatFormat]:
    """(model, tokenizer, chat format) of a local directory. Raises `CheckpointError` for what is missing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    tokenizer, format_ = load_tokenizer(path, chat)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"model directory {path} has no safetensors weights")
    try:
        with quiet():
            sees = hasattr(AutoConfig.from_pretrained(path, local_files_only=True), "vision_config")
            kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model = kind.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    except Exception as error:  # transformers raises many classes for a broken directory
        raise CheckpointError(f"model directory {path} cannot be loaded: {first_line(error)}") from error
    return model.to(device).eval(), tokenizer, format_
