"""Returns a network whose forward and backward passes are replayed as CUDA graphs.

A small network's kernels take less time than Python takes to launch them one by one; a graph launches them all at once.
What is replayed is what the network did when it was captured: the same kernels on the same memory. Weights and
BatchNorm statistics live there and go on changing; a decision that Python makes is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgeship.pipeline.compression.checkpoint import random_state, restore_random_state


class Captured:
    """A network in training whose passes for inputs of one shape are replayed; other inputs go through its own code."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._shape = model, inputs.shape
        self._wrapped, self._forward = vars(model).get("forward"), model.forward
        random, state = random_state(), {name: value.clone() for name, value in model.state_dict().items()}
        torch.cuda.make_graphed_callables(model, (torch.zeros_like(inputs),), allow_unused_input=True)
        self._replay: Callable[..., Any] = model.forward
        with torch.no_grad():  # capturing trains BatchNorm a few times; the graph's memory is the model's
            for name, value in model.state_dict().items():
                value.copy_(state[name])
        restore_random_state(random)
        model.forward = self._either

    def _either(self, inputs: Tensor) -> Any:
        fits = self._model.training and inputs.shape == self._shape
        return (self._replay if fits else self._forward)(inputs)

    def release(self) -> None:
        """Gives the network the forward pass back that it had."""
        del self._model.forward
        if self._wrapped is not None:
            self._model.forward = self._wrapped


def can_capture(model: nn.Module) -> bool:
    """Whether no hook takes part in the network's forward pass: what it decides would be decided once."""
    return not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


__all__ = ["Captured", "can_capture"]
