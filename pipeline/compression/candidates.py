"""Returns what may be removed from a network, piece by piece, and what is saved with each piece.

Candidate    a residual block, or some channels of a group
Supply       the candidates that are left: blocks, and of each group the least important channels
Extent       how much of each layer is left, and so what a candidate would save
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from edgeship.pipeline.compression.blocks import remove_blocks, without_blocks
from edgeship.pipeline.compression.channels import LAYERS, Group, Tie, silence
from edgeship.pipeline.compression.cost import layer_macs


@dataclass(frozen=True)
class Candidate:
    """A block, or the next channels of a group to go."""

    name: str
    group: Group | None = None
    channels: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """A name of its own: a layer may be called as a block is, were it not for this."""
        return self.name if self.group is None else f"channels of {self.name}"

    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        """The model without it, for a while. A silenced channel computes what a removed one does."""
        return without_blocks(model, [self.name]) if self.group is None else _silenced(model, self.group, self.channels)

    def take_from(self, model: nn.Module) -> None:
        """The model without it, for good."""
        if self.group is None:
            remove_blocks(model, [self.name])
        else:
            silence(model, self.group, self.channels)


class Extent:
    """How much is left of each layer, in multiply-accumulates or parameters; or of blocks, each of which is one."""

    def __init__(self, model: nn.Module, example: Tensor, unit: Literal["blocks", "parameters", "macs"]) -> None:
        self._unit = unit
        if unit == "macs":
            self._left = {name: float(macs) for name, macs in layer_macs(model, example).items()}
        else:
            sizes = {n: sum(p.numel() for p in layer.parameters(recurse=False)) for n, layer in model.named_modules()}
            self._left = {name: float(size) for name, size in sizes.items()}
        self._channels: dict[tuple[str, bool], int] = {}

    def saved(self, candidate: Candidate) -> float:
        """What goes with the candidate."""
        if self._unit == "blocks":
            return 1.0
        return max(1.0, sum(self._left[name] - left for name, left in self._after(candidate).items()))

    def take(self, candidate: Candidate) -> None:
        """From now on its layers are smaller, or gone."""
        self._left.update(self._after(candidate))
        for tie in candidate.group.ties if candidate.group else ():
            self._channels[tie.layer, tie.output] = self._count(tie) - _number_of(candidate.channels, tie)

    def _after(self, candidate: Candidate) -> dict[str, float]:
        if candidate.group is None:
            return {name: 0.0 for name in self._left if is_in(name, candidate.name)}
        after: dict[str, float] = {}
        for tie in candidate.group.ties:
            if self._left.get(tie.layer):
                share = 1 - _number_of(candidate.channels, tie) / self._count(tie)
                after[tie.layer] = share * after.get(tie.layer, self._left[tie.layer])
        return after

    def _count(self, tie: Tie) -> int:
        return self._channels.get((tie.layer, tie.output), len(tie.channels))


def _number_of(channels: Sequence[int], tie: Tie) -> int:
    gone = set(channels)
    return sum(root in gone for root in tie.roots)


def is_in(layer: str, block: str) -> bool:
    """Whether the layer is the block or inside it (dotted names)."""
    return layer == block or layer.startswith(f"{block}.")


@dataclass
class Supply:
    """What may still go: blocks, and of each group the channels in the order of their importance."""

    blocks: list[str]
    groups: dict[str, Group] = field(default_factory=dict)
    orders: dict[str, list[int]] = field(default_factory=dict)
    portion: int = 1
    fewest: Mapping[str, int] = field(default_factory=dict)
    left_dense: Mapping[str, str] = field(default_factory=dict)

    def candidates(self) -> list[Candidate]:
        """All that may go next."""
        found = [Candidate(name) for name in self.blocks]
        for name, group in self.groups.items():
            if len(self.orders[name]) - self.portion >= self.fewest[name]:
                found.append(Candidate(name, group, tuple(self.orders[name][: self.portion])))
        return found

    def take(self, candidate: Candidate) -> None:
        """It is gone, and with a block all that is inside it."""
        if candidate.group is not None:
            self.orders[candidate.name] = self.orders[candidate.name][self.portion :]
            return
        self.blocks.remove(candidate.name)
        for name, group in list(self.groups.items()):
            if is_in(name, candidate.name):
                del self.groups[name]
            else:
                ties = tuple(tie for tie in group.ties if not is_in(tie.layer, candidate.name))
                self.groups[name] = replace(group, ties=ties)


def at_home(group: Group, blocks: Sequence[str], model: nn.Module) -> Group | None:
    """The group, named by a layer that is there as long as any of the group is; None where there is no such layer."""
    homes = [block for block in blocks if is_in(group.name, block)]
    if not homes or all(is_in(tie.layer, homes[0]) for tie in group.ties):
        return group
    for tie in group.ties:
        outside = not any(is_in(tie.layer, block) for block in blocks)
        alike = tie.output and tie.channels == tie.roots == tuple(range(group.size))
        if outside and alike and isinstance(model.get_submodule(tie.layer), LAYERS):
            return replace(group, name=tie.layer)
    return None


@contextmanager
def _silenced(model: nn.Module, group: Group, channels: Sequence[int]) -> Iterator[None]:
    """The model with channels of the group silent, for a while."""
    layers = dict(model.named_modules())
    kept = [
        (parameter, parameter.detach().clone())
        for name in {tie.layer for tie in group.ties}
        for parameter in layers[name].parameters(recurse=False)
    ]
    silence(model, group, channels)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
