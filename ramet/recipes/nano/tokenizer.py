"""The nano model's tokenizer: byte-level BPE with digits, signs and keys apart.

Any text can be encoded. Digits, operators and single capital letters are always tokens of their
own; what repeats around them (the JSON of a call, "Answer: ") is merged by ordinary BPE training on
demonstrations, as it is in the vocabulary of a large model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ramet.agents.chat import ControlTokenFormat

VOCABULARY = 512
SPLIT = r"[0-9+\-=\n]|(?<![A-Za-z])[A-Z](?![A-Za-z])"


def train_tokenizer(texts: Iterable[str], extra: Sequence[str] = ()) -> Any:
    """A Hugging Face fast tokenizer with the nano format's control tokens, and `extra` ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*ControlTokenFormat.CONTROL, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens=[*ControlTokenFormat.CONTROL[3:], *extra],
    )
