"""Returns training in which what is to be removed fades out: cut at once, it takes what the others rely on with it.

Over the steps of the fade a factor f falls evenly from 1 to 0, while all of the network is trained:

    a block with input x and output y      gives  x + f * (y - x)
    a channel's values                     are multiplied by f

At the end the network computes what it computes without them, and removing them changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeship.pipeline.compression.loop import Hook


@dataclass(frozen=True)
class Leaving:
    """What fades: blocks by name, and of the layers that make or normalize channels the numbers of those that go."""

    blocks: Sequence[str]
    channels: Mapping[str, Sequence[int]]


class Fading(Hook):
    """Counts the steps of a fade, and holds what is left of `leaving` in the network's forward pass.

    `steps`: how many it takes until nothing is left.
    """

    def __init__(self, leaving: Leaving, steps: int) -> None:
        self._leaving, self._steps, self._done = leaving, steps, 0

    @property
    def factor(self) -> float:
        """What is left, from 1 to 0."""
        return max(0.0, 1 - self._done / self._steps)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """The model, computing with what is left."""
        handles = [
            model.get_submodule(name).register_forward_hook(_toward_its_input(lambda: self.factor))
            for name in self._leaving.blocks
        ]
        for name, channels in self._leaving.channels.items():
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_hook(_toward_zero(layer, channels, lambda: self.factor)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step_done(self, model: nn.Module) -> None:
        """Less is left."""
        self._done += 1

    def state(self) -> dict[str, Tensor]:
        """The steps that are done."""
        return {"done": torch.tensor(self._done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with the fade."""
        self._done = int(state["done"])


def _toward_its_input(factor: Callable[[], float]) -> Callable[..., Tensor]:
    def fade(_block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0] + factor() * (output - inputs[0])

    return fade


def _toward_zero(layer: nn.Module, channels: Sequence[int], factor: Callable[[], float]) -> Callable[..., Tensor]:
    chosen = torch.tensor(list(channels))
    axis = -1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1

    def fade(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        scale = torch.ones(output.shape[axis], dtype=output.dtype, device=output.device)
        scale[chosen.to(output.device)] = factor()
        return output * (scale if axis == -1 else scale.view(-1, *(1,) * (output.dim() - 2)))

    return fade
