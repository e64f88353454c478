"""The weights that an optimiser steps: float32, also where the model that samples is coarser.

bfloat16 keeps 8 significant bits, so a step of less than some 1/500 of a weight rounds to nothing; at the learning rates of
reinforcement learning that is nearly every step. Of a weight in bfloat16 a float32 copy is stepped, and the model gets it rounded.

Bytes of memory a trained weight, with AdamW: 16 in float32 (weight, gradient, two moments), 18 in bfloat16 (the copy that samples
besides), 2 more while a batch's gradient is taken over. Activations in bfloat16 take half.
"""

from __future__ import annotations

from typing import Any

import torch

from ramet.policy.models.lora import merged, trainable


class Masters:
    """The trained weights of `model` by name. A float32 weight is the model's own."""

    def __init__(self, model: Any):
        self.model = model
        self.weights = {
            name: own if torch.finfo(own.dtype).bits >= 32 else torch.nn.Parameter(own.detach().float())
            for name, own in trainable(model).items()
        }
        self._copies = [(own, self.weights[name]) for name, own in trainable(model).items() if own is not self.weights[name]]

    def collect(self) -> None:
        """Add the gradients that the model has to those of its float32 copies."""
        for own, master in self._copies:
            if own.grad is not None:
                gradient, own.grad = own.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the weights as they are now."""
        for own, master in self._copies:
            own.copy_(master)

    def hand_over(self) -> None:
        """Make the model what was trained: float32, where it was coarser."""
        if self._copies:
            self.model.float()
            for own, master in self._copies:
                own.data = master.data

    def state(self) -> dict[str, torch.Tensor] | None:
        """The state of a plain model in float32 that computes the same; None where that is the model's own."""
        whole = merged(self.model, torch.float32)
        if whole is not None or not self._copies:
            return whole
        masters = {id(own): master for own, master in self._copies}
        found: dict[int, torch.Tensor] = {}
        state = {}
        for name, own in self.model.state_dict(keep_vars=True).items():
            # Tied weights stay one tensor.
            if id(own) not in found:
                value = masters.get(id(own), own).detach()
                found[id(own)] = value.to("cpu", torch.float32) if value.is_floating_point() else value
            state[name] = found[id(own)]
        return state
