"""High-bias absorption: what a channel never falls below goes from its activation into the next layer's bias.

    relu(y) = relu(y - c) + c  for y >= c,  so  b1' = b1 - c,  b2' = b2 + W2 c,  c_i = max(0, min_j y_ij - room)

(Nagel et al., 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section 4.1.3, with the
smallest value that the samples showed in place of mean - 3 standard deviations.) A channel with a large bias, which
equalization makes larger, is positive everywhere: without the constant its tensor needs a shorter range, and the one
scale of the tensor gets finer. On the samples nothing changes; a smaller value than any of theirs, less `ROOM` of the
channel's range, is cut at c instead of at 0, as an observed range cuts.

It is done where the constant reaches every output position of the next layer: no padding on the way. Behind a
Clip(0, high) a channel that reaches `high` keeps its constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import attribute, constant_array, node_key, read_layer, value_name
from edgeship.calibration.observing.collect import Statistic
from edgeship.calibration.planning.selection import select
from edgeship.calibration.refine import Observe, Refinement
from edgeship.calibration.refine._spans import Pair, find_pairs
from edgeship.calibration.refine.equalize import with_constants
from edgeship.calibration.types import Array, QuantRules

ROOM = 0.1
"""Of a channel's range on the samples, left below its smallest value for inputs that are not among them."""


class ChannelRanges:
    """The smallest and largest value of each channel (axis 1)."""

    def __init__(self) -> None:
        self.low: Array | None = None
        self.high: Array | None = None

    def update(self, values: Array) -> None:
        """Takes in one batch (N, C, ...). Raises ValueError when a value is NaN or infinite."""
        others = tuple(i for i in range(values.ndim) if i != 1)
        low, high = values.min(axis=others), values.max(axis=others)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("some of its values are NaN or infinite")
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def merge(self, other: ChannelRanges) -> None:
        """Takes in what another ChannelRanges saw."""
        if other.low is not None and other.high is not None:
            self.low = other.low if self.low is None else np.minimum(self.low, other.low)
            self.high = other.high if self.high is None else np.maximum(self.high, other.high)

    def absorbed(self, bound: float) -> Array:
        """c of every channel, float64; `bound` is where the activation is clipped, or infinity."""
        if self.low is None or self.high is None:
            raise TypeError("no values of the layer were collected")
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        room = ROOM * (high - low)
        return np.where(high + room < bound, np.maximum(low - room, 0.0), 0.0)


class AbsorbBias(Refinement):
    """The refinement: changes the biases of the float model before its ranges are observed."""

    step = "model"

    def __init__(self) -> None:
        self._report: dict[str, Any] = {}

    def configured(self, options: object, progress: object) -> Refinement:
        """One with nothing to report yet."""
        return AbsorbBias()

    def prepare(self, model: ir.Model, rules: QuantRules, observe: Observe) -> ir.Model:
        """A new float model with smaller activations."""
        pairs = [pair for pair in find_pairs(model, set(select(model, rules).int8)) if _can_absorb(pair)]
        if not pairs:
            return model
        seen = {value_name(pair.first.outputs[0]): ChannelRanges() for pair in pairs}
        observe(model, {name: [ranges] for name, ranges in seen.items()})
        return absorb(model, pairs, seen, self._report)

    def report(self) -> Mapping[str, Any]:
        """How many channels of which layers gave up a constant, and the largest."""
        return self._report


def absorb(model: ir.Model, pairs: list[Pair], seen: Mapping[str, Statistic], report: dict[str, Any]) -> ir.Model:
    """A copy of the model with constants of channels moved into the next layer's bias, which `report` tells of."""
    biases: dict[ir.Node, Array] = {}
    for pair in pairs:
        ranges = seen[value_name(pair.first.outputs[0])]
        if not isinstance(ranges, ChannelRanges):
            raise TypeError(f"no channel ranges of {pair.first.outputs[0].name} were collected")
        constant = ranges.absorbed(pair.bound)
        if not constant.any():
            continue
        for node in (pair.first, pair.second):
            biases.setdefault(node, np.asarray(read_layer(node).bias, np.float64))
        biases[pair.first] = biases[pair.first] - constant
        biases[pair.second] = biases[pair.second] + _reached(pair.second, constant)
        moved = {"channels": int(np.count_nonzero(constant)), "largest": round(float(constant.max()), 6)}
        report[node_key(pair.first)] = moved
    return with_constants(model, {}, biases)


def _can_absorb(pair: Pair) -> bool:
    """Whether both layers have biases and no padding lies between the first and what the second computes."""
    if any(read_layer(node).bias is None for node in (pair.first, pair.second)) or pair.second.op_type == "MatMul":
        return False
    node: ir.Node | None = pair.second
    while node is not None and node is not pair.first:
        if any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
            return False
        if attribute(node, "ceil_mode", 0):
            return False
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    bias = constant_array(pair.second.inputs[2])
    return bias is not None and bias.size == read_layer(pair.second).channels


def _reached(node: ir.Node, constant: Array) -> Array:
    """W c: what the layer makes of an input that is `constant` everywhere, bias apart."""
    layer = read_layer(node)
    weights = layer.weights.astype(np.float64)
    if node.op_type != "Conv":
        return np.asarray(np.moveaxis(weights, layer.axis, 0) @ constant)
    groups = int(attribute(node, "group", 1))
    taps = weights.reshape(weights.shape[0], weights.shape[1], -1).sum(axis=2)
    each = np.repeat(constant.reshape(groups, -1), weights.shape[0] // groups, axis=0)
    return np.asarray((taps * each).sum(axis=1))


REFINEMENT = AbsorbBias()
