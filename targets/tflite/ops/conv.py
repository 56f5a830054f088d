"""Convolutions in the plane: CONV_2D and DEPTHWISE_CONV_2D.

int8: TFLite multiplies the int32 sum by `s_x * s_w / s_y` in fixed point (31 bits) and rounds half away from zero,
XNNPACK in float rounding half to even; the QDQ reference rounds half to even in float. They differ by at most one step,
on ties, which edgeship's own plans have none of.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeship.calibration.types import Array, QuantParams, TensorSpec
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported, constant
from edgeship.targets.tflite.layout import Layout, natural
from edgeship.targets.tflite.op import Int8, Int16
from edgeship.targets.tflite.ops.steps import Steps
from edgeship.targets.tflite.ops.window import Window, flat, padded, spatial, window

BIAS = TensorSpec(bits=32, signed=True, symmetric=True)
WIDE_BIAS = TensorSpec(bits=64, signed=True, symmetric=True)
"""Of layers with 16-bit activations: every kernel of them takes int64."""
OUTPUT_FIRST = Layout((0, 2, 3, 1))
"""[M, C, h, w] as [M, h, w, C]."""
DEPTHWISE = Layout((1, 2, 3, 0))
"""[M, 1, h, w] as [1, h, w, M]."""


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


def weights_in_the_plane(node: Node) -> str | None:
    """The window of an int8 convolution is 1-D or 2-D, or 3-D with a depth or a plane of one."""
    shape = node.tensor(1).shape[2:]
    if len(shape) < 3 or shape[0] == 1 or shape[1:] == (1, 1):
        return None
    return f"its window is {' x '.join(map(str, shape))}; TFLite's 3-D kernels are float"


INT8 = Int8(
    real_inputs=frozenset({2}),
    limits=(constant_weights, output_channel_weights, constant_bias, moderate_rescaling, weights_in_the_plane),
    wide=Int16(weights=frozenset({1})),
)


def window_in_the_plane(node: Node) -> str | None:
    """The window is 1-D or 2-D."""
    return "its window is 3-D" if node.tensor(1).rank > 4 else None


def several_scales(node: Node) -> str | None:
    """The channels' scales differ: kernels disagree on how activations are rounded where they do not."""
    quant = node.tensor(1).quant
    if quant is not None and len(np.unique(quant.scale)) < 2:
        return "its weights have one scale, and TFLite's kernels disagree then"
    return None


HYBRID = (output_channel_weights, window_in_the_plane, several_scales)
"""What the kernels with int8 weights and float activations demand."""


def bias(emit: Emit, index: int, channels: int, weights: Operand, start: int | None = None) -> Operand:
    """Input `index` as the kernel's bias, zeros where it is left out: int32 at scale `s_x * s_w` in an int8 node.

    `start`: only the `channels` elements from there on.
    """
    tensor = emit.node.tensor(index) if emit.node.has(index) else None
    if tensor is not None and tensor.is_constant and start is not None:
        tensor = cut(tensor, 0, start, channels)
    x = emit.node.x.quant if emit.node.int8 else None
    if x is None or weights.quant is None:
        if tensor is not None and tensor.is_constant:
            return emit.writer.arranged(tensor, natural(tensor.rank))
        if tensor is not None:
            return emit.input(index) if start is None else Steps(emit).slice(emit.input(index), 0, start, channels)
        return emit.constant("bias", np.zeros(channels, np.float32))
    scale = np.float32(x.scale) * weights.quant.scale
    spec = WIDE_BIAS if emit.node.is_wide else BIAS
    quant = QuantParams(scale, np.broadcast_to(np.int64(0), scale.shape), replace(spec, axis=0 if scale.ndim else None))
    integers = np.zeros(channels, spec.dtype) if tensor is None else bias_integers(tensor, quant)
    return emit.constant("bias", integers, quant)


def cut(tensor: Tensor, axis: int, start: int, count: int) -> Tensor:
    """`count` slices of a constant, from `start` along an axis, with their scales."""
    if tensor.data is None:
        raise Unsupported("needs a constant", f"{tensor.name} is computed", "a constant")
    quant = tensor.quant
    if quant is not None and quant.spec.axis == axis:
        chosen = slice(start, start + count)
        quant = QuantParams(quant.scale[chosen], quant.zero_point[chosen], quant.spec)
    return constant(tensor.name, tensor.data.take(range(start, start + count), axis), quant, tensor.dtype)


