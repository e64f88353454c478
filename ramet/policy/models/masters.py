"""Master weights: what the optimiser updates, in float32 even if the model samples in bfloat16.

bfloat16 has 8 significant bits, so an update of less than about 1/500 of a weight rounds to nothing; at the learning rates of
reinforcement learning that is nearly every update. The optimiser therefore updates a float32 copy of each bfloat16 weight
(Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740), and the model receives it rounded.

Memory per trained weight with AdamW: 16 bytes in float32 (weight, gradient, two moments), 18 in bfloat16 (the model's copy
besides), and 2 more while a batch's gradient is accumulated. Activations in bfloat16 take half of those in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from ramet.policy.models.lora import merged, trainable


class Masters:
    """The master weights of `model`, by name (`weights`). Of a float32 weight, the model's own parameter is the master."""

    def __init__(self, model: Any):
        self.model = model
        self.weights = {
            name: own if torch.finfo(own.dtype).bits >= 32 else torch.nn.Parameter(own.detach().float())
            for name, own in trainable(model).items()
        }
        self._copies = [(own, self.weights[name]) for name, own in trainable(model).items() if own is not self.weights[name]]

    def collect(self) -> None:
        """Move the model's gradients to the float32 copies, added to those that are there."""
        for own, master in self._copies:
            if own.grad is not None:
                gradient, own.grad = own.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the model, rounded to its dtype."""
        for own, master in self._copies:
            own.copy_(master)

    def hand_over(self) -> None:
        """Turn the model into float32, with the master weights as its parameters."""
        if self._copies:
            self.model.float()
            for own, master in self._copies:
                own.data = master.data

    def state(self) -> dict[str, torch.Tensor] | None:
        """The float32 state dict of the model with adapters merged; None if that is the model's own state dict."""
        merged_state = merged(self.model, torch.float32)
        if merged_state is not None or not self._copies:
            return merged_state
        masters = {id(own): master for own, master in self._copies}
        converted: dict[int, torch.Tensor] = {}
        state = {}
        for name, own in self.model.state_dict(keep_vars=True).items():
            # Tied weights stay one tensor.
            if id(own) not in converted:
                value = masters.get(id(own), own).detach()
                converted[id(own)] = value.to("cpu", torch.float32) if value.is_floating_point() else value
            state[name] = converted[id(own)]
        return state
