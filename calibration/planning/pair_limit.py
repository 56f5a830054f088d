"""Pair-limited weights: no two products that x86 adds in 16 bits can exceed them.

    vpmaddubsw:  acc16 = saturate_int16(u[2i] * s[2i] + u[2i+1] * s[2i+1]),  u in 0..255, s in -127..127

ONNX Runtime's int8 kernels for x86 without VNNI (onnxruntime/core/mlas/lib/x86_64/QgemmU8S8KernelAvx2.asm,
ConvSymKernelAvx2.S) multiply this way. Two weights of one sign can reach 255 * 254 = 64770, and the sum clips at
32767: no error, no warning, 12 points of MobileNetV1's accuracy. Nothing clips when for each pair that meets in a
lane

    -128 <= min(a, 0) + min(b, 0)  and  max(a, 0) + max(b, 0) <= 128      (255 * 128 = 32640)

Only the output channels that hold an offending pair are touched. Each one gets the smaller squared weight error of: a
larger scale (all its weights lose resolution), and the same scale with just the offending pairs' integers shrunk
(these weights are off), and mixtures of the two. Depthwise convolutions use another kernel and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import (
    MAC_OPERATORS,
    is_depthwise,
    node_key,
    read_layer,
)
from edgeship.calibration.graph.patches import from_kernel_rows, kernel_rows
from edgeship.calibration.planning.weights import clear_of_boundaries, layer_steps, quantize_bias, weight_key
from edgeship.calibration.types import Array, QuantizedConstant, QuantParams, QuantPlan

LIMIT = 128
_CANDIDATES = 9


def lane_pairs(rows: Array) -> Array:
    """The weights that meet in one 16-bit lane: (rows, K) -> (rows, ceil(K / 2), 2).

    The kernels pack four K values per column and multiply neighbours 2i and 2i+1; K is padded with zeros.
    """
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return padded.reshape(rows.shape[0], -1, 2)


def can_overflow(rows: Array) -> Array:
    """For each pair of `lane_pairs(rows)` whether some uint8 inputs make it clip: bool (rows, pairs)."""
    pairs = lane_pairs(rows.astype(np.int32))
    return np.asarray((np.maximum(pairs, 0).sum(-1) > LIMIT) | (np.minimum(pairs, 0).sum(-1) < -LIMIT))


def uses_pair_kernel(node: ir.Node, weights: Array) -> bool:
    """Whether the node's integer kernel on x86 adds pairs of products in 16 bits."""
    return node.op_type in {"Conv", "Gemm", "MatMul"} and not is_depthwise(node, weights)


@dataclass(frozen=True)
class Limited:
    """What pair-limiting did to one weight tensor: which channels, and by how much their scales grew.

    A tensor with one scale for all channels counts as one channel.
    """

    channels: tuple[int, ...]
    factors: tuple[float, ...]


