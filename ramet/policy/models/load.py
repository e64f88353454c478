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
"""Returns the keyword arguments with which a model is called on one batch."""


def auto_device() -> str:
    """"cuda" where torch finds a GPU, else "cpu"; an empty CUDA_VISIBLE_DEVICES selects the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def steady_context(config: Any) -> int:
    """The longest context, in tokens, in which the rotary angles of a row do not depend on the other rows of its batch.

    Rotary embeddings of the types longrope and dynamic change the angles of a whole batch once one of its rows is longer than
    the context of pretraining.
    """
    text = config.get_text_config()
    longest: int = text.max_position_embeddings
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in [parameters, *(per_layer for per_layer in parameters.values() if isinstance(per_layer, dict))]:
        if rope.get("rope_type") == "longrope":
            longest = min(longest, rope.get("original_max_position_embeddings") or longest)
    return longest


def without_dropout(model: torch.nn.Module) -> None:
    """Turn off all dropout of a model for good: it samples without dropout, and must compute the same log-probabilities in training."""
    for part in model.modules():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(part, torch.nn.modules.dropout._DropoutNd))):
                setattr(part, name, 0.0)


def load_model(path: Path, chat: str = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any, ChatFormat]:
    """(model, tokenizer, chat format) from a local model directory, the model on `device` in `dtype`. Raises `CheckpointError`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    tokenizer, format_ = load_tokenizer(path, chat)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"model directory {path} has no safetensors weights")
    try:
        with quiet():
            has_vision = hasattr(AutoConfig.from_pretrained(path, local_files_only=True), "vision_config")
            kind = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
            model = kind.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    except Exception as error:  # transformers raises many classes for a broken directory
        raise CheckpointError(f"model directory {path} cannot be loaded: {first_line(error)}") from error
    return model.to(device).eval(), tokenizer, format_
