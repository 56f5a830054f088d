"""One decision for the whole graph: the order in which each tensor's axes lie in memory.

A layout is a permutation: physical axis i holds ONNX axis `perm[i]`; channels-last of a 4-D tensor is (0, 2, 3, 1).
Operators say what they can work on (`layout_rules`), and because a Transpose only renames axes, and most operators only
need their axis numbers renamed, data moves solely where two demands really clash. Wishes travel from readers to
producers first, so that a model whose own input is NHWC keeps it; then every node in order takes the arrangement that
moves the fewest elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from edgeship.targets.base import IoLayout
from edgeship.targets.tflite.graph import Graph, Node, Tensor

Extents = tuple[int, ...]
_DYNAMIC = 1_000_003
"""Stands for an unknown dimension where shapes are matched: a prime, so that no product of static ones equals it."""


@dataclass(frozen=True)
class Split:
    """The last ONNX axis is a flattened block of `dims`, stored in the order `order` of those dims."""

    dims: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Physical axis i holds ONNX axis `perm[i]`; `split` describes a last axis whose elements are reordered."""

    perm: tuple[int, ...]
    split: Split | None = None

    @property
    def is_natural(self) -> bool:
        """Whether this is ONNX's own order."""
        return self.split is None and self.perm == tuple(range(len(self.perm)))

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The physical shape of a tensor of ONNX shape `shape`."""
        return tuple(shape[axis] for axis in self.perm)

    def axis(self, axis: int) -> int:
        """Where ONNX axis `axis` lies."""
        return self.perm.index(axis)

    def without(self, axes: Sequence[int]) -> Layout:
        """The layout after ONNX axes `axes` are dropped from the shape."""
        kept = [axis for axis in range(len(self.perm)) if axis not in axes]
        return Layout(tuple(kept.index(axis) for axis in self.perm if axis in kept))

    def last(self, axis: int) -> Layout:
        """This layout with ONNX axis `axis` moved to the end."""
        return Layout((*(a for a in self.perm if a != axis), axis))


@cache
def natural(rank: int) -> Layout:
    """ONNX's own order."""
    return Layout(tuple(range(rank)))


@cache
def channels_last(rank: int) -> Layout:
    """Batch, space, channels; the natural order where there is no space."""
    return Layout((0, *range(2, rank), 1)) if rank > 2 else natural(rank)


def extents(tensor: Tensor) -> Extents:
    """The shape with dynamic dimensions marked, for comparing and matching."""
    return tuple(s * _DYNAMIC if d == -1 else s for s, d in zip(tensor.shape, tensor.signature, strict=True))


def same_bytes(a: Layout, b: Layout, shape: Extents) -> bool:
    """Whether both lay a tensor out identically in memory: they differ at most in where axes of size 1 stand."""
    if a == b:
        return True
    return a.split == b.split and _order(a, shape) == _order(b, shape)


def reshaped(source: Layout, before: Extents, after: Extents, wished: Layout | None = None) -> Layout | None:
    """The layout in which `after` needs no data movement when `before` lies as `source`; None when there is none."""
    if source.split or 0 in before or 0 in after:
        return natural(len(after)) if source.is_natural else None
    groups = _groups(before, after)
    if groups is None:
        return None
    order = _order(source, before)
    placed: list[int] = []
    position = 0
    owner = {axis: group for group in groups for axis in group[0]}
    while position < len(order):
        axes, outs = owner[order[position]]
        if tuple(order[position : position + len(axes)]) != axes:
            return None
        placed.extend(outs)
        position += len(axes)
    return _with_ones(placed, after, wished)


def flattened(source: Layout, before: Extents, after: Extents) -> Layout | None:
    """The layout of [N, C, H, W] flattened to [N, C*H*W] in whatever order it lies; None when it is not such a
    flattening.
    """
    if len(after) != 2 or source.split or source.perm[0] != 0 or before[0] != after[0]:
        return None
    return Layout((0, 1), Split(tuple(before[1:]), tuple(axis - 1 for axis in source.perm[1:])))


def _order(layout: Layout, shape: Extents) -> list[int]:
    return [axis for axis in layout.perm if shape[axis] != 1]


def _groups(before: Extents, after: Extents) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """The smallest runs of axes with equal products on both sides, axes of size 1 left out."""
    left = [axis for axis, size in enumerate(before) if size != 1]
    right = [axis for axis, size in enumerate(after) if size != 1]
    groups = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = i, j
        a, b = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(left):
                a, i = a * before[left[i]], i + 1
            elif b < a and j < len(right):
                b, j = b * after[right[j]], j + 1
            else:
                return None
        groups.append((tuple(left[start:i]), tuple(right[stop:j])))
    return groups if i == len(left) and j == len(right) else None


def _with_ones(order: list[int], shape: Extents, wished: Layout | None) -> Layout:
    """A layout with `order` for the axes that are not 1: the wished one, a usual one, or ones by their neighbours."""
    rank = len(shape)
    for candidate in (wished, natural(rank), channels_last(rank)):
        if candidate and not candidate.split and _order(candidate, shape) == order:
            return candidate
    perm = list(order)
    for axis in range(rank):
        if shape[axis] == 1:
            perm.insert(perm.index(axis - 1) + 1 if axis - 1 in perm else 0, axis)
    return Layout(tuple(perm))


