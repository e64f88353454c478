"""A reward model of a directory: equal to its own forward pass, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from ramet.errors import CheckpointError, RewardError
from ramet.nano import BASE
from ramet.rewards.preference import PreferenceModel


def save(path, labels=1, positions=64, broken=False):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=positions, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    if broken:
        torch.nn.init.constant_(model.score.weight, torch.nan)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval(), tokenizer


def test_scores_are_those_of_the_model(tmp_path):
    model, tokenizer = save(tmp_path)
    reward = PreferenceModel(tmp_path)
    scores = []
    for answer in ("4", "5"):
        ids = torch.tensor([tokenizer.encode(f"2+2\n{answer}")])
        with torch.inference_mode():
            expected = float(model(input_ids=ids).logits[0, 0])
        assert reward.score("2+2", answer) == pytest.approx(expected, abs=1e-6)
        scores.append(expected)
    assert scores[0] != scores[1]
    with pytest.raises(RewardError, match="more than the reward model's 64"):
        reward.score("2+2" * 40, "4")


def test_what_is_no_reward_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a model directory"):
        PreferenceModel(tmp_path)
    save(tmp_path / "two", labels=2)
    with pytest.raises(CheckpointError, match="2 outputs"):
        PreferenceModel(tmp_path / "two")
    save(tmp_path / "nan", broken=True)
    with pytest.raises(RewardError, match="gives nan"):
        PreferenceModel(tmp_path / "nan").score("a", "b")
