"""Weight scales with the least squared error instead of the largest magnitude.

    s[c] = argmin over s = f s_0[c], f in [0.5, 1], of  sum_k (w[c, k] - s clip(round(w[c, k] / s), -127, 127))^2

A smaller scale rounds all weights finer and clips the largest (Nagel et al., 2021, "A White Paper on Neural Network
Quantization", section 3.1.1, MSE). With one scale per channel there is little to gain, with one per tensor more. The
scale and integers that a layer has already are kept unless others are better, so no error grows. Weights that are
pair-limited stay so: the candidates' integers are shrunk where a pair would overflow. The scales never fall under what
`weights.smallest_scale` allows, and keep every sum off a rounding boundary (`weights.clear_of_boundaries`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    MAC_OPERATORS,
    Layer,
    node_key,
    read_layer,
)
from edgeship.calibration.graph.patches import from_kernel_rows, kernel_rows
from edgeship.calibration.observing.collect import Statistic
from edgeship.calibration.planning.pair_limit import repair, uses_pair_kernel
from edgeship.calibration.planning.weights import (
    clear_of_boundaries,
    layer_steps,
    quantize_bias,
    smallest_scale,
    weight_key,
)
from edgeship.calibration.refine import Refinement
from edgeship.calibration.types import Array, QuantizedConstant, QuantParams, QuantPlan, WeightScheme

_FACTORS = (*np.linspace(0.5, 0.88, 11), *np.linspace(0.9, 0.995, 20))
"""Denser where most of the best ones lie."""


class WeightScale(Refinement):
    """The refinement: needs nothing but the weights."""

    step = "weights"

    def refine(
        self, model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic], weights: WeightScheme
    ) -> QuantPlan:
        """The plan with the weight scales of least squared error; biases follow them."""
        return search_scales(model, plan, limited=weights == "pair_limited")


def search_scales(model: ir.Model, plan: QuantPlan, *, limited: bool = False) -> QuantPlan:
    """The plan with weight scales of least squared error; `limited` keeps every pair of weights within its limit."""
    weights = dict(plan.weights)
    biases = dict(plan.biases)
    for name, layers in weight_readers(model, plan).items():
        weights[name] = _searched(layers, plan, plan.weights[name], limited=limited)
        if weights[name] is plan.weights[name]:
            continue
        for layer in layers:
            bias = plan.biases.get(node_key(layer.node))
            if bias is not None:
                step = layer_steps(layer, plan)[0]
                biases[node_key(layer.node)] = quantize_bias(layer, step, weights[name].params, bias.params.spec)
    return replace(plan, weights=weights, biases=biases)


def weight_readers(model: ir.Model, plan: QuantPlan) -> dict[str, list[Layer]]:
    """The int8 layers by the name that the plan keeps their weights under."""
    int8 = set(plan.int8_nodes)
    found: dict[str, list[Layer]] = {}
    for node in model.graph:
        if node_key(node) in int8 and node.op_type in MAC_OPERATORS:
            layer = read_layer(node)
            found.setdefault(weight_key(layer, plan), []).append(layer)
    return found


def _searched(layers: list[Layer], plan: QuantPlan, constant: QuantizedConstant, *, limited: bool) -> QuantizedConstant:
    """The constant with better scales; the same object where there are none."""
    layer, spec = layers[0], constant.params.spec
    node = layer.node
    pairs = limited and any(uses_pair_kernel(each.node, each.weights) for each in layers)
    rows = kernel_rows(node, layer.weights).astype(np.float64)
    scales = np.atleast_1d(constant.params.scale).astype(np.float64)
    channel = np.arange(rows.shape[0]) % scales.size
    floor = np.max([smallest_scale(each, *layer_steps(each, plan)) for each in layers], axis=0)
    floor = floor if scales.size == floor.size else np.atleast_1d(floor.max())
    best = kernel_rows(node, constant.integers).astype(np.float64)
    around = layer_steps(layer, plan)
    best_scale = scales.copy()
    best_error = _errors(rows, best * scales[channel][:, np.newaxis], channel, scales.size)
    clear = (clear_of_boundaries(np.maximum(scales * factor, floor), *around) for factor in _FACTORS)
    for larger in (scales, *clear):
        candidate = np.minimum(larger, scales).astype(np.float32).astype(np.float64)
        step = candidate[channel][:, np.newaxis]
        places = rows / step
        integers = repair(places, spec.qmax) if pairs else np.clip(np.rint(places), spec.qmin, spec.qmax)
        error = _errors(rows, integers * step, channel, scales.size)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], candidate[better]
        best[better[channel]] = integers[better[channel]]
    if np.array_equal(best_scale, scales):
        return constant
    params = QuantParams(
        best_scale.astype(np.float32).reshape(constant.params.scale.shape), constant.params.zero_point, spec
    )
    integers = best.astype(constant.integers.dtype)
    return QuantizedConstant(params, from_kernel_rows(node, integers, constant.integers))


def _errors(exact: Array, rounded: Array, channel: Array, count: int) -> Array:
    """The squared error of each scale's weights."""
    return np.bincount(channel, ((exact - rounded) ** 2).sum(axis=1), count)


REFINEMENT = WeightScale()
