"""Training a few weights beside each matrix instead of all of them (LoRA, by peft), in place.

The adapted model stays the same object, so that whatever samples from it samples with the adapters. `merged` gives the
weights of a plain model that computes the same, for checkpoints that anything can load.
"""

from __future__ import annotations

from typing import Any

import torch

from ramet.errors import ConfigError, require

ADAPTER = "default"


def adapt(model: Any, rank: int, seed: int) -> None:
    """Add adapters of `rank` to every linear map of the decoder's layers; nothing else is trained. They begin as nothing.

    They are float32, whatever the model is in. Raises `ConfigError` where some of the layers' maps cannot be reached.
    """
    require("peft", "train.lora_rank")
    from peft import LoraConfig, inject_adapter_in_model

    inside = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and ".layers." in name}
    if not inside:
        raise ConfigError("adapters need a decoder whose linear maps stand in .layers.; train all weights (train.lora_rank=0)")
    fused = [name for name, weight in model.named_parameters() if ".layers." in name and weight.ndim > 2 and not _convolves(model, name)]
    if fused:
        raise ConfigError(f"adapters do not reach fused experts such as {fused[0]}; train all weights (train.lora_rank=0)")
    bare = [name for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2 and _bare(model, name)]
    if bare:
        raise ConfigError(f"adapters do not reach {bare[0]}, which is no torch.nn.Linear; train all weights (train.lora_rank=0)")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(inside)), model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
        if weight.requires_grad:
            weight.data = weight.data.float()


def _convolves(model: Any, weight: str) -> bool:
    return type(model.get_submodule(weight.rpartition(".")[0])).__name__.startswith("Conv")


def _bare(model: Any, weight: str) -> bool:
    """Is it a matrix that a module multiplies by itself, as some routers do?"""
    return not isinstance(model.get_submodule(weight.rpartition(".")[0]), torch.nn.Linear | torch.nn.Embedding)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def adapted(model: Any) -> dict[str, Any]:
    """The maps that have adapters, by name."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}


@torch.no_grad()
def merged(model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor] | None:
    """The state of a plain model that computes what the adapted one does; None for a model without adapters.

    In `dtype`; by default each weight in its own.
    """
    parts = adapted(model)
    if not parts:
        return None
    state = {
        name.replace(".base_layer.", "."): value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    for name, part in parts.items():
        weight = f"{name}.weight"
        state[weight] = state[weight] + part.get_delta_weight(ADAPTER).to(state[weight].dtype)
    return state
