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

Where an Add ties tensors together (_residual.py) one factor has to serve all layers that write and that read them:

    log s_i = (sum_p log r_p,i - sum_c log r_c,i) / (P + C)

over P layers p that write and C layers c that read, which makes the sum over them of the squared deviations of the
logarithms from their layer's mean the least; with one of each it is eq. 11. Where the tensors have some of the channels
only (a Pad adds channels between stages), the sums are over the layers that have channel i, and to be comparable each
layer's logarithms are first moved to a common mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    attribute,
    constant_array,
    is_depthwise,
    node_key,
    read_layer,
    value_name,
)
from edgeship.calibration.observing.collect import Statistic
from edgeship.calibration.planning.selection import select
from edgeship.calibration.refine import Observe, Refinement
from edgeship.calibration.refine._spans import Span, by_input, find_spans
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


class ChannelPeaks:
    """The largest value of each channel (axis 1), not below zero, or its largest magnitude."""

    def __init__(self, *, magnitudes: bool = False) -> None:
        self.peaks: Array | None = None
        self._magnitudes = magnitudes

    def update(self, values: Array) -> None:
        """Takes in one batch (N, C, ...). Raises ValueError when a value is NaN or infinite."""
        others = tuple(i for i in range(values.ndim) if i != 1)
        seen = values.max(axis=others, initial=0.0)
        if self._magnitudes:
            seen = np.maximum(seen, -values.min(axis=others, initial=0.0))
        if not np.isfinite(seen).all():
            raise ValueError("some of its values are NaN or infinite")
        self.peaks = seen if self.peaks is None else np.maximum(self.peaks, seen)

    def merge(self, other: ChannelPeaks) -> None:
        """Takes in what another ChannelPeaks saw."""
        if other.peaks is not None:
            self.peaks = other.peaks if self.peaks is None else np.maximum(self.peaks, other.peaks)


class Equalize(Refinement):
    """The refinement: changes the float model before its ranges are observed."""

    step = "model"

    def __init__(self) -> None:
        self._report: dict[str, Any] = {}

    def configured(self, options: object, progress: object) -> Refinement:
        """One with nothing to report yet."""
        return Equalize()

    def prepare(self, model: ir.Model, rules: QuantRules, observe: Observe) -> ir.Model:
        """A new float model with equalized layers."""
        spans = find_spans(model, set(select(model, rules).int8))
        if not spans:
            return model
        seen = {name: ChannelPeaks(magnitudes=len(span.tensors) > 1) for span in spans for name in span.tensors}
        observe(model, {name: [peaks] for name, peaks in seen.items()})
        return equalize(model, spans, seen, self._report, per_channel=rules.weight.axis is not None)

    def report(self) -> Mapping[str, Any]:
        """By the first layer that writes: all that write, that read, and how unlike their channels were and are."""
        return self._report


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
    model: ir.Model,
    spans: Sequence[Span],
    seen: Mapping[str, Statistic],
    report: dict[str, Any],
    *,
    per_channel: bool = False,
) -> ir.Model:
    """A copy of the model with the layers of `spans` equalized, which `report` tells of; `seen` has `ChannelPeaks`.

    `per_channel`: the weights will have a scale per output channel, so only activations are equalized.
    """
    layers = {node: read_layer(node) for span in spans for node in (*span.producers, *span.consumers)}
    weights = {node: layer.weights.astype(np.float64) for node, layer in layers.items()}
    biases = {node: layer.bias.astype(np.float64) for node, layer in layers.items() if layer.bias is not None}
    for span in spans:
        _look(span, seen)
    before = [_unlikeness(span, weights, per_channel=per_channel) for span in spans]
    for _ in range(_ROUNDS):
        moved = 0.0
        for span in spans:
            factors = (_of_activations if per_channel else _factors)(span, weights, biases)
            for node, place in span.producers.items():
                weights[node] = _scale_outputs(node, weights[node], 1 / factors[place])
                if node in biases:
                    biases[node] /= factors[place]
            for node, place in span.consumers.items():
                weights[node] = _scale_inputs(node, weights[node], factors[place])
            span.peaks = {name: peaks / factors[span.tensors[name]] for name, peaks in span.peaks.items()}
            moved = max(moved, float(np.abs(np.log(factors)).max()))
        if moved < _SETTLED:
            break
    for span, unlike in zip(spans, before, strict=True):
        now = _unlikeness(span, weights, per_channel=per_channel)
        if now != unlike:
            report[node_key(next(iter(span.producers)))] = {
                "writes": [node_key(node) for node in span.producers],
                "reads": [node_key(node) for node in span.consumers],
                "octaves_before": round(unlike, 3),
                "octaves_after": round(now, 3),
            }
    return with_constants(model, weights, biases)


def _look(span: Span, seen: Mapping[str, Statistic]) -> None:
    """Puts what the samples showed into the span."""
    for name in span.tensors:
        peaks = seen[name]
        if not isinstance(peaks, ChannelPeaks) or peaks.peaks is None:
            raise TypeError(f"no channel peaks of {name} were collected")
        span.peaks[name] = peaks.peaks.astype(np.float64)
        span.limits[name] = span.bound if np.isfinite(span.bound) else float(span.peaks[name].max())