def limit_pairs(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """The plan with weights that no lane can overflow; biases follow the new scales. Other numbers stay.

    Refinements of the biases belong after this. Raises StageError should a pair be left, which would be a defect here.
    """
    weights = dict(plan.weights)
    biases = dict(plan.biases)
    int8 = set(plan.int8_nodes)
    done: set[str] = set()
    for node in model.graph:
        if node_key(node) not in int8 or node.op_type not in MAC_OPERATORS:
            continue
        layer = read_layer(node)
        key = weight_key(layer, plan)
        if key not in done and uses_pair_kernel(node, layer.weights):
            weights[key] = limit_constant(node, layer.weights, plan.weights[key], layer_steps(layer, plan))
        done.add(key)
        if layer.bias is not None and weights[key] is not plan.weights[key]:
            step = layer_steps(layer, plan)[0]
            bias_spec = plan.biases[node_key(node)].params.spec
            biases[node_key(node)] = quantize_bias(layer, step, weights[key].params, bias_spec)
    return replace(plan, weights=weights, biases=biases)


def limited_channels(full: QuantPlan, limited: QuantPlan) -> dict[str, Limited]:
    """What `limit_pairs` changed, by initializer name."""
    changed: dict[str, Limited] = {}
    for name, after in limited.weights.items():
        before = full.weights[name]
        growth = np.atleast_1d(after.params.scale / before.params.scale)
        axis = after.params.spec.axis
        differs = before.integers != after.integers
        if axis is not None:
            differs = differs.any(axis=tuple(i for i in range(differs.ndim) if i != axis))
        channels = np.flatnonzero(np.atleast_1d(differs.any() if axis is None else differs) | (growth != 1))
        if channels.size:
            factors = tuple(round(float(growth[c]), 6) for c in channels)
            changed[name] = Limited(tuple(int(c) for c in channels), factors)
    return changed


def limit_constant(
    node: ir.Node, weights: Array, constant: QuantizedConstant, around: tuple[float, float] | None = None
) -> QuantizedConstant:
    """The pair-limited form of one weight tensor; the same object when nothing in it can overflow.

    `around`: the scales of the layer's input and output, where both are known: larger scales of weights then keep every
    sum off a rounding boundary too (`weights.clear_of_boundaries`).
    """
    rows = kernel_rows(node, constant.integers)
    scales = np.atleast_1d(constant.params.scale).astype(np.float64)
    channel = np.arange(rows.shape[0]) % scales.size
    touched = np.zeros(scales.size, bool)
    touched[channel[can_overflow(rows).any(axis=1)]] = True
    if not touched.any():
        return constant
    chosen = touched[channel]
    exact = kernel_rows(node, weights).astype(np.float64)[chosen]
    best, scale = _search(exact, scales, channel[chosen], constant.params.spec.qmax, around)
    integers = rows.copy()
    integers[chosen] = best.astype(rows.dtype)
    if can_overflow(integers).any():
        raise StageError(f"node {node_key(node)} ({node.op_type}): pair-limited weights can still overflow")
    params = QuantParams(
        scale.astype(np.float32).reshape(constant.params.scale.shape), constant.params.zero_point, constant.params.spec
    )
    return QuantizedConstant(params, from_kernel_rows(node, integers, constant.integers))


def _search(
    exact: Array, scales: Array, channel: Array, qmax: int, around: tuple[float, float] | None
) -> tuple[Array, Array]:
    """Integers (rows, K) and scales with the least squared weight error per scale.

    The candidates run from the scale as it is (all repair) to the smallest one that needs no repair (all enlargement).
    """
    largest = np.maximum(1.0, _enlargement(exact, scales, channel, qmax))
    best = np.zeros(exact.shape)
    best_error = np.full(scales.size, np.inf)
    best_scale = scales.copy()
    for share in np.linspace(0.0, 1.0, _CANDIDATES):
        candidate = scales * (1.0 + share * (largest - 1.0))
        if around is not None:
            candidate = np.where(candidate > scales, clear_of_boundaries(candidate, *around), candidate)
        candidate = candidate.astype(np.float32).astype(np.float64)
        step = candidate[channel][:, np.newaxis]
        integers = repair(exact / step, qmax)
        squares = ((exact - integers * step) ** 2).sum(axis=1)
        error = np.bincount(channel, squares, scales.size)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], candidate[better]
        best[better[channel]] = integers[better[channel]]
    untouched = np.bincount(channel, minlength=scales.size) == 0
    best_scale[untouched] = scales[untouched]
    return best, best_scale


def _enlargement(exact: Array, scales: Array, channel: Array, qmax: int) -> Array:
    """The growth of each scale (to within 0.5 %) at which plain rounding leaves no offending pair."""
    pairs = lane_pairs(exact)
    sums = np.maximum(np.maximum(pairs, 0).sum(-1), -np.minimum(pairs, 0).sum(-1)).max(axis=1)
    factor = np.ones(scales.size)
    # Rounding moves the sum of a pair by one at most: less growth than this cannot do.
    np.maximum.at(factor, channel, sums / scales[channel] / (LIMIT + 1))
    bad = np.arange(exact.shape[0])
    while True:
        step = (scales * factor).astype(np.float32).astype(np.float64)[channel[bad]][:, np.newaxis]
        bad = bad[can_overflow(np.clip(np.rint(exact[bad] / step), -qmax, qmax)).any(axis=1)]
        if not bad.size:
            return factor
        # Two weights of 127 need at most a factor of two, so this ends.
        factor[np.unique(channel[bad])] *= 1.005


def repair(wanted: Array, qmax: int) -> Array:
    """Integers nearest to `wanted` (rows, K), with each offending pair shrunk to the limit at the least squared error.

    For a pair with excess e, rounding rests r_a, r_b (wanted minus integer, in the pair's own sign): minimizing
    (r_a + d_a)^2 + (r_b + d_b)^2 under d_a + d_b = e gives d_a = (e - r_a + r_b) / 2.
    """
    width = wanted.shape[1]
    pairs = lane_pairs(wanted)
    sign = np.where(pairs.sum(-1, keepdims=True) < 0, -1.0, 1.0)
    pairs = pairs * sign
    integers = np.clip(np.rint(pairs), -qmax, qmax)
    excess = np.maximum(np.maximum(integers, 0).sum(-1) - LIMIT, 0.0)
    rest = pairs - integers
    first = np.clip(np.rint((excess - rest[..., 0] + rest[..., 1]) / 2), 0.0, excess)
    integers[..., 0] -= first
    integers[..., 1] -= excess - first
    return np.asarray((integers * sign).reshape(wanted.shape[0], -1)[:, :width])
