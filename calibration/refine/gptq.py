"""Second-order rounding (GPTQ): what one weight's rounding does to the output, the weights after it take back.

A layer's output error is e x with e = w - w_hat. Its mean goes into the bias; what is left has the power

    e C e^T,   C = E[x x^T] - E[x] E[x]^T,   over the samples and output positions

The weights of a row are rounded one after the other, and each rounding error is spread over those still to come such
that e C e^T is least (Hassibi and Stork, 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon",
eq. 5; in a fixed order by one Cholesky factor: Frantar et al., 2023, "GPTQ", section 3.3):

    w[j] += -(w[i] - w_hat[i]) / U[i, i] * U[i, j]  for j > i,   U^T U = (C + damping)^-1,  U upper triangular

Plain rounding makes each weight's error small; this makes the output's error small, which correlated inputs (neighbour
pixels under a kernel, channels that fire together) allow to be several times smaller. Scales stay: searched by the same
measure, they cut off large weights that the calibration samples did not need and others do. Where weights are
pair-limited, pairs are rounded together and within their limit, so that it costs the output as little as can be.

The second moments are sums over at most `POSITIONS` output positions of each sample, in memory of fixed size; those of
several processes add up. They are taken about the first sample's mean: where inputs vary little, compared with how
large they are, nothing of C would be left but the rounding of E[x x^T]. Rows longer than `BLOCK` are cut into blocks
whose correlation is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import Layer, activation_inputs, attribute, node_key, read_layer, value_name
from edgeship.calibration.graph.patches import Patches, from_kernel_rows, kernel_rows
from edgeship.calibration.observing.collect import Statistic
from edgeship.calibration.planning.pair_limit import LIMIT, repair, uses_pair_kernel
from edgeship.calibration.planning.selection import select
from edgeship.calibration.planning.weights import layer_steps, quantize_bias
from edgeship.calibration.refine import Refinement
from edgeship.calibration.refine.bias_correction import BIAS
from edgeship.calibration.refine.weight_scale import weight_readers
from edgeship.calibration.types import (
    Array,
    QuantizedConstant,
    QuantPlan,
    QuantRules,
    WeightScheme,
)

ROUNDED = frozenset({"Conv", "Gemm"})
"""Layers whose patches `patches` knows and whose bias can take the mean."""
POSITIONS = 512
BLOCK = 1024
"""Even, so that no pair of weights is cut apart."""
DAMPING = (0.01, 0.3)
"""Of the mean variance, added to each: so much, and so much times K / (positions seen). The less was seen, the less it
decides: 8 images behind a classifier's 768 weights leave plain rounding."""
_PANEL = 64
"""Columns whose corrections are gathered before the matrix product that spreads them over all later ones."""


