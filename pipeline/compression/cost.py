"""Returns what a network costs: parameters, and multiply-accumulates of its convolutions and linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Cost:
    """`parameters`, and `macs` for one sample."""

    parameters: int
    macs: int


@torch.no_grad()
def count_cost(model: nn.Module, example: Tensor) -> Cost:
    """What the model costs on one sample of the shape of `example` (batch first)."""
    macs = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        nonlocal macs
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if isinstance(layer, _ConvTransposeNd):
            macs += math.prod(inputs[0].shape[1:]) * math.prod(weight.shape[1:])
        elif isinstance(layer, _ConvNd):
            macs += math.prod(outputs.shape[1:]) * math.prod(weight.shape[1:])
        else:
            macs += math.prod(outputs.shape[1:]) * weight.shape[1]

    layers = [layer for layer in model.modules() if isinstance(layer, _ConvNd | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    training = model.training
    try:
        model.eval()(example[:1])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return Cost(sum(each.numel() for each in model.parameters()), macs)