def _written(node: ir.Node, weights: Array) -> Array:
    """The largest magnitude of each output channel's weights."""
    axis = read_layer(node).axis
    return np.asarray(np.abs(weights).max(axis=tuple(i for i in range(weights.ndim) if i != axis)))


def _read(node: ir.Node, weights: Array) -> Array:
    """The largest magnitude of what each input channel meets."""
    return np.asarray(np.abs(by_input(node, weights)).max(axis=1))


def _unlikeness(span: Span, weights: Mapping[ir.Node, Array], *, per_channel: bool) -> float:
    """The standard deviation of the logarithms of what is made alike, in octaves: of weights, else of activations."""
    ranges = [_written(node, weights[node]) for node in span.producers]
    ranges += [_read(node, weights[node]) for node in span.consumers]
    if per_channel:
        ranges = list(span.peaks.values())
    logs = [np.log2(each[each > each.max(initial=0.0) / _LARGEST]) for each in ranges]
    return float(np.sqrt(np.mean([np.var(each) if each.size else 0.0 for each in logs])))


def _factors(span: Span, weights: Mapping[ir.Node, Array], biases: Mapping[ir.Node, Array]) -> Array:
    """s_i of every channel between layers that will have one weight scale per tensor."""
    written = [(place, _written(node, weights[node])) for node, place in span.producers.items()]
    read = [(place, _read(node, weights[node])) for node, place in span.consumers.items()]
    clipped = _largest(span, {name: peaks * _HEADROOM for name, peaks in span.peaks.items()}) >= span.bound
    live = np.ones(span.channels, bool)
    for place, each in (*written, *read):
        live[place] &= each > 0
    keep = clipped & live
    if keep.any():  # those that stay say what the others are measured against
        written, read = ([(place, each / each[keep[place]].max()) for place, each in side] for side in (written, read))
    if len(written) + len(read) > 2:  # a channel that is dead in one layer of many says nothing about the others
        written, read = (
            [(place, np.maximum(each, each.max() / _LARGEST)) for place, each in side] for side in (written, read)
        )
    logs, layers = np.zeros(span.channels), np.zeros(span.channels)
    for side, sign in ((written, 1.0), (read, -1.0)):
        total = np.zeros(span.channels)
        for place, each in _comparable(span, side, live):
            total[place] += each
            layers[place] += 1
        logs += sign * total
    factors = np.ones(span.channels)
    factors[live] = np.clip(np.exp(logs[live] / layers[live]), 1 / _LARGEST, _LARGEST)
    factors = np.maximum(factors, _smallest(span))
    factors = np.maximum(factors, np.minimum(1.0, _of_biases(span, biases)))
    factors[clipped] = 1.0
    return factors


def _comparable(span: Span, side: Sequence[tuple[slice, Array]], live: Array) -> list[tuple[slice, Array]]:
    """The logarithms of the layers' ranges, 0 for channels that are not `live`.

    With one mean where the layers do not all have the same channels: what is common to a layer's channels says nothing
    about one of them.
    """
    logs = [(place, np.log(np.where(live[place], each, 1.0))) for place, each in side]
    means = [float(each[live[place]].mean()) if live[place].any() else 0.0 for place, each in logs]
    if all(place == slice(0, span.channels) for place in (*span.producers.values(), *span.consumers.values())):
        return logs
    common = float(np.mean(means))
    return [
        (place, np.where(live[place], each - mean + common, 0.0))
        for (place, each), mean in zip(logs, means, strict=True)
    ]


def _of_activations(span: Span, weights: Mapping[ir.Node, Array], biases: Mapping[ir.Node, Array]) -> Array:
    """s_i of every channel between layers whose weights have a scale per output channel."""
    free = all(is_depthwise(node, weights[node]) for node in span.consumers)
    if not free or not all(limit > 0 for limit in span.limits.values()):
        return np.ones(span.channels)
    factors = np.maximum(_smallest(span), 1 / _LARGEST_GROWTH)
    factors = np.maximum(factors, np.minimum(1.0, _of_biases(span, biases)))
    return np.minimum(factors, 1.0)


def _largest(span: Span, values: Mapping[str, Array]) -> Array:
    """Of what each tensor has per channel, the largest, or 0 where none has the channel."""
    largest = np.zeros(span.channels)
    for name, each in values.items():
        largest[span.tensors[name]] = np.maximum(largest[span.tensors[name]], each)
    return largest


def _smallest(span: Span) -> Array:
    """The factors with which every channel is as large as its tensor's limit allows."""
    room = _HEADROOM if np.isfinite(span.bound) else 1.0
    return _largest(span, {name: span.peaks[name] * room / limit for name, limit in span.limits.items() if limit > 0})


def _of_biases(span: Span, biases: Mapping[ir.Node, Array]) -> Array:
    """The factors with which every bias is as large as it may be."""
    shares = np.zeros(span.channels)
    for node, place in span.producers.items():
        limit = span.limits[value_name(node.outputs[0])]
        if node in biases and limit > 0:
            shares[place] = np.maximum(shares[place], np.abs(biases[node]).reshape(-1) / (_LARGEST_BIAS * limit))
    return shares


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
