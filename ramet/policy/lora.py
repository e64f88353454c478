"""Training a few weights beside each matrix instead of all of them (LoRA, by peft), in place.

The adapted model stays the same object, so that whatever samples from it samples with the adapters. `merged` gives the
weights of a plain model that computes the same, for checkpoints that anything can load.
"""

from __future__ import annotations

from typing import Any

import torch

from ramet.errors import ConfigError

ADAPTER = "default"


def adapt(model: Any, rank: int, seed: int) -> None:
    """Add adapters of `rank` to every linear map of the decoder's layers; nothing else is trained. They begin as nothing."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("train.lora_rank needs peft: pip install 'ramet[data]'") from None
    inside = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and ".layers." in name}
    if not inside:
        raise ConfigError("adapters need a decoder whose linear maps stand in .layers.; train all weights (train.lora_rank=0)")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(inside)), model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def merged(model: Any) -> dict[str, torch.Tensor] | None:
    """The state of a plain model that computes what the adapted one does; None for a model without adapters."""
    adapted = {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}
    if not adapted:
        return None
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if "lora_" not in name}
    for name, part in adapted.items():
        weight = f"{name}.weight"
        state[weight] = state[weight] + part.get_delta_weight(ADAPTER).to(state[weight].dtype)
    return state
