"""Convolutions: CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV.

int8: TFLite multiplies the int32 sum by `s_x * s_w / s_y` in fixed point (31 bits) and rounds half away from zero,
XNNPACK in float rounding half to even; the QDQ reference rounds half to even in float. They differ by at most one step,
on ties.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeship.calibration.types import Array, QuantParams, TensorSpec
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported, constant
from edgeship.targets.tflite.layout import Layout
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.window import Window, finish, flat, padded, spatial, spatial_output, window

BIAS = TensorSpec(bits=32, signed=True, symmetric=True)
OUTPUT_FIRST = Layout((0, 2, 3, 1))
"""[M, C, h, w] as [M, h, w, C]."""
DEPTHWISE = Layout((1, 2, 3, 0))
"""[M, 1, h, w] as [1, h, w, M]."""
TRANSPOSED = Layout((1, 2, 3, 0))
"""[C, M, h, w] as [M, h, w, C]."""


def constant_weights(node: Node) -> str | None:
    """The weights are a constant with zero point 0."""
    weights = node.tensor(1)
    if not weights.is_constant:
        return f"its weights {weights.name} are computed at run time"
    if weights.quant is not None and weights.quant.zero_point.any():
        return f"its weights have zero points up to {np.abs(weights.quant.zero_point).max()}; TFLite's are symmetric"
    return None


def output_channel_weights(node: Node) -> str | None:
    """Per-channel scales run along the output channels."""
    quant = node.tensor(1).quant
    axis = 1 if node.op_type == "ConvTranspose" else 0
    if quant is not None and quant.spec.axis not in (None, axis):
        return f"its weights are quantized along axis {quant.spec.axis}; accepted: {axis}, the output channels"
    return None


def constant_bias(node: Node) -> str | None:
    """The bias is a constant."""
    return None if not node.has(2) or node.tensor(2).is_constant else f"its bias {node.tensor(2).name} is computed"


def moderate_rescaling(node: Node) -> str | None:
    """One step of the accumulator is less than 256 steps of the output: XNNPACK refuses more."""
    x, weights, y = node.x.quant, node.tensor(1).quant, node.y.quant
    if x is None or weights is None or y is None:
        return None
    factor = float((np.float64(x.scale) * weights.scale.astype(np.float64) / np.float64(y.scale)).max())
    return (
        None if factor < 256 else f"one step of its int32 sum is {factor:.3g} steps of its output; accepted: under 256"
    )


def windows_in_the_plane(node: Node) -> str | None:
    """The window is 1-D or 2-D."""
    return None if node.x.rank in (3, 4) else f"its input has rank {node.x.rank}; accepted: 3 and 4"


def one_group(node: Node) -> str | None:
    """A transposed convolution has one group."""
    group = node.attribute("group", 1)
    return None if group == 1 else f"it has {group} groups; accepted: 1"


INT8 = Int8(
    real_inputs=frozenset({2}), limits=(constant_weights, output_channel_weights, constant_bias, moderate_rescaling)
)


def bias(emit: Emit, index: int, channels: int, weights: Operand) -> Operand:
    """Input `index` as the kernel's bias, zeros where it is left out: int32 at scale `s_x * s_w` in an int8 node."""
    tensor = emit.node.tensor(index) if emit.node.has(index) else None
    x = emit.node.x.quant if emit.node.int8 else None
    if x is None or weights.quant is None:
        if tensor is not None:
            return emit.input(index)
        return emit.constant("bias", np.zeros(channels, np.float32))
    scale = np.float32(x.scale) * weights.quant.scale
    quant = QuantParams(scale, np.zeros(scale.shape, np.int64), replace(BIAS, axis=0 if scale.ndim else None))
    integers = np.zeros(channels, np.int32) if tensor is None else bias_integers(tensor, quant)
    return emit.constant("bias", integers, quant)


def bias_integers(tensor: Tensor, quant: QuantParams) -> Array:
    """The bias at the scale of `quant`; its own integers where they are at that scale already."""
    own = tensor.quant
    if (
        tensor.data is not None
        and own
        and own.spec.bits == 32
        and np.allclose(own.scale, quant.scale, rtol=1e-5, atol=0)
    ):
        return tensor.data.reshape(-1)
    integers = np.rint(tensor.values().reshape(-1).astype(np.float64) / quant.scale.astype(np.float64))
    limits = np.iinfo(np.int32)
    if integers.size and (integers.min() < limits.min or integers.max() > limits.max):
        raise Unsupported(
            "the bias does not fit 32 bits at its scale", f"{np.abs(integers).max():.3g}", "a larger weight scale"
        )
    return integers.astype(np.int32)


