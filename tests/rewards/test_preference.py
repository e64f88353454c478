"""A reward model of a directory: equal to its own forward pass, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from ramet.errors import CheckpointError, RewardError
from ramet.policy.models.catalogue import BASE
from ramet.rewards.preference import PreferenceModel
from tests.agents.test_chat import CHATML, byte_tokenizer


def save(path, labels=1, positions=64, broken=False, tokenizer=None):
    torch.manual_seed(0)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(BASE)
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


@pytest.mark.parametrize("first", ["<|endoftext|>", "<|im_end|>"])
def test_an_answer_ends_as_the_template_ends_it(tmp_path, first, monkeypatch):
    """Not with whichever of the tokenizer's ends has the smallest number."""
    tokenizer = byte_tokenizer([first, *{"<|endoftext|>", "<|im_end|>", "<|im_start|>"} - {first}], template=CHATML)
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|endoftext|>"
    save(tmp_path, tokenizer=tokenizer)
    reward, seen = PreferenceModel(tmp_path), []
    real = reward._model.forward
    monkeypatch.setattr(reward._model, "forward", lambda input_ids: (seen.extend(input_ids[0].tolist()), real(input_ids=input_ids))[1])
    reward.score("Q?", "It is 4.")
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "It is 4."}]
    assert tokenizer.decode(seen) == tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")


def test_what_is_no_reward_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a model directory"):
        PreferenceModel(tmp_path)
    save(tmp_path / "two", labels=2)
    with pytest.raises(CheckpointError, match="2 outputs"):
        PreferenceModel(tmp_path / "two")
    save(tmp_path / "nan", broken=True)
    with pytest.raises(RewardError, match="gives nan"):
        PreferenceModel(tmp_path / "nan").score("a", "b")
