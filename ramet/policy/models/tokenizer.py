"""Load the tokenizer and the chat format of a model directory. Needs no torch: a completions server samples elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ramet.agents.chat import ChatFormat, chat_format
from ramet.errors import CheckpointError, first_line


def load_tokenizer(path: Path, chat: str = "auto") -> tuple[Any, ChatFormat]:
    """(tokenizer, chat format) of a local directory. The end tokens of `generation_config.json` end turns too. Raises `CheckpointError`."""
    from transformers import AutoTokenizer

    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a model directory: it has no config.json")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(f"model directory {path} has no tokenizer; put its tokenizer files beside config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many classes for a broken directory
        raise CheckpointError(f"the tokenizer of {path} cannot be loaded: {first_line(error)}") from error
    format_ = chat_format(chat, tokenizer)
    format_.stop_ids |= _end_ids(path)
    return tokenizer, format_


def _end_ids(path: Path) -> frozenset[int]:
    """The tokens at which generation ends by `generation_config.json`; the chat format has an end token of its own."""
    file = path / "generation_config.json"
    try:
        ends = json.loads(file.read_text(encoding="utf-8-sig")).get("eos_token_id") if file.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(i for i in listed if isinstance(i, int) and i >= 0)
