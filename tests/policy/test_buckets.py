"""Parameters in buckets: every one once, one type to a bucket, none too large."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ramet.benchmarks.speed.scaling import Assumptions
from ramet.policy.openrlhf.weights import BUCKET, buckets

SHAPES = st.lists(st.integers(0, 4), max_size=3)
TYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(st.lists(st.tuples(SHAPES, TYPES), max_size=20), st.integers(1, 200))
def test_every_parameter_is_in_one_bucket(described, size) -> None:
    parameters = [(str(n), torch.empty(shape, dtype=dtype)) for n, (shape, dtype) in enumerate(described)]
    found = buckets(parameters, size)
    assert sorted(int(name) for part in found for name, _ in part) == list(range(len(parameters)))
    for part in found:
        (dtype,) = {tensor.dtype for _, tensor in part}
        assert len(part) == 1 or sum(tensor.numel() * dtype.itemsize for _, tensor in part) <= size


def test_a_model_of_four_billion_parameters_is_398_tensors_in_30_buckets() -> None:
    """What the model of scaling counts with."""
    config = AutoConfig.for_model(
        "qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = list(model.named_parameters())
    assert abs(sum(p.numel() for _, p in parameters) - Assumptions().parameters) < 0.01e9
    assert (len(parameters), len(buckets(parameters, BUCKET))) == (Assumptions().tensors, Assumptions().buckets)
