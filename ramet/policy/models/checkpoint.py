"""Checkpoints: weights, optimiser state and random-number state as safetensors, and the trainer's own state as JSON.

A checkpoint is a directory `step-000040` that is also a Hugging Face model directory, with LoRA adapters merged into the weights;
trained adapters are stored beside them too, unmerged. Weights are float32, whatever dtype the model samples in. A checkpoint is written
under another name and renamed when it is complete, so that a directory with this name is never partial.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramet.errors import CheckpointError, StorageError
from ramet.terminal import quiet

if TYPE_CHECKING:
    import torch

    from ramet.policy.models.masters import Masters

ADAPTERS = "adapters.safetensors"
"""File of a checkpoint: the weights of trained LoRA adapters."""
OPTIMIZER = "optimizer.safetensors"
"""File of a checkpoint: the optimiser's state by weight, and the state of torch's random numbers."""
TRAINER = "trainer.json"
"""File of a checkpoint: its step, and what a run must share to resume it."""


def checkpoint_path(directory: Path, step: int) -> Path:
    """The path of the checkpoint of `step` in the folder `directory` of a run's checkpoints."""
    return directory / f"step-{step:06d}"


def save_checkpoint(
    directory: Path, step: int, masters: Masters, tokenizer: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `directory/step-NNNNNN` and return its path. Raises `StorageError` if it cannot be written; older checkpoints stay."""
    from safetensors.torch import save_file

    from ramet.policy.models.lora import adapted

    target = checkpoint_path(directory, step)
    draft = directory / f".{target.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        merged = masters.state()
        masters.model.save_pretrained(draft, **({} if merged is None else {"state_dict": merged}))
        if adapted(masters.model):
            save_file({name: weight.detach().contiguous() for name, weight in masters.weights.items()}, draft / ADAPTERS)
        tokenizer.save_pretrained(draft)
        save_file(_flatten(masters, optimizer), draft / OPTIMIZER)
        (draft / TRAINER).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(f"cannot write checkpoint {target}: {error.strerror or error}; free space and run again to resume") from error
    except Exception as error:  # safetensors raises its own class for a full disk
        if "No space left" not in str(error):
            raise
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(f"cannot write checkpoint {target}: no space left; free space and run again to resume") from error
    return target


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step; None if there is none."""
    complete = sorted(path for path in directory.glob("step-*") if (path / TRAINER).exists())
    return complete[-1] if complete else None


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` with the highest steps."""
    for path in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(path)


def load_checkpoint(path: Path, masters: Masters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights, optimiser state and random-number state in place. Returns the trainer's saved state.

    Raises `CheckpointError` for a checkpoint that cannot be read or does not fit the model.
    """
    import torch
    from safetensors.torch import load_file

    named = masters.weights
    try:
        state: dict[str, Any] = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        weights = load_file(path / (ADAPTERS if (path / ADAPTERS).exists() else "model.safetensors"))
        if not (path / ADAPTERS).exists() and not named.keys() <= weights.keys():
            # Vision-language models store their weights under other names than their parameters have.
            with quiet():
                kind = type(masters.model)
                loaded, info = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
            weights = weights if info["missing_keys"] else loaded.state_dict()
        slots = load_file(path / OPTIMIZER)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}); remove it to resume from an older one") from error
    except Exception as error:  # safetensors' own class for a damaged file
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); remove it to resume from an older one") from error
    for name, parameter in named.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {name} is missing or has another shape")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    masters.publish()
    torch.set_rng_state(slots.pop("rng_state"))
    for name, parameter in named.items():
        saved = {slot: slots[f"{name}.{slot}"] for slot in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{slot}" in slots}
        if saved:
            optimizer.state[parameter] = {slot: value.clone() if slot == "step" else value.to(parameter) for slot, value in saved.items()}
    return state


def _flatten(masters: Masters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    import torch

    flat = {"rng_state": torch.get_rng_state()}
    for name, parameter in masters.weights.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}.{slot}"] = value.detach().contiguous()
    return flat
