"""Returns a moving average of a network's weights.

    average <- d * average + (1 - d) * weights,    d = min(decay, (1 + t) / (10 + t))     (t: updates so far)

The smaller decay at first keeps the average from dragging the initial weights along in short runs. Counters and other
whole numbers are copied.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """The average of the model's parameters and buffers, in a copy of the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes one more state of the weights in."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        for own, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if own.is_floating_point():
                own.lerp_(value, 1 - decay)
            else:
                own.copy_(value)
        self.updates += 1
