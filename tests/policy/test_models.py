"""A model directory: what is read from it besides weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ramet.errors import CheckpointError
from ramet.policy.models.tokenizer import load_tokenizer
from tests.agents.test_chat import CHATML, byte_tokenizer


def directory(path: Path, generation: str | None) -> Path:
    byte_tokenizer(["<|im_end|>", "<|im_start|>", "<|eom|>", "<|endoftext|>"], template=CHATML).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if generation is not None:
        (path / "generation_config.json").write_text(generation)
    return path


@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        (None, {"<|im_end|>"}),
        ("{}", {"<|im_end|>"}),
        ('{"eos_token_id": null}', {"<|im_end|>"}),
        ('{"eos_token_id": 259}', {"<|im_end|>", "<|endoftext|>"}),
        ('{"eos_token_id": [258, 259]}', {"<|im_end|>", "<|eom|>", "<|endoftext|>"}),
    ],
)
def test_every_end_of_the_generation_config_ends_a_turn(tmp_path, generation, ends):
    tokenizer, chat = load_tokenizer(directory(tmp_path, generation))
    assert set(tokenizer.convert_ids_to_tokens(sorted(chat.stop_ids))) == ends


def test_a_generation_config_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        load_tokenizer(directory(tmp_path, "{"))
