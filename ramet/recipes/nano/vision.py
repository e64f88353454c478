"""A small random Qwen2.5-VL with a tokenizer of its own: the real model code, for commands that train one from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ramet.recipes.nano.tokenizer import train_tokenizer
from ramet.terminal import quiet

VISION = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")


@dataclass(frozen=True)
class VisionSize:
    """Widths and depths of the decoder and of the tower."""

    hidden: int = 64
    layers: int = 2
    tower: int = 32
    tower_layers: int = 2
    context: int = 2048


def random_vision_model(texts: Iterable[str], seed: int, size: VisionSize | None = None) -> tuple[Any, Any]:
    """(tokenizer, model). The tokenizer's merges are learned from `texts`; weights are drawn by the seed."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    size = size or VisionSize()
    tokenizer = train_tokenizer(texts, extra=VISION)
    start, end, pad = tokenizer.convert_tokens_to_ids(list(VISION))
    half = size.hidden // 8  # of a head: its rotary dimensions are shared by time, height and width
    text = {
        "vocab_size": len(tokenizer), "hidden_size": size.hidden, "intermediate_size": 2 * size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": size.context, "initializer_range": 0.08,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]},
    }  # fmt: skip
    tower = {
        "depth": size.tower_layers, "hidden_size": size.tower, "intermediate_size": 2 * size.tower, "num_heads": 2,
        "out_hidden_size": size.hidden, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [size.tower_layers - 1],
        "tokens_per_second": 4, "initializer_range": 0.08,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, video_token_id=pad, image_token_id=pad, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.set_attn_implementation("sdpa")
    return tokenizer, model


def write_vision_model(folder: Path, texts: Iterable[str], seed: int, size: VisionSize | None = None) -> None:
    """The same as a model directory."""
    tokenizer, model = random_vision_model(texts, seed, size)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
