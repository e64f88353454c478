"""Train the nano base from its demonstrations: `ramet models train-nano`.

Supervised next-token loss on the assistant's tokens. AdamW on embeddings and norms, Muon (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon) on the hidden matrices. The same seed gives the same weights on the same machine and thread
count.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ramet.agents.chat import ControlTokenFormat
from ramet.display import progress
from ramet.errors import ConfigError, StorageError
from ramet.policy.training.rows import batches
from ramet.recipes.nano.demonstrations import demonstrate, demonstration_texts, encode
from ramet.recipes.nano.tokenizer import train_tokenizer
from ramet.runs.commands import accuracy_by_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """`batch_tokens` are tokens of whole demonstrations per step, prompts included."""

    layers: int = 4
    width: int = 96
    heads: int = 3
    feed_forward: int = 256
    context: int = 1024
    steps: int = 8000
    batch_tokens: int = 2048
    micro_tokens: int = 768
    muon_lr: float = 0.015
    adam_lr: float = 3e-3
    warmup: int = 100
    seed: int = 0


def build_model(tokenizer: Any, config: PretrainConfig) -> Any:
    """A randomly initialised Llama of the configured shape, tied embeddings, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )


def pretrain(config: PretrainConfig, report: Callable[[int, float, float], None] | None = None) -> tuple[Any, Any]:
    """Tokenizer and trained model. `report(step, loss, tokens_per_second)` is called every 50 steps and at the last."""
    tokenizer = train_tokenizer(demonstration_texts(4000, config.seed))
    chat = ControlTokenFormat(tokenizer)
    model = build_model(tokenizer, config)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def schedule(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = (step - config.warmup) / max(config.steps - config.warmup, 1)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in (muon, adam)]
    rng = random.Random(f"pretrain/{config.seed}")
    started, tokens = time.perf_counter(), 0
    model.train()
    for step in range(config.steps):
        shown: list[tuple[list[int], list[bool]]] = []
        while sum(len(ids) for ids, _ in shown) < config.batch_tokens:
            shown.append(encode(demonstrate(rng), chat))
        trained = sum(sum(mask) for _, mask in shown)
        total = 0.0
        for batch in batches([ids for ids, _ in shown], config.micro_tokens, tokenizer.pad_token_id):
            ids = batch.ids
            wanted = batch.spread([mask for _, mask in shown], torch.bool)[:, 1:]
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            loss = torch.nn.functional.cross_entropy(model.lm_head(states[wanted]), ids[:, 1:][wanted], reduction="sum") / trained
            loss.backward()
            total += float(loss.detach())
            tokens += int((ids != tokenizer.pad_token_id).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip((muon, adam), schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        if report is not None and (step % 50 == 0 or step == config.steps - 1):
            report(step, total, tokens / (time.perf_counter() - started))
    return tokenizer, model.eval()


def save(tokenizer: Any, model: Any, config: PretrainConfig, path: Path) -> None:
    """Write a Hugging Face model directory, with the settings of the training in `pretrain.json`."""
    import json

    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "pretrain.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def train_nano(out: Path, seed: int, steps: int | None, json_out: Path | None) -> None:
    """`ramet models train-nano`: the shipped recipe, from a seed."""
    config = PretrainConfig(seed=seed) if steps is None else replace(PretrainConfig(seed=seed), steps=steps)
    if (out / "config.json").exists():
        raise ConfigError(f"{out} holds a model already; choose another --out or remove it")
    draft = out.with_name(out.name + ".draft")
    try:
        draft.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {draft}: {error.strerror or error}") from error
    started = time.perf_counter()
    with progress.stepping("train-nano", config.steps) as report:

        def report_step(step: int, loss: float, rate: float) -> None:
            report({"step": step + 1, "loss": loss, "tokens_per_second": rate})

        tokenizer, model = pretrain(config, report_step)
    save(tokenizer, model, config, draft)
    draft.replace(out)
    logger.info(f"trained in {time.perf_counter() - started:.0f} seconds; written to {out}")
    accuracy_by_length(str(out), 100, seed, json_out)