@dataclass(frozen=True)
class Arrangement:
    """How one node works: the layout it takes each input in (None: it sees to that constant itself), and makes each
    output in.
    """

    inputs: tuple[Layout | None, ...]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True)
class View:
    """What a rule sees: the node, the layouts its computed inputs come in, those its outputs are wished in.

    `absorbs(tensor)` says whether all readers of a flattened tensor take its elements in any order.
    """

    node: Node
    incoming: tuple[Layout | None, ...]
    wished: tuple[Layout | None, ...]
    absorbs: Callable[[Tensor], bool] = field(default=lambda _: False)


class LayoutRule(Protocol):
    """What an operator can work on. `keeps_order`: an input in any order makes an output in the same order."""

    @property
    def keeps_order(self) -> bool:
        """Whether an input taken in any order of its elements leaves the output in that order."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """The ways to run the node, the preferred first."""

    def wishes(self, node: Node, wished: tuple[Layout | None, ...]) -> tuple[Layout | None, ...]:
        """How the node would like each input, given how its outputs are wished."""

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Whether input `index` may be a flattened tensor in any order of its elements (a `Split`)."""


@dataclass(frozen=True)
class LayoutPlan:
    """The decision: each node's arrangement, each computed tensor's layout, and the graph outputs'."""

    arrangements: dict[Node, Arrangement]
    layouts: dict[Tensor, Layout]
    outputs: dict[str, Layout]


def decide(graph: Graph, rule_of: Callable[[Node], LayoutRule], io_layout: IoLayout | None) -> LayoutPlan:
    """The layouts of the whole graph."""
    uses = graph.consumers()
    kept = set(graph.outputs.values())

    def absorbs(tensor: Tensor) -> bool:
        return tensor not in kept and all(
            (rule := rule_of(node)).takes_any_order(node, node.inputs.index(tensor))
            and (not rule.keeps_order or all(absorbs(output) for output in node.outputs))
            for node in uses.get(tensor, [])
        )

    wishes = _wishes(graph, rule_of, io_layout)
    layouts = {tensor: _at_input(tensor, wishes.get(tensor), io_layout) for tensor in graph.inputs.values()}
    arrangements: dict[Node, Arrangement] = {}
    for node in graph.nodes:
        incoming = tuple(layouts.get(t) if t is not None else None for t in node.inputs)
        wished = tuple(wishes.get(t) for t in node.outputs)
        options = rule_of(node).arrangements(View(node, incoming, wished, absorbs))
        best = min(options, key=lambda option: _cost(node, option, incoming, wished))
        arrangements[node] = best
        layouts.update(zip(node.outputs, best.outputs, strict=True))
    outputs = {name: _at_output(t, layouts.get(t), io_layout) for name, t in graph.outputs.items()}
    return LayoutPlan(arrangements, layouts, outputs)


def _wishes(graph: Graph, rule_of: Callable[[Node], LayoutRule], io_layout: IoLayout | None) -> dict[Tensor, Layout]:
    """The layout most readers of each tensor would like; the first reader's where they are even."""
    votes: dict[Tensor, list[Layout]] = {}
    chosen: dict[Tensor, Layout] = {}

    def choose(tensor: Tensor) -> Layout | None:
        if tensor not in chosen and votes.get(tensor):
            ballot = votes[tensor][::-1]
            chosen[tensor] = max(ballot, key=ballot.count)
        return chosen.get(tensor)

    for output in graph.outputs.values():
        votes.setdefault(output, []).append(_border(output.rank, io_layout))
    for node in reversed(graph.nodes):
        wanted = rule_of(node).wishes(node, tuple(choose(tensor) for tensor in node.outputs))
        for tensor, layout in zip(node.inputs, wanted, strict=False):
            if tensor is not None and layout is not None and not tensor.is_constant:
                votes.setdefault(tensor, []).append(layout)
    for given in graph.inputs.values():
        choose(given)
    return chosen


def _border(rank: int, io_layout: IoLayout | None) -> Layout:
    return natural(rank) if io_layout == "nchw" or rank < 4 else channels_last(rank)


def _at_input(tensor: Tensor, wished: Layout | None, io_layout: IoLayout | None) -> Layout:
    if io_layout is None and wished is not None and wished.is_natural:
        return wished
    return _border(tensor.rank, io_layout)


def _at_output(tensor: Tensor, made: Layout | None, io_layout: IoLayout | None) -> Layout:
    border = _border(tensor.rank, io_layout)
    return made if io_layout is None and made is not None and made.is_natural else border


def _cost(node: Node, option: Arrangement, incoming: Sequence[Layout | None], wished: Sequence[Layout | None]) -> float:
    """Elements moved to feed the node, and (half, for a wish is not a certainty) to please its readers."""
    cost = 0.0
    for tensor, have, want in zip(node.inputs, incoming, option.inputs, strict=False):
        if tensor is not None and have is not None and want is not None and have != want:
            cost += _moved(tensor, have, want)
    for tensor, makes, wish in zip(node.outputs, option.outputs, wished, strict=True):
        if wish is not None and makes != wish:
            cost += 0.5 * _moved(tensor, makes, wish)
    return cost


def _moved(tensor: Tensor, have: Layout, want: Layout) -> float:
    return 0.01 if same_bytes(have, want, extents(tensor)) else 1.0 + tensor.size