def convert_conv(emit: Emit) -> None:
    """Writes a Conv: depthwise where every group has one input channel, else plain or grouped."""
    node = emit.node
    weights, group = node.tensor(1), int(node.attribute("group", 1))
    w = flat(window(node, weights.shape[2:]))
    x, depthwise = spatial(emit, emit.input()), group > 1 and weights.shape[1] == 1
    if weights.rank == 3:
        weights = _tall(weights)
    kernel = emit.writer.arranged(weights, DEPTHWISE if depthwise else OUTPUT_FIRST)
    padding = w.padding
    if padding is None:
        x, padding = padded(emit, x, w.pads), "VALID"
    options = {
        "padding": padding,
        "stride_h": w.strides[0],
        "stride_w": w.strides[1],
        "dilation_h_factor": w.dilations[0],
        "dilation_w_factor": w.dilations[1],
        "fused_activation_function": node.activation,
    }
    y = spatial_output(emit, x)
    operands = [x, kernel, bias(emit, 2, weights.shape[0], kernel)]
    if depthwise:
        emit.operator("DEPTHWISE_CONV_2D", operands, y, depth_multiplier=weights.shape[0] // group, **options)
    else:
        emit.operator("CONV_2D", operands, y, **options)
    finish(emit, y)


def _tall(weights: Tensor) -> Tensor:
    """1-D weights [M, C, k] as [M, C, 1, k]."""
    if weights.data is None:
        raise Unsupported("1-D weights must be constant", f"{weights.name} is computed", "a constant")
    return constant(weights.name, weights.data[:, :, None, :], weights.quant)


def convert_conv_transpose(emit: Emit) -> None:
    """Writes a ConvTranspose: SAME or VALID where that is what the pads say, else the full result cut to size.

    Dilation is written into the weights, as zeros between them.
    """
    node = emit.node
    if node.x.is_dynamic:
        raise Unsupported(
            "its output's size is a constant of the model", f"shape {list(node.x.signature)}", "a static batch"
        )
    weights = node.tensor(1)
    if weights.rank == 3:
        weights = _tall(weights)
    weights = _dilated(weights, _pair(node.attribute("dilations") or (1, 1)))
    x, y = spatial(emit, emit.input()), spatial_output(emit, emit.input())
    w = _transposed_window(node, weights.shape[2:], x, y)
    kernel = emit.writer.arranged(weights, TRANSPOSED)
    operands = [kernel, x, bias(emit, 2, weights.shape[1], kernel)]
    options = {"stride_h": w.strides[0], "stride_w": w.strides[1], "fused_activation_function": node.activation}
    if w.padding is not None:
        emit.operator("TRANSPOSE_CONV", [emit.ints("size", y.shape), *operands], y, padding=w.padding, **options)
    else:
        shape = (y.shape[0], *(s + a + b for s, (a, b) in zip(y.shape[1:3], w.pads, strict=True)), y.shape[3])
        full = emit.temporary(shape, y, "full")
        emit.operator("TRANSPOSE_CONV", [emit.ints("size", shape), *operands], full, padding="VALID", **options)
        begin = emit.ints("begin", (0, *(front for front, _ in w.pads), 0))
        emit.operator("SLICE", [full, begin, emit.ints("extent", y.shape)], y)
    finish(emit, y)


def _pair(values: list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (1, values[0]) if len(values) == 1 else (values[0], values[1])


def _dilated(weights: Tensor, dilations: tuple[int, int]) -> Tensor:
    if dilations == (1, 1):
        return weights
    if weights.data is None:
        raise Unsupported("dilated weights must be constant", f"{weights.name} is computed", "a constant")
    inputs, outputs, height, width = weights.shape
    data = np.zeros(
        (inputs, outputs, (height - 1) * dilations[0] + 1, (width - 1) * dilations[1] + 1), weights.data.dtype
    )
    data[:, :, :: dilations[0], :: dilations[1]] = weights.data
    return constant(weights.name, data, weights.quant)


def _transposed_window(node: Node, kernel: tuple[int, ...], x: Operand, y: Operand) -> Window:
    """The forward window of which this is the transpose: from the output's plane to the input's."""
    strides = _pair(node.attribute("strides") or (1, 1))
    fronts = _pair_pads(node, kernel, strides, x, y)
    pads = []
    for small, large, k, stride, front in zip(x.shape[1:3], y.shape[1:3], kernel, strides, fronts, strict=True):
        behind = (small - 1) * stride + k - front - large
        pads.append((front, max(behind, 0)))
    return Window(tuple(kernel), strides, (1, 1), y.shape[1:3], x.shape[1:3], tuple(pads))


def _pair_pads(
    node: Node, kernel: tuple[int, ...], strides: tuple[int, int], x: Operand, y: Operand
) -> tuple[int, int]:
    auto = node.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", "", "VALID") and not node.attribute("output_shape"):
        pads = node.attribute("pads") or (0, 0, 0, 0)
        return (0, pads[0]) if len(pads) == 2 else (pads[0], pads[1])
    spaces = zip(x.shape[1:3], y.shape[1:3], kernel, strides, strict=True)
    totals = [max((small - 1) * s + k - large, 0) for small, large, k, s in spaces]
    halves = [total // 2 if auto == "SAME_UPPER" else total - total // 2 for total in totals]
    return halves[0], halves[1]


OPS = (
    Op("Conv", convert_conv, CHANNELS_LAST, INT8, (windows_in_the_plane,), fuses=True),
    Op("ConvTranspose", convert_conv_transpose, CHANNELS_LAST, INT8, (windows_in_the_plane, one_group), fuses=True),
)
