"""The policy loss: PPO with clipping, optional KL to a reference, per-token masks.

For a sampled token with ratio rho = pi(a|h) / pi_behaviour(a|h), advantage A and weight w, the term is

    -w * min(rho * A, clip(rho, 1 - low, 1 + high) * A)  +  w * kl_coef * KL

and of an action with A < 0, with a bound `dual_clip` c (Ye et al. 2020), max(the minimum, c * A) stands for the minimum: a token that
has become much more likely since it was sampled then pushes no harder than that. KL is the divergence from the reference at
that token's place, over the whole vocabulary: estimates of it from the sampled token alone are rarely but arbitrarily large. Terms
are summed, not averaged: the weights carry the normalisation, so that how rows are batched changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUMS = ("loss", "tokens", "clipped", "log_ratio", "kl", "entropy")


@dataclass(frozen=True, slots=True)
class LossSums:
    """Summed over the batch (`SUMS`). `loss` has a gradient; the others are for logging."""

    loss: torch.Tensor
    tokens: torch.Tensor
    clipped: torch.Tensor
    log_ratio: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor

    def values(self) -> dict[str, float]:
        return {name: float(getattr(self, name).detach()) for name in SUMS}


def policy_loss(
    logprobs: torch.Tensor,
    behaviour: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    entropy: torch.Tensor,
    kl: torch.Tensor,
    clip: tuple[float, float] = (0.2, 0.2),
    kl_coef: float = 0.0,
    dual_clip: float | None = None,
) -> LossSums:
    """All arguments (B, T); `mask` is bool, True where a token was sampled."""
    log_ratio = torch.where(mask, logprobs - behaviour, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    terms = -weights * surrogate
    if kl_coef:
        terms = terms + weights * kl_coef * kl
    zero = torch.zeros_like(terms)

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, zero).sum()

    return LossSums(
        loss=total(terms),
        tokens=mask.sum(),
        clipped=total((ratio * advantages > clipped * advantages).float()).detach(),
        log_ratio=total(log_ratio).detach(),
        kl=total(kl).detach(),
        entropy=total(entropy).detach(),
    )
