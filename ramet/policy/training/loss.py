"""The policy loss: the clipped surrogate of PPO, an optional KL penalty, per-token masks.

For a sampled token with ratio rho = pi(a|h) / pi_behaviour(a|h), advantage A and weight w, the term is

    -w * min(rho * A, clip(rho, 1 - low, 1 + high) * A)  +  w * kl_coef * KL

(Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347, equation 7). Where A < 0, a bound `dual_clip` c replaces
the minimum by max(minimum, c * A) (Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
arXiv:1912.09729): it limits the gradient of a token that has become much more likely since it was sampled. KL is the divergence from
the reference at the token's position, over the whole vocabulary: an estimate from the sampled token alone can be arbitrarily large.
Terms are summed, not averaged: the weights carry the normalisation, so the loss does not depend on how rows are batched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUMS = ("loss", "tokens", "clipped", "log_ratio", "kl", "entropy")


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the sampled tokens of a batch. Only `loss` has a gradient; the others are for logging.

    tokens     the number of sampled tokens
    clipped    those whose probability ratio was clipped
    log_ratio  log pi(a|h) - log pi_behaviour(a|h)
    kl         divergence from the reference, in nats
    entropy    of the policy, in nats
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    clipped: torch.Tensor
    log_ratio: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor

    def values(self) -> dict[str, float]:
        """The sums as numbers, by name."""
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
    """The loss of a batch, with the quantities that are logged. All tensors (B, T); `mask` is bool, True where a token was sampled.

    clip  (low, high): the probability ratio is clipped to [1 - low, 1 + high]
    """
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
