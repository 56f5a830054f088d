"""A layer's float weights and bias -> the integers it ships with.

    w_q = round(w / s_w[c]),  b_q = round(b / (s_x s_w[c])),  y_q = (sum w_q (x_q - z_x) + b_q) * s_x s_w[c] / s_y + z_y

s_w[c] = t[c] / 127 with t[c] = max|w[c]|, or what another range algorithm makes of w[c] and -w[c]; never so small that

- |b_q| exceeds 2^30, half of what the int32 accumulator holds (a dead channel has a bias and next to no weights), or
- the multiplier s_x s_w[c] / s_y falls below 2^-24. XNNPACK takes no multiplier under 2^-32
  (src/operators/convolution-nhwc.c) and TFLite's fixed-point one loses its bits; at 2^-24 the rounding of the weights
  moves the output by at most K * 255 / 2 * 2^-24 steps, under a hundredth for K = 1000.

It then grows by at most 0.2 % to where s_x s_w[c] / s_y is a fraction that keeps every sum off a rounding boundary
(`fractions`), so that a runtime's integers do not hang on the order it adds in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.calibration.algorithms import ObserverFactory
from edgeship.calibration.graph.operators import Layer, activation_inputs, held_key, value_name
from edgeship.calibration.planning.fractions import at_least
from edgeship.calibration.types import Array, QuantizedConstant, QuantParams, QuantPlan, TensorSpec

LARGEST_BIAS = 1 << 30
SMALLEST_MULTIPLIER = 2.0**-24


def weight_params(
    layers: Sequence[Layer],
    steps: Sequence[tuple[float, float]],
    spec: TensorSpec,
    observer: ObserverFactory | None = None,
) -> QuantParams:
    """Parameters for one weight tensor that all `layers` read.

    `steps`: each layer's (s_x, s_y). `spec.axis` None asks for one scale for the whole tensor, else the layers' own
    axis is used. `observer`: chooses the range that is represented, for each scale by itself; None: all of it.
    """
    layer = layers[0]
    axis = layer.axis
    others = tuple(i for i in range(layer.weights.ndim) if i != axis)
    largest = np.abs(layer.weights).max(axis=others, initial=0).astype(np.float64)
    scale = (largest if observer is None else _ranges(layer, spec, observer)) / spec.qmax
    for each, (input_step, output_step) in zip(layers, steps, strict=True):
        scale = np.maximum(scale, smallest_scale(each, input_step, output_step))
    scale = clear_of_boundaries(scale if spec.axis is not None else scale.max(), *steps[0])
    if spec.axis is None:
        return QuantParams(scale, np.zeros(()), spec)
    per_channel = TensorSpec(spec.bits, spec.signed, spec.symmetric, axis)
    # Rounding the scale to float32 may move max|w| / scale past 127.5 by nothing: quantize() saturates it to 127.
    return QuantParams(scale.astype(np.float32), np.zeros(scale.shape, np.int64), per_channel)


def clear_of_boundaries(scale: Array, input_step: float, output_step: float) -> Array:
    """The weight scales, grown to where no accumulator lands near a rounding boundary of the output: float64."""
    multiplier = input_step / output_step
    return at_least(np.asarray(scale, np.float64) * multiplier) / multiplier


def weight_key(layer: Layer, plan: QuantPlan) -> str:
    """The name that the plan keeps the layer's weights under."""
    return held_key(plan.weights, layer.node, 1, layer.weight_value)


def layer_steps(layer: Layer, plan: QuantPlan) -> tuple[float, float]:
    """The scales of the layer's input and output."""
    result = value_name(layer.node.outputs[0])
    result = plan.folded.get(result, result)
    source = value_name(activation_inputs(layer.node)[0])
    return float(plan.activations[source].scale), float(plan.activations[result].scale)


def _ranges(layer: Layer, spec: TensorSpec, observer: ObserverFactory) -> Array:
    """What the algorithm represents of every slice along the axis, of all together where they have one scale."""
    slices = np.moveaxis(layer.weights, layer.axis, 0).reshape(layer.weights.shape[layer.axis], -1)
    if spec.axis is None:
        slices = slices.reshape(1, -1)
    chosen = np.empty(len(slices))
    for place, values in enumerate(slices):
        seen = observer()
        seen.update(np.concatenate([values, -values]))  # alike on both sides: weights are symmetric
        chosen[place] = seen.range()[1]
    return np.broadcast_to(chosen, layer.weights.shape[layer.axis]).copy()


def smallest_scale(layer: Layer, input_step: float, output_step: float) -> Array:
    """The smallest weight scales that keep bias and multiplier in range: float64, one per slice along the axis."""
    floor = np.full(layer.weights.shape[layer.axis], SMALLEST_MULTIPLIER * output_step / input_step)
    if layer.bias is not None:
        from_bias = np.abs(layer.bias).astype(np.float64) / (input_step * LARGEST_BIAS)
        floor = np.maximum(floor, from_bias.reshape(-1, floor.size).max(axis=0))
    # A little more, so that rounding to float32 cannot fall under the limit.
    return np.asarray(floor * (1 + 1e-6))


def quantize_bias(layer: Layer, input_step: float, weights: QuantParams, spec: TensorSpec) -> QuantizedConstant:
    """The layer's bias as int32 at scale s_x * s_w[c], shape (channels,)."""
    bias = np.zeros(layer.channels, np.float32) if layer.bias is None else layer.bias
    scale = np.float32(input_step) * weights.scale
    if scale.ndim:
        scale = np.tile(scale, layer.channels // scale.size)
    integers = np.rint(bias.astype(np.float64) / scale.astype(np.float64)).astype(np.int64)
    format_ = TensorSpec(spec.bits, spec.signed, spec.symmetric, 0 if scale.ndim else None)
    params = QuantParams(scale, np.zeros(scale.shape, np.int64), format_)
    return QuantizedConstant(params, np.clip(integers, format_.qmin, format_.qmax).astype(np.int32))
