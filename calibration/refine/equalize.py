"""Cross-layer equalization: channels of unlike size made alike, by a scaling that the next layer undoes.

    relu(W1 x + b1)[i] = s_i relu(W1[i] x / s_i + b1[i] / s_i),  s_i > 0,  so  W2[:, i] s_i  computes the same

    s_i = sqrt(r1_i r2_i) / r2_i,  r1_i = max|W1[i]|,  r2_i = max|W2[:, i]|

(Nagel et al., 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.1, eq. 11.)
After it both layers have channels of like range, which one weight scale per tensor needs; depthwise layers are both a
first and a second one, so whole chains are gone over until nothing moves.

Weights with a scale per output channel need none of this. What they have is activations with one scale per tensor, in
which small channels get few integers. Before a depthwise layer, whose weights have a scale for each channel, another
size of a channel costs nothing on either side: there s_i = m_i / max_j m_j makes all channels' largest activations m_i
alike. Other pairs stay as they are.

Scaling a channel's weights down to the others scales its activations up or down with them, and these have one scale per
tensor. So the samples are asked for each channel's largest activation m_i, and

- behind a Relu no channel grows beyond the largest channel of its tensor: m_i / s_i <= max_j m_j,
- behind a Clip(0, c), which is not homogeneous, a channel that reaches c keeps its size, and others stay under it:
  m_i / s_i <= c. Then the clip cuts no channel on the samples, before and after. On other inputs it cuts a rescaled
  channel at s_i c instead of at c, never below what the samples showed: as an observed range does, channel by channel.

A graph without Clip computes the same for every input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    attribute,
    constant_array,
    is_depthwise,
    node_key,
    read_layer,
    value_name,
    why_not_layer,
)
from edgeship.calibration.observing.collect import Statistic
from edgeship.calibration.planning.selection import activation_bounds, select
from edgeship.calibration.refine import Observe, Refinement
from edgeship.calibration.types import Array, QuantRules

_ROUNDS = 50
_SETTLED = 1e-3
_LARGEST = 1e4
"""No channel is scaled further than this either way: beyond, it is a dead one."""
_LARGEST_GROWTH = 1e3
"""No channel's activations are made larger than this many times: beyond, it is a dead one."""
_LARGEST_BIAS = 100.0
"""A bias may grow to this many times the tensor's largest value: a dead channel's must not overflow int32."""
_HEADROOM = 1.1
"""Room left under a clip's bound for inputs larger than the samples."""
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Identity"})
"""Homogeneous for positive factors, channel by channel."""
_FLATTEN = frozenset({"Flatten", "Reshape", "Squeeze"})


class ChannelPeaks:
    """The largest value of each channel (axis 1), not below zero."""

    def __init__(self) -> None:
        self.peaks: Array | None = None

    def update(self, values: Array) -> None:
        """Takes in one batch (N, C, ...). Raises ValueError when a value is NaN or infinite."""
        seen = values.max(axis=tuple(i for i in range(values.ndim) if i != 1), initial=0.0)
        if not np.isfinite(seen).all():
            raise ValueError("some of its values are NaN or infinite")
        self.peaks = seen if self.peaks is None else np.maximum(self.peaks, seen)

    def merge(self, other: ChannelPeaks) -> None:
        """Takes in what another ChannelPeaks saw."""
        if other.peaks is not None:
            self.peaks = other.peaks if self.peaks is None else np.maximum(self.peaks, other.peaks)


@dataclass
class Pair:
    """Two layers, the second the only reader of the first, with nothing but channel-wise operators between.

    `bound`: the upper end of the Clip between, or infinity.
    """

    first: ir.Node
    second: ir.Node
    bound: float
    peaks: Array = field(default_factory=lambda: np.zeros(0))
    limit: float = 0.0


class Equalize(Refinement):
    """The refinement: changes the float model before its ranges are observed."""

    step = "model"

    def prepare(self, model: ir.Model, rules: QuantRules, observe: Observe) -> ir.Model:
        """A new float model with equalized layers."""
        pairs = find_pairs(model, set(select(model, rules).int8))
        if not pairs:
            return model
        seen = {value_name(pair.first.outputs[0]): ChannelPeaks() for pair in pairs}
        observe(model, {name: [peaks] for name, peaks in seen.items()})
        return equalize(model, pairs, seen, per_channel=rules.weight.axis is not None)


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
            fits = acted and _can_be_scaled(node) and _inputs_of(node) == read_layer(first).channels
            return Pair(first, node, bound) if fits else None
        bounds = activation_bounds(node) if node.op_type in {"Relu", "Clip"} else None
        if bounds is not None and bounds[0] == 0.0:
            bound, acted = min(bound, bounds[1]), True
        elif node.op_type not in _POOLS and not (node.op_type in _FLATTEN and _keeps_channels(node)):
            return None
        value = node.outputs[0]


