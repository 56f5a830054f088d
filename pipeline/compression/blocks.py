"""Returns the residual blocks of a network, which of them it can do without, and the network without them.

A residual block adds something to its input, so with all its weights zero it gives back what it was given. Blocks are
found by that test, not by name: in ResNets, inverted bottlenecks and transformers alike. Removing whole blocks (depth
pruning) saves what removing channels cannot: kernels work on 8 or 16 channels at a time, and every layer has a cost of
its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.batches import Batch, Batches
from edgeship.pipeline.compression.channels import LAYERS
from edgeship.pipeline.compression.cost import count_cost
from edgeship.pipeline.compression.loop import Loss, make_accelerator
from edgeship.pipeline.compression.structured import Goal

Tell = Callable[[int, int, str], None]


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
    silent = copy.deepcopy(module).eval()
    for parameter in silent.parameters():
        parameter.zero_()
    return bool(torch.equal(silent(inputs), inputs))


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


@dataclass(frozen=True)
class Removal:
    """Takes the least important blocks out, one after the other, until enough are gone."""

    model: nn.Module
    example: Tensor
    settings: Prune
    precision: str = "float32"
    tell: Tell = lambda _done, _total, _what: None

    def candidates(self) -> list[str]:
        """The blocks that may go. Raises InputError where there are none."""
        blocks = find_blocks(self.model, self.example)
        for each in self.settings.skip:
            if not any(fnmatchcase(name, each) for name, _ in self.model.named_modules()):
                raise InputError(f"prune.skip: {each!r} matches no layer of the network")
        left = [name for name in blocks if not any(fnmatchcase(name, each) for each in self.settings.skip)]
        if not left:
            reason = "prune.skip spares them all" if blocks else "no module gives back its input when its weights are 0"
            raise InputError(
                f'prune.kind = "blocks" removes residual blocks, and the network has none to remove: {reason}; '
                'accepted: kind = "structured" for its channels'
            )
        return left

    def count(self, number: int, loss: Loss, data: Batches) -> list[str]:
        """`number` blocks to remove. Raises InputError where that would be all of them."""
        names = self.candidates()
        if number >= len(names):
            raise InputError(
                f"prune.ratio = {self.settings.ratio:g} would remove all {len(names)} residual blocks; "
                f"accepted: at most {(len(names) - 1) / len(names):.3g}"
            )
        return next(islice(self._in_order(names, loss, data), number - 1, None)) if number else []

    def reach(self, goal: Goal, loss: Loss, data: Batches) -> list[str]:
        """The blocks with whose removal the goal is met. Raises StageError where it is not met without any block."""
        names = self.candidates()
        if goal.meter(self.model) <= goal.limit:
            return []
        least = float("inf")
        for gone in self._in_order(names, loss, data):
            trial = copy.deepcopy(self.model)
            remove_blocks(trial, gone)
            least = goal.meter(trial)
            if least <= goal.limit:
                return gone
        raise StageError(
            f"prune: {goal.name} = {goal.limit:.4g} cannot be met: without any of the {len(names)} residual blocks it "
            f"is {least:.4g}; accepted: that or more"
        )

    def _in_order(self, names: Sequence[str], loss: Loss, data: Batches) -> Iterator[list[str]]:
        """The blocks that are gone after one, two, ... removals: each time the one that costs the least loss for what
        it saves, measured without it and the ones before.
        """
        batches = [each.to(_device(self.model)) for each in islice(data.epoch(0), self.settings.batches)]
        saved = {name: self._saved(name) for name in names}
        gone: list[str] = []
        with _judging(self.model, self.precision):
            before = _mean_loss(self.model, loss, batches)
            while len(gone) < len(names):
                left = [name for name in names if name not in gone]
                costs = []
                for place, name in enumerate(left):
                    with _without(self.model, [*gone, name]):
                        costs.append(_mean_loss(self.model, loss, batches))
                    self.tell(place + 1, len(left), f"blocks tried, {len(gone)} chosen")
                rises = [max(0.0, cost - before) for cost in costs]  # where the loss falls, what saves most goes first
                place = min(range(len(left)), key=lambda each: (rises[each] / saved[left[each]], -saved[left[each]]))
                before = costs[place]
                gone.append(left[place])
                yield list(gone)

    def _saved(self, name: str) -> float:
        """What goes with the block of that which the goal is about: blocks, parameters, or multiply-accumulates."""
        if self.settings.ratio is not None:
            return 1.0
        whole = count_cost(self.model, self.example)
        with _without(self.model, [name]):
            rest = count_cost(self.model, self.example)
        if self.settings.max_bytes is not None:
            return float(max(1, whole.parameters - rest.parameters))
        return float(max(1, whole.macs - rest.macs))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _mean_loss(model: nn.Module, loss: Loss, batches: Sequence[Batch]) -> float:
    return sum(float(loss(model, batch)[0]) for batch in batches) / len(batches)


@contextmanager
def _judging(model: nn.Module, precision: str) -> Iterator[None]:
    """The model in eval mode, so that statistics of normalization stay as they are, and in the training's precision."""
    training = model.training
    model.eval()
    try:
        with make_accelerator(precision).autocast():
            yield
    finally:
        model.train(training)


@contextmanager
def _without(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The model without some blocks, for a while."""
    kept = {name: model.get_submodule(name) for name in names}
    remove_blocks(model, names)
    try:
        yield
    finally:
        for name, module in kept.items():
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, module)
