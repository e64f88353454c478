"""Checkpoints: weights and optimiser state as safetensors, position and RNG beside them.

A checkpoint is a directory `step-000040` that is also a Hugging Face model directory, adapters merged into it; adapters
that are trained are kept beside it as they are. Weights are float32, whatever the model samples in. It is written under
another name and renamed when complete, so that whatever bears the name is whole.
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
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, among those of a run."""
    return directory / f"step-{step:06d}"


def save_checkpoint(
    directory: Path, step: int, masters: Masters, tokenizer: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `directory/step-NNNNNN`. Raises `StorageError` if the disk refuses; older checkpoints stay."""
    from safetensors.torch import save_file

    from ramet.policy.models.lora import adapted

    target = checkpoint_path(directory, step)
    draft = directory / f".{target.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        whole = masters.state()
        masters.model.save_pretrained(draft, **({} if whole is None else {"state_dict": whole}))
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
    """The complete checkpoint with the highest step."""
    found = sorted(path for path in directory.glob("step-*") if (path / TRAINER).exists())
    return found[-1] if found else None


def prune_checkpoints(directory: Path, keep: int) -> None:
    for path in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(path)


def load_checkpoint(path: Path, masters: Masters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights, optimiser and RNG in place; returns the saved state. Raises `CheckpointError`."""
    import torch
    from safetensors.torch import load_file

    named = masters.weights
    try:
        state: dict[str, Any] = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        weights = load_file(path / (ADAPTERS if (path / ADAPTERS).exists() else "model.safetensors"))
        if not (path / ADAPTERS).exists() and not named.keys() <= weights.keys():
            # Models that see store their weights under other names than they have.
            with quiet():
                kind = type(masters.model)
                again, found = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
            weights = weights if found["missing_keys"] else again.state_dict()
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
        found = {slot: slots[f"{name}.{slot}"] for slot in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{slot}" in slots}
        if found:
            optimizer.state[parameter] = {slot: value.clone() if slot == "step" else value.to(parameter) for slot, value in found.items()}
    return state


def _flatten(masters: Masters, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    import torch

    flat = {"rng_state": torch.get_rng_state()}
    for name, parameter in masters.weights.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}.{slot}"] = value.detach().contiguous()
    return flat
