"""Convolutions in one, two and three dimensions: CONV_3D for what is not a convolution in the plane.

A 3-D window with a depth of one is a 2-D convolution of every slice, one with a plane of one a 2-D convolution over
depth and all pixels; both run in the faster 2-D kernels, and in int8. A grouped one, which CONV_3D has not, is the sum
over the window's depths of 2-D convolutions.
"""

from __future__ import annotations

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, constant
from edgeship.targets.tflite.layout import Layout
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.conv import (
    HYBRID,
    INT8,
    bias,
    constant_integers,
    convert_plane,
    is_depthwise,
    plane,
    plane_kernel,
)
from edgeship.targets.tflite.ops.steps import Steps, fixed
from edgeship.targets.tflite.ops.window import Window, padded, window, windows_in_space

IN_SPACE = Layout((2, 3, 4, 1, 0))
"""[M, C, d, h, w] as [d, h, w, C, M]."""


def convert_conv(emit: Emit) -> None:
    """Writes a Conv, by the shape of its window."""
    node, weights = emit.node, emit.node.tensor(1)
    if weights.rank < 5:
        convert_plane(emit)
        return
    w = window(node, weights.shape[2:])
    if weights.is_constant and w.kernel[0] == 1:
        _slice_by_slice(emit, w)
    elif weights.is_constant and w.kernel[1:] == w.strides[1:] == (1, 1) and w.pads[1:] == ((0, 0), (0, 0)):
        _along_depth(emit, w)
    elif int(node.attribute("group", 1)) > 1:
        _sum_of_planes(emit, w)
    else:
        _conv_3d(emit, w)


def _conv_3d(emit: Emit, w: Window) -> None:
    x, padding, activation = emit.input(), w.padding, emit.node.activation
    if padding is None:
        x, padding = padded(emit, x, w.pads), "VALID"
    kernel = emit.writer.arranged(emit.node.tensor(1), IN_SPACE)
    options = {f"stride_{axis}": stride for axis, stride in zip("dhw", w.strides, strict=True)}
    options |= {f"dilation_{axis}_factor": dilation for axis, dilation in zip("dhw", w.dilations, strict=True)}
    operands = [x, kernel, bias(emit, 2, emit.node.tensor(1).shape[0], kernel)]
    emit.operator("CONV_3D", operands, emit.output(), padding=padding, fused_activation_function=activation, **options)


def _flat_kernel(emit: Emit, axis: int, place: int = 0) -> Operand:
    """Constant 3-D weights at `place` of one spatial ONNX axis, as a 2-D kernel."""
    weights, data = emit.node.tensor(1), constant_integers(emit.node)
    tensor = constant(weights.name, data.take(place, axis), weights.quant, weights.dtype)
    return plane_kernel(emit, tensor, is_depthwise(emit.node))


def _flat_window(w: Window) -> Window:
    """The window's part in height and width."""
    return Window(w.kernel[1:], w.strides[1:], w.dilations[1:], w.sizes[1:], w.outputs[1:], w.pads[1:])


def _images(steps: Steps, x: Operand, w: Window, place: int) -> Operand:
    """The slices of the padded [N, D, H, W, C] that stand at `place` of the windows, as N * outputs images."""
    chosen = steps.slice(x, 1, place * w.dilations[0], w.outputs[0], w.strides[0])
    return steps.reshape(chosen, (chosen.shape[0] * chosen.shape[1], *chosen.shape[2:]))


def _in_depth(steps: Steps, x: Operand, w: Window) -> Operand:
    return steps.pad(x, [(0, 0), w.pads[0], (0, 0), (0, 0), (0, 0)])


def _slice_by_slice(emit: Emit, w: Window) -> None:
    """[N, D, H, W, C] as N * D images."""
    steps, kernel = fixed(emit), _flat_kernel(emit, 2)
    images = _images(steps, _in_depth(steps, emit.input(), w), w, 0)
    operands = (images, kernel, bias(emit, 2, emit.node.y.shape[1], kernel))
    steps.deliver(plane(emit, operands, _flat_window(w)))


def _along_depth(emit: Emit, w: Window) -> None:
    """[N, D, H, W, C] as images of depth by pixels."""
    steps, x, kernel = fixed(emit), emit.input(), _flat_kernel(emit, 4)
    pixels = x.shape[2] * x.shape[3]
    kernel_of, strides, dilations = ((of[0], 1) for of in (w.kernel, w.strides, w.dilations))
    view = Window(kernel_of, strides, dilations, (w.sizes[0], pixels), (w.outputs[0], pixels), (w.pads[0], (0, 0)))
    image = steps.reshape(x, (x.shape[0], x.shape[1], pixels, x.shape[-1]))
    operands = (image, kernel, bias(emit, 2, emit.node.y.shape[1], kernel))
    steps.deliver(plane(emit, operands, view))


def _sum_of_planes(emit: Emit, w: Window) -> None:
    steps, channels = fixed(emit), emit.node.y.shape[1]
    x = _in_depth(steps, emit.input(), w)
    nothing = emit.constant("no_bias", np.zeros(channels, np.float32))
    total: Operand | None = None
    for place in range(w.kernel[0]):
        kernel = _flat_kernel(emit, 2, place)
        offset = nothing if total else bias(emit, 2, channels, kernel)
        term = plane(emit, (_images(steps, x, w, place), kernel, offset), _flat_window(w), fuses=False)
        total = steps.binary("ADD", total, term) if total else term
    if total is not None:
        steps.deliver(steps.activated(total, emit.node.activation))


def channels_fit(node: Node) -> str | None:
    """The weights' input channels times the groups are the input's channels."""
    x, weights, groups = node.x, node.tensor(1), int(node.attribute("group", 1))
    if x.rank < 3 or weights.rank != x.rank:
        return None
    if weights.shape[1] * groups != x.shape[1] or weights.shape[0] % groups:
        return f"weights {list(weights.shape)} in {groups} groups do not fit an input of {x.shape[1]} channels"
    return None


_LIMITS = (of_types("float32"), windows_in_space, channels_fit)
OPS = (Op("Conv", convert_conv, CHANNELS_LAST, INT8, _LIMITS, hybrid=HYBRID, fuses=True),)
