"""Rows: the training sequences of a tree, and how they are batched.

Each branch becomes one row. Every sampled token is trained exactly once, with the log-probability under
which it was sampled; ids are copied from the tree, never re-encoded. Rows are batched by length, so that
little is computed on padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ramet.agents.tree import Segment, Tree
from ramet.policy.models.load import Inputs


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One training sequence. `ids`, `mask`, `logprobs` and `versions` have one entry per token.

    mask       True where a token was sampled
    logprobs   of each sampled token under the sampling distribution
    advantage  of every sampled token
    weight     of every sampled token's term in the loss
    versions   the weight version that sampled each token, -1 where it was not sampled
    media      the segments that the placeholders among the ids stand for, in order
    """

    ids: Sequence[int]
    mask: Sequence[bool]
    logprobs: Sequence[float]
    advantage: float
    weight: float
    versions: Sequence[int]
    media: tuple[Segment, ...] = ()


def rows_of(tree: Tree, advantages: Sequence[float], weight: float) -> list[TrainingRow]:
    """One row per branch in which the policy that learns sampled anything, in the order of `tree.branches`.

    `advantages` has one entry per branch (`ValueError` otherwise). `weight` is that of the tree: every row gets it, whatever the fan-out.
    """
    branches = tree.branches
    if len(advantages) != len(branches):
        raise ValueError(f"{len(advantages)} advantages for {len(branches)} branches")
    return [
        TrainingRow(b.ids, b.mask, b.logprobs, advantage, weight, b.versions, b.media)
        for b, advantage in zip(branches, advantages, strict=True)
        if b.trainable and any(len(turn.sampled) > turn.written for turn in b.turns)
    ]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of similar length, padded on the right to the longest.

    ids      (B, T) int64
    members  index of each row among the rows given to `batches`
    """

    ids: torch.Tensor
    members: tuple[int, ...]

    def spread(self, values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A (B, T) tensor of `values[i]`, one per token of row i (indexed as in `batches`), and zero on padding."""
        out = torch.zeros(self.ids.shape, dtype=dtype)
        for place, i in enumerate(self.members):
            out[place, : len(values[i])] = torch.as_tensor(values[i], dtype=dtype)
        return out.to(self.ids.device)


def batches(rows: Sequence[Sequence[int]], tokens: int, pad: int = 0) -> list[Batch]:
    """Sort the rows by length and cut them into batches of at most `tokens` tokens, padding included.

    Rows of similar length share a batch, so padding is a few per cent, and attention can use the fast causal
    kernels, which take no mask. A row longer than `tokens` is a batch by itself.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    result, start = [], 0
    while start < len(order):
        longest = len(rows[order[start]])
        members = tuple(order[start : start + max(tokens // max(longest, 1), 1)])
        ids = torch.full((len(members), longest), pad, dtype=torch.long)
        for place, i in enumerate(members):
            ids[place, : len(rows[i])] = torch.as_tensor(rows[i], dtype=torch.long)
        result.append(Batch(ids, members))
        start += len(members)
    return result


def token_logprobs(
    model: torch.nn.Module,
    ids: torch.Tensor,
    temperature: float = 1.0,
    reference: torch.nn.Module | None = None,
    inputs: Inputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies, KL divergences) of `ids` (B, T) under the model, each (B, T) float32 and 0 at the first token.

    At each position: the log-probability of its token given those before it, the entropy of that distribution, and
    KL(model || reference) over the whole vocabulary, 0 without a reference; entropies and divergences in nats. Rows are padded on the
    right, and values on padding are meaningless: the caller masks them.

    temperature  the one that was sampled with: logits are divided by it
    inputs       returns the arguments with which a model is called, where they are not the ids alone
    """
    inputs = inputs or (lambda _: {"input_ids": ids})
    logprobs = _log_distributions(model, inputs(model), temperature)
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    if reference is None:
        kl = torch.zeros_like(entropy)
    else:
        with torch.no_grad():
            reference_logprobs = _log_distributions(reference, inputs(reference), temperature)
        kl = (logprobs.exp() * (logprobs - reference_logprobs)).sum(-1)
    pad = torch.nn.functional.pad
    return pad(chosen, (1, 0)), pad(entropy, (1, 0)), pad(kl, (1, 0))


def _log_distributions(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Log-probabilities of the next token, (B, T - 1, vocabulary) float32."""
    return torch.log_softmax(model(**inputs, use_cache=False).logits[:, :-1].float() / temperature, dim=-1)