def _keeps_channels(node: ir.Node) -> bool:
    """Whether (N, C, 1, 1) becomes (N, C)."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or len(result.shape) != 2:
        return False
    return all(side == 1 for side in source.shape[2:]) and source.shape[1] == result.shape[1]


def _inputs_of(node: ir.Node) -> int:
    return int(_by_input(node, read_layer(node).weights).shape[0])


def _by_input(node: ir.Node, weights: Array) -> Array:
    """The weights as (input channels, everything that meets the channel)."""
    if node.op_type != "Conv":
        return np.moveaxis(weights, 1 - read_layer(node).axis, 0)
    groups = int(attribute(node, "group", 1))
    grouped = weights.reshape(groups, weights.shape[0] // groups, weights.shape[1], -1)
    return grouped.transpose(0, 2, 1, 3).reshape(groups * weights.shape[1], -1)


def _scale_inputs(node: ir.Node, weights: Array, factors: Array) -> Array:
    if node.op_type != "Conv":
        return np.asarray(weights * (factors if read_layer(node).axis == 0 else factors[:, np.newaxis]))
    groups = int(attribute(node, "group", 1))
    each = np.repeat(factors.reshape(groups, -1), weights.shape[0] // groups, axis=0)
    return np.asarray(weights * each.reshape(*each.shape, *[1] * (weights.ndim - 2)))


def _scale_outputs(node: ir.Node, weights: Array, factors: Array) -> Array:
    shape = [1] * weights.ndim
    shape[read_layer(node).axis] = factors.size
    return np.asarray(weights * factors.reshape(shape))


def equalize(
    model: ir.Model, pairs: list[Pair], seen: Mapping[str, Statistic], *, per_channel: bool = False
) -> ir.Model:
    """A copy of the model with the layers of `pairs` equalized; `seen` has the `ChannelPeaks` of each first layer.

    `per_channel`: the weights will have a scale per output channel, so only activations are equalized.
    """
    layers = {node: read_layer(node) for pair in pairs for node in (pair.first, pair.second)}
    weights = {node: layer.weights.astype(np.float64) for node, layer in layers.items()}
    biases = {node: layer.bias.astype(np.float64) for node, layer in layers.items() if layer.bias is not None}
    for pair in pairs:
        peaks = seen[value_name(pair.first.outputs[0])]
        if not isinstance(peaks, ChannelPeaks) or peaks.peaks is None:
            raise TypeError(f"no channel peaks of {pair.first.outputs[0].name} were collected")
        pair.peaks = peaks.peaks.astype(np.float64)
        pair.limit = pair.bound if np.isfinite(pair.bound) else float(pair.peaks.max())
    for _ in range(_ROUNDS):
        moved = 0.0
        for pair in pairs:
            bias = biases.get(pair.first, np.zeros(1))
            factors = _of_activations(pair, weights, bias) if per_channel else _factors(pair, weights, bias)
            weights[pair.first] = _scale_outputs(pair.first, weights[pair.first], 1 / factors)
            if pair.first in biases:
                biases[pair.first] /= factors
            weights[pair.second] = _scale_inputs(pair.second, weights[pair.second], factors)
            pair.peaks = pair.peaks / factors
            moved = max(moved, float(np.abs(np.log(factors)).max()))
        if moved < _SETTLED:
            break
    return with_constants(model, weights, biases)


def _factors(pair: Pair, weights: Mapping[ir.Node, Array], bias: Array) -> Array:
    """s_i of every channel between the two layers."""
    axis = read_layer(pair.first).axis
    first = weights[pair.first]
    r1 = np.abs(first).max(axis=tuple(i for i in range(first.ndim) if i != axis))
    r2 = np.abs(_by_input(pair.second, weights[pair.second])).max(axis=1)
    clipped = pair.peaks * _HEADROOM >= pair.bound
    live = (r1 > 0) & (r2 > 0)
    keep = clipped & live
    if keep.any():  # those that stay say what the others are measured against
        r1, r2 = r1 / r1[keep].max(), r2 / r2[keep].max()
    factors = np.ones(r1.size)
    factors[live] = np.clip(np.sqrt(r1[live] / r2[live]), 1 / _LARGEST, _LARGEST)
    if pair.limit > 0:
        room = _HEADROOM if np.isfinite(pair.bound) else 1.0
        factors = np.maximum(factors, pair.peaks * room / pair.limit)
        factors = np.maximum(factors, np.minimum(1.0, np.abs(bias) / (_LARGEST_BIAS * pair.limit)))
    factors[clipped] = 1.0
    return factors


def _of_activations(pair: Pair, weights: Mapping[ir.Node, Array], bias: Array) -> Array:
    """s_i of every channel between two layers whose weights have a scale per output channel."""
    if not is_depthwise(pair.second, weights[pair.second]) or pair.limit <= 0:
        return np.ones(pair.peaks.size)
    room = _HEADROOM if np.isfinite(pair.bound) else 1.0
    factors = np.maximum(pair.peaks * room / pair.limit, 1 / _LARGEST_GROWTH)
    factors = np.maximum(factors, np.minimum(1.0, np.abs(bias) / (_LARGEST_BIAS * pair.limit)))
    return np.minimum(factors, 1.0)


def with_constants(model: ir.Model, weights: Mapping[ir.Node, Array], biases: Mapping[ir.Node, Array]) -> ir.Model:
    """A copy of the model in which the layers have these weights and biases."""
    copy = model.clone()
    nodes = {node_key(node): node for node in copy.graph}
    for index, constants in ((1, weights), (2, biases)):
        for node, array in constants.items():
            value = nodes[node_key(node)].inputs[index]
            old = constant_array(value)
            if value is not None and old is not None:
                value.const_value = ir.tensor(array.astype(np.float32).reshape(old.shape), name=value.name)
    return copy


REFINEMENT = Equalize()
