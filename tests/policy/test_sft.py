"""Supervised training: what a coarse model learns, and what it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from ramet.errors import CheckpointError
from ramet.policy.training.sft import Example, SFTTraining, fine_tune


@pytest.mark.parametrize("rank", [0, 4])
def test_small_steps_move_a_model_in_bfloat16(random_model, tmp_path, rank):
    model = copy.deepcopy(random_model).bfloat16()
    examples = [Example(list(range(10 + n, 30 + n)), [True] * 20) for n in range(8)]
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(moved()), with_kwargs=False)

    def moved() -> float:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        first.update({name: weight.detach().clone() for name, weight in trained.items() if name not in first})
        return sum(int((weight != first[name]).sum()) for name, weight in trained.items()) / sum(w.numel() for w in trained.values())

    first: dict[str, torch.Tensor] = {}
    config = SFTTraining(steps=6, batch=8, at_once=8, learning_rate=1e-6, lora_rank=rank, warmup=0.0)
    fine_tune(model, examples, 0, config, tmp_path)
    handle.remove()
    assert max(seen) > 0.6
    if not rank:
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_examples_beyond_the_steady_context_are_refused(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=128, original_max_position_embeddings=16,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match="an example of 20 tokens is longer than the 16"):
        fine_tune(model, [Example([5] * 20, [True] * 20)], 0, SFTTraining(steps=1, lora_rank=0), tmp_path)
