"""Returns what a network costs: parameters, and multiply-accumulates of its convolutions and linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Cost:
    """`parameters`, and `macs` for one sample."""

    parameters: int
    macs: int


def count_cost(model: nn.Module, example: Tensor) -> Cost:
    """What the model costs on one sample of the shape of `example` (batch first)."""
    return Cost(sum(each.numel() for each in model.parameters()), sum(layer_macs(model, example).values()))


@torch.no_grad()
def layer_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """The multiply-accumulates of each convolution and linear layer that runs, by name."""
    macs: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            if isinstance(layer, _ConvTransposeNd):
                found = math.prod(inputs[0].shape[1:]) * math.prod(weight.shape[1:])
            elif isinstance(layer, _ConvNd):
                found = math.prod(outputs.shape[1:]) * math.prod(weight.shape[1:])
            else:
                found = math.prod(outputs.shape[1:]) * weight.shape[1]
            macs[name] = macs.get(name, 0) + found

        return count

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _ConvNd | nn.Linear)}
    handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    training = model.training
    try:
        model.eval()(example[:1])
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return macs
