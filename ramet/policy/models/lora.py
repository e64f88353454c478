"""LoRA adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685), added in place with peft.

The adapted model stays the same object, so whatever samples from it uses the adapters. `merged` returns the
state dict of an equivalent model without adapters, for checkpoints that any library can load.
"""

from __future__ import annotations

from typing import Any

import torch

from ramet.errors import ConfigError, require

ADAPTER = "default"


def adapt(model: Any, rank: int, seed: int) -> None:
    """Add adapters of `rank` to every linear map of the decoder's layers, and freeze everything else. At first they change no output.

    Adapters are float32, whatever the model's dtype. Raises `ConfigError` if some of the layers' matrices cannot be adapted.
    """
    require("peft", "train.lora_rank")
    from peft import LoraConfig, inject_adapter_in_model

    inside = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and ".layers." in name}
    if not inside:
        raise ConfigError("adapters need a decoder with linear maps under .layers.; train all weights (train.lora_rank=0)")
    fused = [name for name, weight in model.named_parameters() if ".layers." in name and weight.ndim > 2 and not _convolves(model, name)]
    if fused:
        raise ConfigError(f"adapters do not support fused experts such as {fused[0]}; train all weights (train.lora_rank=0)")
    bare = [name for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2 and _bare(model, name)]
    if bare:
        raise ConfigError(f"adapters do not support {bare[0]}, which is not a torch.nn.Linear; train all weights (train.lora_rank=0)")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(inside)), model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
        if weight.requires_grad:
            weight.data = weight.data.float()


def _convolves(model: Any, weight: str) -> bool:
    """Whether the weight is that of a convolution."""
    return type(model.get_submodule(weight.rpartition(".")[0])).__name__.startswith("Conv")


def _bare(model: Any, weight: str) -> bool:
    """Whether a module multiplies by this matrix itself, as some routers do, instead of through a Linear or Embedding."""
    return not isinstance(model.get_submodule(weight.rpartition(".")[0]), torch.nn.Linear | torch.nn.Embedding)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def adapted(model: Any) -> dict[str, Any]:
    """The modules that have adapters, by name."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "get_delta_weight")}


@torch.no_grad()
def merged(model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor] | None:
    """The state dict of an equivalent model without adapters, in `dtype` (by default each weight in its own).

    None for a model that has no adapters.
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
