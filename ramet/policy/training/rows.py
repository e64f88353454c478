"""Rows: what a tree becomes for training, and how rows are batched.

One branch is one row. Every sampled token is trained exactly once, with the log-probability under
which it was sampled; ids are copied from the tree, never encoded. Rows are batched by length, so that
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
    """One training sequence. All sequences have one entry per token id.

    advantage  of the row's every sampled token
    weight     of each sampled token's term in the loss
    versions   of the weights that sampled each token, -1 where it was not sampled
    media      what the placeholders among the ids stand for, in order
    """

    ids: Sequence[int]
    mask: Sequence[bool]
    logprobs: Sequence[float]
    advantage: float
    weight: float
    versions: Sequence[int]
    media: tuple[Segment, ...] = ()


def rows_of(tree: Tree, advantages: Sequence[float], weight: float) -> list[TrainingRow]:
    """One row per branch that sampled anything, in the order of `tree.branches`.

    `advantages` has one entry per branch. `weight` is the tree's: it does not depend on fan-out.
    """
    branches = tree.branches
    if len(advantages) != len(branches):
        raise ValueError(f"{len(advantages)} advantages for {len(branches)} branches")
    return [
        TrainingRow(b.ids, b.mask, b.logprobs, advantage, weight, b.versions, b.media)
        for b, advantage in zip(branches, advantages, strict=True)
        if any(turn.sampled for turn in b.turns)
    ]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of similar length, padded on the right to the longest.

    ids      (B, T) long
    members  index of each row among those given to `batches`
    """

    ids: torch.Tensor
    members: tuple[int, ...]

    def spread(self, values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(B, T): `values[i]` per token of row i (indexed as given to `batches`), zero on padding."""
        out = torch.zeros(self.ids.shape, dtype=dtype)
        for place, i in enumerate(self.members):
            out[place, : len(values[i])] = torch.as_tensor(values[i], dtype=dtype)
        return out.to(self.ids.device)


def batches(rows: Sequence[Sequence[int]], tokens: int, pad: int = 0) -> list[Batch]:
    """The rows in as few batches of at most `tokens` padded tokens as sorting by length gives.

    Rows of like length stand together, so that padding is a few per cent and attention stays causal
    without a mask, whose kernels are the fast ones. A row longer than `tokens` is a batch by itself.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    made, start = [], 0
    while start < len(order):
        longest = len(rows[order[start]])
        members = tuple(order[start : start + max(tokens // max(longest, 1), 1)])
        ids = torch.full((len(members), longest), pad, dtype=torch.long)
        for place, i in enumerate(members):
            ids[place, : len(rows[i])] = torch.as_tensor(rows[i], dtype=torch.long)
        made.append(Batch(ids, members))
        start += len(members)
    return made


def token_logprobs(
    model: torch.nn.Module,
    ids: torch.Tensor,
    temperature: float = 1.0,
    reference: torch.nn.Module | None = None,
    inputs: Inputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of each of `ids` (B, T) given those before it, and at its place the entropy and the KL to `reference`.

    All (B, T) float32, 0 at the first token; the divergence is KL(model || reference) over the whole vocabulary, 0
    without a reference. Causal attention over right-padded rows: what stands on padding is meaningless and must
    be masked by the caller. `temperature` is that of sampling. `inputs` gives what a model is called with, where that is
    not the ids alone.
    """
    inputs = inputs or (lambda _: {"input_ids": ids})
    logprobs = _log_distributions(model, inputs(model), temperature)
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    if reference is None:
        kl = torch.zeros_like(entropy)
    else:
        with torch.no_grad():
            others = _log_distributions(reference, inputs(reference), temperature)
        kl = (logprobs.exp() * (logprobs - others)).sum(-1)
    pad = torch.nn.functional.pad
    return pad(chosen, (1, 0)), pad(entropy, (1, 0)), pad(kl, (1, 0))


def _log_distributions(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """(B, T - 1, vocabulary) float32."""
    return torch.log_softmax(model(**inputs, use_cache=False).logits[:, :-1].float() / temperature, dim=-1)
