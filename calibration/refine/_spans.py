"""Returns the layers of a graph between which channels can be scaled: pairs of layers, and the groups that sums tie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    activation_bounds,
    attribute,
    constant_array,
    read_layer,
    value_name,
    why_not_layer,
)
from edgeship.calibration.refine._residual import FLATTEN, POOLS, find_residuals, keeps_channels
from edgeship.calibration.types import Array


@dataclass
class Pair:
    """Two layers, the second the only reader of the first, with nothing but channel-wise operators between.

    `bound`: the upper end of the Clip between, or infinity.
    """

    first: ir.Node
    second: ir.Node
    bound: float


@dataclass
class Span:
    """Layers that write and layers that read tensors with the same factors: a pair, or a residual group.

    There are `channels` factors; layers and tensors have the place of theirs among them. `peaks`: each channel's
    largest value by tensor; `limits`: what no channel may exceed there.
    """

    channels: int
    producers: Mapping[ir.Node, slice]
    consumers: Mapping[ir.Node, slice]
    bound: float
    tensors: Mapping[str, slice]
    peaks: dict[str, Array] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)


def find_spans(model: ir.Model, candidates: set[ir.Node]) -> list[Span]:
    """The pairs, then the residual groups, of layers among `candidates` that can be equalized, in graph order."""

    def writes(node: ir.Node) -> bool:
        return node in candidates and node.op_type in {"Conv", "Gemm"} and _can_be_scaled(node)

    def reads(node: ir.Node) -> bool:
        return node in candidates and _can_be_scaled(node) and _reads_channels(node)

    spans = []
    for pair in find_pairs(model, candidates):
        every = slice(0, read_layer(pair.first).channels)
        name = value_name(pair.first.outputs[0])
        spans.append(Span(every.stop, {pair.first: every}, {pair.second: every}, pair.bound, {name: every}))
    for group in find_residuals(model, writes, reads):
        sides = [(place, read_layer(node).channels) for node, place in group.producers.items()]
        sides += [(place, _inputs_of(node)) for node, place in group.consumers.items()]
        if all(place.stop - place.start == side for place, side in sides):
            spans.append(Span(group.channels, group.producers, group.consumers, np.inf, group.tensors))
    return spans


def find_pairs(model: ir.Model, candidates: set[ir.Node]) -> list[Pair]:
    """The pairs of layers among `candidates` that can be equalized, in graph order."""
    pairs = []
    for node in model.graph:
        if node in candidates and _can_be_scaled(node) and node.op_type in {"Conv", "Gemm"}:
            pair = _pair_from(node)
            if pair is not None and pair.second in candidates:
                pairs.append(pair)
    return pairs


def _can_be_scaled(node: ir.Node) -> bool:
    """Whether the node is a layer whose constants are initializers that nothing else reads."""
    if node.op_type not in {"Conv", "Gemm", "MatMul"} or why_not_layer(node) is not None:
        return False
    constants = [value for value in node.inputs[1:3] if value is not None]
    alone = all(value.is_initializer() and len(list(value.uses())) == 1 for value in constants)
    layer = read_layer(node)
    bias = constant_array(constants[1]) if len(constants) > 1 else None
    whole = bias is None or bias.size == layer.channels
    return alone and whole and (node.op_type != "MatMul" or layer.weights.ndim == 2)


def _reads_channels(node: ir.Node) -> bool:
    """Whether the axis that the layer sums over is axis 1, where a convolution's channels are."""
    value = node.inputs[0]
    return node.op_type == "Conv" or (value is not None and value.shape is not None and len(value.shape) == 2)


def _pair_from(first: ir.Node) -> Pair | None:
    """The pair that starts with `first`; None where another reader or an operator of another kind comes between."""
    value, bound = first.outputs[0], np.inf
    acted = False
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        node, index = uses[0]
        if index != 0 or node.graph is not first.graph:
            return None
        if node.op_type in {"Conv", "Gemm", "MatMul"}:
            fits = acted and _can_be_scaled(node) and _reads_channels(node)
            return Pair(first, node, bound) if fits and _inputs_of(node) == read_layer(first).channels else None
        bounds = activation_bounds(node) if node.op_type in {"Relu", "Clip"} else None
        if bounds is not None and bounds[0] == 0.0:
            bound, acted = min(bound, bounds[1]), True
        elif node.op_type not in POOLS and not (node.op_type in FLATTEN and keeps_channels(node)):
            return None
        value = node.outputs[0]


def _inputs_of(node: ir.Node) -> int:
    return int(by_input(node, read_layer(node).weights).shape[0])


def by_input(node: ir.Node, weights: Array) -> Array:
    """The weights as (input channels, everything that meets the channel)."""
    if node.op_type != "Conv":
        return np.moveaxis(weights, 1 - read_layer(node).axis, 0)
    groups = int(attribute(node, "group", 1))
    grouped = weights.reshape(groups, weights.shape[0] // groups, weights.shape[1], -1)
    return grouped.transpose(0, 2, 1, 3).reshape(groups * weights.shape[1], -1)