def bias_integers(tensor: Tensor, quant: QuantParams) -> Array:
    """The bias at the scale of `quant`; its own integers where they are at that scale already."""
    own = tensor.quant
    if (
        tensor.data is not None
        and own
        and own.spec.bits == 32
        and np.allclose(own.scale, quant.scale, rtol=1e-5, atol=0)
    ):
        return tensor.data.reshape(-1).astype(quant.spec.dtype)
    integers = np.rint(tensor.values().reshape(-1).astype(np.float64) / quant.scale.astype(np.float64))
    largest = 2.0 ** (min(quant.spec.bits, 48) - 1) - 1
    if integers.size and np.abs(integers).max() > largest:
        raise Unsupported(
            f"the bias does not fit {min(quant.spec.bits, 48)} bits at its scale",
            f"{np.abs(integers).max():.3g}",
            "a larger weight scale",
        )
    return integers.astype(quant.spec.dtype)


def convert_plane(emit: Emit) -> None:
    """Writes a 1-D or 2-D Conv: depthwise where every group has one input channel, else plain or grouped."""
    node = emit.node
    w = window(node, node.tensor(1).shape[2:])
    kernel = plane_kernel(emit, node.tensor(1), is_depthwise(node))
    operands = (spatial(emit, emit.input()), kernel, bias(emit, 2, node.tensor(1).shape[0], kernel))
    Steps(emit).deliver(plane(emit, operands, flat(w)))


def constant_integers(node: Node) -> Array:
    """The weights as they are stored. Raises Unsupported when they are computed."""
    weights = node.tensor(1)
    if weights.data is None:
        raise Unsupported("needs constant weights", f"{weights.name} is computed", "a constant")
    return weights.data


def is_depthwise(node: Node) -> bool:
    """Whether every group has one input channel."""
    return int(node.attribute("group", 1)) > 1 and node.tensor(1).shape[1] == 1


def plane_kernel(emit: Emit, weights: Tensor, depthwise: bool) -> Operand:
    """[M, C, (h,) w] as [M, h, w, C], or as [1, h, w, M] for a depthwise convolution; h is 1 where it is not there."""
    if weights.rank == 4:
        return emit.writer.arranged(weights, DEPTHWISE if depthwise else OUTPUT_FIRST)
    if weights.data is not None:
        tall = constant(weights.name, weights.data[:, :, None, :], weights.quant, weights.dtype)
        return plane_kernel(emit, tall, depthwise)
    long = emit.writer.arranged(weights, Layout((1, 2, 0)) if depthwise else Layout((0, 2, 1)))
    shape = (long.shape[0], 1, *long.shape[1:])
    return emit.writer.reshape(long, shape, shape)


def plane(
    emit: Emit,
    operands: tuple[Operand, Operand, Operand],
    w: Window,
    *,
    depthwise: bool | None = None,
    fuses: bool = True,
) -> Operand:
    """One 2-D convolution of (image, kernel, bias); the node's activation goes into it where it `fuses`."""
    x, kernel, offset = operands
    padding = w.padding
    if padding is None:
        x, padding = padded(emit, x, w.pads), "VALID"
    options = {
        "padding": padding,
        "stride_h": w.strides[0],
        "stride_w": w.strides[1],
        "dilation_h_factor": w.dilations[0],
        "dilation_w_factor": w.dilations[1],
        "fused_activation_function": emit.node.activation if fuses else "NONE",
    }
    name = "CONV_2D"
    if is_depthwise(emit.node) if depthwise is None else depthwise:
        name, options["depth_multiplier"] = "DEPTHWISE_CONV_2D", kernel.shape[3] // x.shape[3]
    channels = offset.shape[0]
    shape = (x.shape[0], *w.outputs, channels)
    sizes = [-1 if size == -1 else out for size, out in zip(x.signature[1:3], w.outputs, strict=True)]
    signature = (x.signature[0], *sizes, channels)
    quant = emit.node.y.quant if emit.node.int8 else None
    image = emit.temporary(shape, x, "image", signature=signature, quant=quant)
    emit.operator(name, [x, kernel, offset], image, **options)
    return image
