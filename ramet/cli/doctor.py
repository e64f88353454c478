"""`ramet doctor`: what is installed, what works, and what to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

from rich.text import Text

from ramet.agents import drain
from ramet.errors import RametError, extra
from ramet.storage import meta, write_json
from ramet.terminal import Table, show

PARTS = {
    "torch": "sampling and training",
    "transformers": "models and tokenizers; the backend completions",
    "tensorboard": "learning curves in TensorBoard",
    "peft": "train.lora_rank",
    "matplotlib": "pictures",
    "av": "frames of videos",
    "datasets": "questions from Parquet files and hubs",
    "bm25s": "the method retrieve; search_tool",
    "reasoning_gym": "the environment gym",
    "gguf": "ramet models get",
    "mcp": "tools of MCP servers",
    "pydantic_monty": "python_tool",
    "trl": "training a VideoDRM",
    "uvicorn": "ramet serve",
    "vllm": "the backend vllm",
    "openrlhf": "ramet train --trainer openrlhf",
}
"""What the modules of the extras are for."""


def _version(module: str) -> str:
    """The version of an installed module. vLLM for CPUs is installed under a name other than its module's."""
    for name in (module, f"{module}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _missing_requirements() -> list[str]:
    """Packages that the base install requires but are not installed; empty too if ramet runs from its source without an installation."""
    try:
        required = importlib.metadata.requires("ramet") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]
    return [name for name in names if not any(importlib.metadata.distributions(name=name))]


def _nano_works() -> str:
    """Sample from the shipped model and return what it answered."""
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


def _gpu() -> str:
    """The name of the GPU, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none: everything runs on the CPU"


class _Findings:
    """The results of the checks, as a table and as records; `broken` names the failed ones."""

    def __init__(self) -> None:
        self.table = Table("what", "state", "for")
        self.records: list[dict[str, object]] = []
        self.broken: list[str] = []

    def note(self, what: str, state: str, purpose: str, ok: bool = True, optional: bool = False) -> None:
        """Add a check. One that is not `ok` counts as broken unless it is `optional`."""
        self.table.add_row(what, Text(state, "green" if ok else "" if optional else "red"), purpose)
        self.records.append({"record": "check", "what": what, "ok": ok, "optional": optional, "state": state})
        if not ok and not optional:
            self.broken.append(what)


def _check() -> _Findings:
    """Run all checks. An extra that is not installed is not a fault; one that is installed but cannot be imported is."""
    from ramet.policy.models.catalogue import CATALOGUE, cache

    findings = _Findings()
    findings.note("python", sys.version.split()[0], "3.11 or newer", sys.version_info >= (3, 11))
    missing = _missing_requirements()
    state = f"without {', '.join(missing)}: pip install ramet" if missing else "complete"
    findings.note("base install", state, "agents, servers", not missing)
    for module, purpose in PARTS.items():
        here = importlib.util.find_spec(module) is not None
        name = module.replace("_", "-")
        findings.note(name, _version(name) if here else f"not installed: {extra(module)}", purpose, here, optional=True)
    if importlib.util.find_spec("trio") is not None:
        findings.note("trio", _version("trio"), "the runtime's second backend")
    if importlib.util.find_spec("flash_attn") is not None:
        findings.note("flash-attn", _version("flash-attn"), "attention kernels on NVIDIA GPUs")
    needed = [module for module in ("torch", "transformers", "safetensors") if importlib.util.find_spec(module) is None]
    if needed:
        findings.note("nano model", f"not tested without {', '.join(needed)}", "ramet demo, run, train, eval", False, optional=True)
    else:
        for what, check, purpose in (("CUDA", _gpu, "larger models"), ("nano model", _nano_works, "ramet demo, run, train, eval")):
            try:
                findings.note(what, check(), purpose)
            except (RametError, RuntimeError, OSError, ImportError) as error:
                findings.note(what, str(error), purpose, False)
    for name, model in CATALOGUE.items():
        here = (cache() / name / "config.json").exists()
        state = "fetched" if here else f"not fetched: ramet models get {name}"
        findings.note(name, state, model.about.partition(",")[0], here, optional=True)
    return findings


def run_doctor(out: Path | None) -> None:
    """Print the table. Raises `RametError` only if the base install or something that is installed does not work."""
    findings = _check()
    show(findings.table)
    if out is not None:
        write_json(out, [meta("doctor", 0), *findings.records])
    if findings.broken:
        raise RametError(f"not working: {', '.join(findings.broken)}; the table says what to do")
