"""Shared pieces: a tiny random model with the nano tokenizer, and a scripted policy."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import settings

# No example is timed: how long it takes is the machine's affair.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell; tests that interrupt, and the children of all, are to find it as in a terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def nano_tokenizer() -> Any:
    from ramet.recipes.nano.demonstrations import demonstration_texts
    from ramet.recipes.nano.tokenizer import train_tokenizer

    return train_tokenizer(demonstration_texts(500, 0))


@pytest.fixture(scope="session")
def random_model(nano_tokenizer: Any) -> Any:
    """An untrained two-layer Llama: its samples are noise, which is what batching tests want."""
    import torch

    from ramet.recipes.nano.pretrain import PretrainConfig, build_model

    torch.set_num_threads(1)
    model = build_model(nano_tokenizer, PretrainConfig(layers=2, width=32, heads=2, feed_forward=64, context=512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()