class Moments:
    """First and second moments of what lies under a layer's kernel: per group of input channels and block of K.

    Both are sums of x - p, with p the mean of the first batch.
    """

    def __init__(self, layer: Layer) -> None:
        self._node = layer.node
        self._weights = layer.weights
        self.groups = _groups(layer)
        self.length = kernel_rows(layer.node, layer.weights).shape[1]
        self.blocks = [(start, min(start + BLOCK, self.length)) for start in range(0, self.length, BLOCK)]
        self._pivot = np.zeros((self.groups, self.length), np.float32)
        self._first = np.zeros((self.groups, self.length))
        self._second = [np.zeros((self.groups, end - start, end - start)) for start, end in self.blocks]
        self.count = 0
        self._rounded: dict[bytes, tuple[QuantizedConstant, Array]] = {}

    def update(self, values: Array) -> None:
        """Takes in one batch of the layer's input, batch axis first."""
        columns = self._columns(values)
        if not self.count:
            self._pivot = columns.mean(axis=1, dtype=np.float64).astype(np.float32)
        columns = columns - self._pivot[:, np.newaxis, :]
        self._first += columns.sum(axis=1, dtype=np.float64)
        for block, (start, end) in enumerate(self.blocks):
            part = columns[:, :, start:end]
            self._second[block] += np.matmul(part.transpose(0, 2, 1), part)
        self.count += columns.shape[1]
        self._rounded.clear()

    def merge(self, other: Moments) -> None:
        """Takes in what another Moments of the same layer saw."""
        if not self.count:
            self._pivot = other._pivot
        apart = other._pivot.astype(np.float64) - self._pivot  # sum (y + d)(y + d)^T, y about the other's pivot
        for block, (start, end) in enumerate(self.blocks):
            d, first = apart[:, start:end], other._first[:, start:end]
            self._second[block] += (
                other._second[block] + other.count * _outer(d, d) + _outer(first, d) + _outer(d, first)
            )
        self._first += other._first + other.count * apart
        self.count += other.count
        self._rounded.clear()

    def rounded(self, layer: Layer, constant: QuantizedConstant, *, pairs: bool) -> tuple[QuantizedConstant, Array]:
        """The layer's constant rounded anew by these moments, and the mean error of each output channel.

        Done once for each constant: plans that differ elsewhere only (mixed precision tries many) ask again.
        """
        key = hashlib.sha256(constant.params.scale.tobytes() + constant.integers.tobytes() + bytes([pairs])).digest()
        if key not in self._rounded:
            self._rounded[key] = _rounded(layer, constant, self, pairs=pairs)
        return self._rounded[key]

    def means(self) -> Array:
        """E[x]: (groups, K)."""
        if not self.count:
            raise StageError(f"node {node_key(self._node)}: moments of no samples were asked for")
        return np.asarray(self._pivot + self._first / self.count)

    def covariance(self, block: int) -> Array:
        """C of one block of K: (groups, k, k)."""
        start, end = self.blocks[block]
        if not self.count:
            raise StageError(f"node {node_key(self._node)}: moments of no samples were asked for")
        mean = self._first[:, start:end] / self.count
        return np.asarray(self._second[block] / self.count - _outer(mean, mean))

    def _columns(self, values: Array) -> Array:
        """The inputs under the kernel at evenly spread output positions: float32 (groups, positions, K)."""
        patches = Patches(self._node, values, self._weights)
        if self._node.op_type != "Conv":
            every = patches.under(())
            return np.asarray(every[:: max(1, len(every) // POSITIONS)], np.float32)[np.newaxis]
        taps = [patches.under(tap).reshape(*values.shape[:2], -1) for tap in patches.taps()]
        stride = max(1, taps[0].shape[-1] * values.shape[0] // POSITIONS) | 1  # odd: it runs through all columns
        taken = np.stack([tap[:, :, ::stride] for tap in taps], axis=-2).astype(np.float32, copy=False)
        # (N, C, taps, P) -> (groups, N * P, taps * C/group)
        count, channels, kernel, positions = taken.shape
        grouped = taken.reshape(count, self.groups, channels // self.groups, kernel, positions)
        return grouped.transpose(1, 0, 4, 3, 2).reshape(self.groups, count * positions, -1)


class _Inputs:
    """The moments of all layers that read one tensor, by node name."""

    def __init__(self) -> None:
        self.layers: dict[str, Moments] = {}

    def update(self, values: Array) -> None:
        """Takes in one batch."""
        for moments in self.layers.values():
            moments.update(values)


class Gptq(Refinement):
    """The refinement: sees the inputs of the layers, then rounds their weights anew."""

    step = "weights"

    def statistics(self, model: ir.Model, rules: QuantRules) -> dict[str, Statistic]:
        """Empty moments for every layer."""
        found: dict[str, Statistic] = {}
        for node in select(model, rules).int8:
            if node.op_type in ROUNDED:
                inputs = found.setdefault(value_name(activation_inputs(node)[0]), _Inputs())
                if isinstance(inputs, _Inputs):
                    inputs.layers[node_key(node)] = Moments(read_layer(node))
        return found

    def refine(
        self, model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic], weights: WeightScheme
    ) -> QuantPlan:
        """The plan with other integers in the same scales, and the mean error of each layer in its bias."""
        return round_weights(model, plan, seen, limited=weights == "pair_limited")


def round_weights(
    model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic], *, limited: bool = False
) -> QuantPlan:
    """The plan with weights of least output error. An initializer that several layers read is left as it is."""
    weights, biases = dict(plan.weights), dict(plan.biases)
    for name, layers in weight_readers(model, plan).items():
        layer = layers[0]
        if len(layers) > 1 or layer.node.op_type not in ROUNDED:
            continue
        source = value_name(activation_inputs(layer.node)[0])
        inputs = seen.get(source)
        if not isinstance(inputs, _Inputs):
            raise StageError(f"no moments of tensor {source} were collected, which node {node_key(layer.node)} needs")
        moments = inputs.layers[node_key(layer.node)]
        pairs = limited and uses_pair_kernel(layer.node, layer.weights)
        weights[name], shift = moments.rounded(layer, plan.weights[name], pairs=pairs)
        bias = (np.zeros(layer.channels) if layer.bias is None else layer.bias) + shift
        corrected = replace(layer, bias=bias.astype(np.float32))
        biases[node_key(layer.node)] = quantize_bias(corrected, layer_steps(layer, plan)[0], weights[name].params, BIAS)
    return replace(plan, weights=weights, biases=biases)


def _rounded(
    layer: Layer, constant: QuantizedConstant, moments: Moments, *, pairs: bool
) -> tuple[QuantizedConstant, Array]:
    """The constant rounded anew in its scales, and the mean error of each output channel: float64 (channels,)."""
    node, params = layer.node, constant.params
    rows = kernel_rows(node, layer.weights).astype(np.float64)
    scales = np.atleast_1d(params.scale).astype(np.float64)
    step = scales[np.arange(len(rows)) % scales.size][:, np.newaxis]
    wanted = (rows / step).reshape(moments.groups, -1, rows.shape[1])
    integers = kernel_rows(node, constant.integers).astype(np.float64).reshape(wanted.shape)
    for block, (start, end) in enumerate(moments.blocks):
        covariance = moments.covariance(block)
        damping = DAMPING[0] + DAMPING[1] * (end - start) / moments.count
        target, before = wanted[..., start:end], integers[..., start:end]
        after = feed_back(target, covariance, damping, params.spec.qmax, pairs=pairs)
        better = _power(target - after, covariance) < _power(target - before, covariance)
        integers[..., start:end] = np.where(better[..., np.newaxis], after, before)
    error = (rows - integers.reshape(rows.shape) * step).reshape(wanted.shape)
    shift = np.matmul(error, moments.means()[..., np.newaxis]).reshape(-1)
    flat = integers.reshape(rows.shape).astype(constant.integers.dtype)
    return QuantizedConstant(params, from_kernel_rows(node, flat, constant.integers)), shift


def _outer(a: Array, b: Array) -> Array:
    """a b^T of each group: (groups, k), (groups, k) -> (groups, k, k)."""
    return np.asarray(a[:, :, np.newaxis] * b[:, np.newaxis, :])


def _power(error: Array, covariance: Array) -> Array:
    """e C e^T of each row."""
    return np.asarray((np.matmul(error, covariance) * error).sum(axis=-1))


def feed_back(wanted: Array, covariance: Array, damping: float, qmax: int, *, pairs: bool) -> Array:
    """Integers (groups, rows, k) near `wanted` whose errors cancel in the output, by `covariance` (groups, k, k).

    `damping` is a share of the mean variance of each group. What is zero was pruned, and stays zero.
    """
    groups, rows, length = wanted.shape
    order = _order(covariance, pairs=pairs)
    ordered = np.take_along_axis(wanted, order[:, np.newaxis, :], axis=2)
    pruned = ordered == 0
    square = np.take_along_axis(covariance, order[:, :, np.newaxis], axis=1)
    square = np.take_along_axis(square, order[:, np.newaxis, :], axis=2)
    upper = _factor(square, damping)
    chosen = np.empty_like(ordered)
    for start in range(0, length, _PANEL):
        end = min(start + _PANEL, length)
        errors = np.empty((groups, rows, end - start))
        for at in range(start, end):
            pair = np.where(pruned[:, :, at : at + 2], 0.0, ordered[:, :, at : at + 2])
            if pairs:
                chosen[:, :, at] = _within_pair(pair, chosen, at, qmax)
            else:
                chosen[:, :, at] = np.clip(np.rint(pair[..., 0]), -qmax, qmax)
            error = (ordered[:, :, at] - chosen[:, :, at]) / upper[:, at, at, np.newaxis]
            errors[:, :, at - start] = error
            ordered[:, :, at + 1 : end] -= error[:, :, np.newaxis] * upper[:, np.newaxis, at, at + 1 : end]
        ordered[:, :, end:] -= np.matmul(errors, upper[:, start:end, end:])
    back = np.argsort(order, axis=1)
    return np.take_along_axis(chosen, back[:, np.newaxis, :], axis=2)


def _within_pair(pair: Array, chosen: Array, at: int, qmax: int) -> Array:
    """The integers of column `at`, first of `pair`: a pair's first weight leaves its second what the limit needs.

    `repair` says how they share.
    """
    if at % 2 == 0:
        return repair(pair.reshape(-1, pair.shape[-1]), qmax).reshape(pair.shape)[..., 0]
    first = chosen[:, :, at - 1]
    low = np.maximum(-qmax, -LIMIT - np.minimum(first, 0))
    high = np.minimum(qmax, LIMIT - np.maximum(first, 0))
    return np.clip(np.rint(pair[..., 0]), low, high)


def _order(covariance: Array, *, pairs: bool) -> Array:
    """The weights of strong inputs first, whose errors cost most; pairs stay together: (groups, k)."""
    strength = np.diagonal(covariance, axis1=1, axis2=2)
    length = strength.shape[1]
    if not pairs:
        return np.argsort(-strength, axis=1, kind="stable")
    whole = length // 2 * 2
    best = strength[:, :whole].reshape(len(strength), -1, 2).max(axis=2)
    first = 2 * np.argsort(-best, axis=1, kind="stable")
    order = np.stack([first, first + 1], axis=-1).reshape(len(strength), -1)
    return np.concatenate([order, np.full((len(order), length - whole), length - 1)], axis=1).astype(np.intp)


def _factor(covariance: Array, damping: float) -> Array:
    """U with U^T U = (C + damping)^-1, upper triangular: (groups, k, k)."""
    length = covariance.shape[1]
    mean = np.trace(covariance, axis1=1, axis2=2) / length
    added = np.where(mean > 0, damping * mean, 1.0)
    inverse = np.linalg.inv(covariance + added[:, np.newaxis, np.newaxis] * np.eye(length))
    lower = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2)
    return np.asarray(lower.transpose(0, 2, 1))


def _groups(layer: Layer) -> int:
    return int(attribute(layer.node, "group", 1)) if layer.node.op_type == "Conv" else 1


REFINEMENT = Gptq()
