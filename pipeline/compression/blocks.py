"""Returns the residual blocks of a network, and the network without some of them.

A residual block adds something to its input, so with all its weights zero it gives back what it was given. Blocks are
found by that test, not by name: in ResNets, inverted bottlenecks and transformers alike. Removing whole blocks (depth
pruning) saves what removing channels cannot: kernels work on 8 or 16 channels at a time, and every layer has a cost of
its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.channels import LAYERS

SHIFTS = ("weight", "bias", "running_mean")
"""Buffers without which a normalization gives zero for zero."""


def find_blocks(model: nn.Module, example: Tensor) -> list[str]:
    """The names of the modules that add to their input, the innermost ones, in the order in which they run."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            pair = (inputs[0] if len(inputs) == 1 else None, output)
            seen.setdefault(name, []).append(pair)  # type: ignore[arg-type]  # what is no tensor is sorted out below

        return look

    holders = [
        (name, module)
        for name, module in model.named_modules()
        if name and not isinstance(module, LAYERS) and any(isinstance(part, LAYERS) for part in module.modules())
    ]
    handles = [module.register_forward_hook(watch(name)) for name, module in holders]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    modules = dict(model.named_modules())
    found = [name for name, pairs in seen.items() if len(pairs) == 1 and _adds_to_its_input(modules[name], *pairs[0])]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


@torch.no_grad()
def _adds_to_its_input(module: nn.Module, inputs: Any, output: Any) -> bool:
    if not (isinstance(inputs, Tensor) and isinstance(output, Tensor) and inputs.shape == output.shape):
        return False
    if not inputs.any():
        return False  # nothing in gives nothing out in any block without weights
    return bool(torch.equal(_silent(module)(inputs), inputs))


def _silent(module: nn.Module) -> nn.Module:
    """A copy in eval mode without weights, and of which normalization takes nothing from zero.

    Frozen normalization has its weight and bias as buffers.
    """
    silent = copy.deepcopy(module).eval()
    for part in silent.modules():
        buffers = [value for name, value in part.named_buffers(recurse=False) if name in SHIFTS]
        for values in (*part.parameters(recurse=False), *buffers):
            values.zero_()
    return silent


def remove_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Takes blocks out of the model, in place: what they were given passes through.

    Raises InputError for a name that the model does not have.
    """
    for name in names:
        owner, _, last = name.rpartition(".")
        try:
            parent = model.get_submodule(owner)
            parent.get_submodule(last)
        except AttributeError:
            raise InputError(f"the network has no block {name!r}") from None
        setattr(parent, last, nn.Identity())


@contextmanager
def without_blocks(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The model without some blocks, for a while."""
    kept = {name: model.get_submodule(name) for name in names}
    remove_blocks(model, names)
    try:
        yield
    finally:
        for name, module in kept.items():
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, module)
