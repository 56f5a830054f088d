"""Transposed convolutions: TRANSPOSE_CONV and CONV_3D_TRANSPOSE.

The full result, `(in - 1) * stride + (kernel - 1) * dilation + 1` long, is cut to what the pads and the output's shape
say. Dilation is written into the weights, as zeros between them. A few groups are
convolved one by one; many are an ordinary grouped convolution, with the kernel reversed, of the input with zeros
between its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeship.calibration.types import QuantParams
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported, constant
from edgeship.targets.tflite.layout import Layout
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.conv import (
    INT8,
    bias,
    cut,
    output_channel_weights,
    plane,
    plane_kernel,
    several_scales,
    window_in_the_plane,
)
from edgeship.targets.tflite.ops.steps import Steps
from edgeship.targets.tflite.ops.window import Window, spatial, windows_in_space

MANY_GROUPS = 8


@dataclass(frozen=True)
class Transposed:
    """Sizes over the spatial axes, two or three. `fronts`: elements cut off before the full result.

    `kernel` is that of the dilated window.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    fronts: tuple[int, ...]

    @property
    def full(self) -> tuple[int, ...]:
        """The sizes of the whole result, or what the output needs where that is more (the rest is bias)."""
        sizes = zip(self.sizes, self.strides, self.kernel, self.fronts, self.outputs, strict=True)
        return tuple(max((n - 1) * s + k, front + out) for n, s, k, front, out in sizes)

    @property
    def padding(self) -> str | None:
        """What TFLite calls it: the forward window's SAME or VALID from output to input; None when it has no word."""
        cuts = zip(self.full, self.outputs, self.fronts, strict=True)
        pads = tuple((front, full - front - out) for full, out, front in cuts)
        ones = (1,) * len(self.kernel)
        return Window(self.kernel, self.strides, ones, self.outputs, self.sizes, pads).padding


def transposed(node: Node) -> Transposed:
    """The node's window; a 1-D one over an image of height 1."""
    rank = node.x.rank - 2
    strides, dilations = (tuple(node.attribute(name) or (1,) * rank) for name in ("strides", "dilations"))
    kernel = tuple((k - 1) * d + 1 for k, d in zip(node.tensor(1).shape[2:], dilations, strict=True))
    sizes, outputs = node.x.shape[2:], node.y.shape[2:]
    fronts = tuple(_fronts(node, rank, [(n - 1) * s + k for n, s, k in zip(sizes, strides, kernel, strict=True)]))
    one = (1,) if rank == 1 else ()
    return Transposed(
        one + kernel, one + strides, one + dilations, one + sizes, one + outputs, ((0,) if rank == 1 else ()) + fronts
    )


def _fronts(node: Node, rank: int, full: Sequence[int]) -> list[int]:
    auto = node.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", "", "VALID") and not node.attribute("output_shape"):
        return list(node.attribute("pads") or (0,) * 2 * rank)[:rank]
    extra = node.attribute("output_padding") or (0,) * rank
    totals = [max(size + more - out, 0) for size, more, out in zip(full, extra, node.y.shape[2:], strict=True)]
    return [total // 2 if auto == "SAME_UPPER" else total - total // 2 for total in totals]


def convert_conv_transpose(emit: Emit) -> None:
    """Writes a ConvTranspose."""
    node, steps = emit.node, Steps(emit)
    t, group, weights = transposed(node), int(node.attribute("group", 1)), node.tensor(1)
    x = emit.input() if node.x.rank == 5 else spatial(emit, emit.input())
    if group > MANY_GROUPS and node.x.rank < 5 and weights.is_constant:
        result = _as_convolution(emit, x, t)
    elif group > 1:
        each = x.shape[-1] // group
        parts = []
        for place in range(group):
            part = steps.slice(x, x.rank - 1, place * each, each)
            parts.append(_transposed(emit, part, t, place))
        result = steps.concat(parts, x.rank - 1)
    else:
        result = _transposed(emit, x, t, None)
    steps.deliver(result)


def _transposed(emit: Emit, x: Operand, t: Transposed, group: int | None) -> Operand:
    """One group, or all."""
    node, steps = emit.node, Steps(emit)
    kernel = _kernel(emit, t, group, x.shape[-1])
    channels = node.tensor(1).shape[1]
    offset = bias(emit, 2, channels, kernel, None if group is None else group * channels)
    flat = len(t.kernel) == 2
    name, axes = ("TRANSPOSE_CONV", "hw") if flat else ("CONV_3D_TRANSPOSE", "dhw")
    options: dict[str, Any] = {f"stride_{axis}": stride for axis, stride in zip(axes, t.strides, strict=True)}
    options |= {"padding": t.padding or "VALID", "fused_activation_function": node.activation}
    if not flat:
        options |= {f"dilation_{axis}_factor": 1 for axis in axes}
    sizes = t.outputs if t.padding else t.full
    shape = (x.shape[0], *sizes, channels)
    signature = tuple(-1 if known == -1 else size for size, known in zip(shape, x.signature, strict=True))
    made = emit.temporary(shape, x, "full", signature=signature, quant=node.y.quant if node.int8 else None)
    emit.operator(name, [_size(emit, x, t, shape), kernel, x, offset], made, **options)
    if t.padding:
        return made
    for place, (front, out) in enumerate(zip(t.fronts, t.outputs, strict=True), 1):
        if signature[place] == -1:
            made = steps.trim(made, place, front, made.shape[place] - front - out)
        else:
            made = steps.slice(made, place, front, out)
    return made


def _size(emit: Emit, x: Operand, t: Transposed, shape: Sequence[int]) -> Operand:
    """What tells the kernel the result's shape: a constant, or computed from the shape of `x` where that is dynamic."""
    if not x.is_dynamic:
        return emit.ints("size", shape)
    factors = [stride if known == -1 else 0 for known, stride in zip(x.signature, (1, *t.strides, 1), strict=True)]
    added = [size - factor * given for size, factor, given in zip(shape, factors, x.shape, strict=True)]
    given = emit.compute("SHAPE", [x], (x.rank,), dtype=np.int32, out_type="INT32")
    grown = emit.compute("MUL", [given, emit.ints("strides", factors)])
    return emit.compute("ADD", [grown, emit.ints("added", added)])


def _kernel(emit: Emit, t: Transposed, group: int | None, channels: int) -> Operand:
    """Weights [C, M, h, w] as [M, h, w, C], [C, M, d, h, w] as [d, h, w, M, C], dilated; those of one group."""
    weights, steps = emit.node.tensor(1), Steps(emit)
    order = {3: (1, 2, 0), 4: (1, 2, 3, 0), 5: (2, 3, 4, 1, 0)}[weights.rank]
    if weights.is_constant:
        if group is not None:
            weights = cut(weights, 0, group * channels, channels)
        kernel = emit.writer.arranged(_dilated(weights, t), Layout(order))
    else:
        kernel = emit.writer.arranged(weights, Layout(order))
        if group is not None:
            kernel = steps.slice(kernel, kernel.rank - 1, group * channels, channels)
        for axis, dilation in enumerate(t.dilations[-(weights.rank - 2) :], 2):
            kernel = steps.spread(kernel, order.index(axis), dilation)
    if weights.rank > 3:
        return kernel
    return steps.reshape(kernel, (kernel.shape[0], 1, *kernel.shape[1:]))


def _dilated(weights: Tensor, t: Transposed) -> Tensor:
    """Constant weights with zeros between them; 1-D ones are left as they are."""
    rank = weights.rank - 2
    if weights.data is None or set(t.dilations) == {1}:
        return weights
    data = np.zeros((*weights.shape[:2], *t.kernel[-rank:]), weights.data.dtype)
    every = tuple(slice(None, None, dilation) for dilation in t.dilations[-rank:])
    data[(slice(None), slice(None), *every)] = weights.data
    return constant(weights.name, data, weights.quant, weights.dtype)


def _as_convolution(emit: Emit, x: Operand, t: Transposed) -> Operand:
    """Many groups at once: zeros between the pixels, then a grouped convolution with the kernel reversed."""
    node, steps, weights = emit.node, Steps(emit), emit.node.tensor(1)
    if weights.data is None:
        raise Unsupported("needs constant weights", f"{weights.name} is computed", "a constant")
    group, (channels, each) = int(node.attribute("group", 1)), weights.shape[:2]
    data = weights.data.reshape(group, channels // group, *weights.shape[1:])
    data = np.flip(data.swapaxes(1, 2), tuple(range(3, data.ndim))).reshape(group * each, -1, *weights.shape[2:])
    quant = weights.quant
    if quant is not None and quant.spec.axis == 1:
        spec = replace(quant.spec, axis=0)
        quant = QuantParams(np.tile(quant.scale, group), np.tile(quant.zero_point, group), spec)
    depthwise = channels == group
    kernel = plane_kernel(emit, constant(weights.name, np.ascontiguousarray(data), quant, weights.dtype), depthwise)
    pads: list[tuple[int, int]] = []
    for axis, (k, stride, size) in enumerate(zip(t.kernel, t.strides, t.sizes, strict=True)):
        x = steps.spread(x, 1 + axis, stride)
        front = k - 1 - t.fronts[axis]
        behind = t.outputs[axis] + k - 1 - front - ((size - 1) * stride + 1)
        if min(front, behind) < 0:  # it pads more than the kernel reaches
            cut = max(-front, 0)
            x = steps.slice(x, 1 + axis, cut, x.shape[1 + axis] - cut - max(-behind, 0))
        pads.append((max(front, 0), max(behind, 0)))
    w = Window(
        (kernel.shape[1], kernel.shape[2]), (1, 1), t.dilations, (x.shape[1], x.shape[2]), t.outputs, tuple(pads)
    )
    operands = (x, kernel, bias(emit, 2, group * each, kernel))
    return plane(emit, operands, w, depthwise=depthwise)


def one_or_many_groups(node: Node) -> str | None:
    """It has one group, or more than 8 and scales that differ."""
    group = int(node.attribute("group", 1))
    if 1 < group <= MANY_GROUPS:
        return f"it has {group} groups, each a TRANSPOSE_CONV that rounds its own channels"
    return several_scales(node) if group > 1 else None


OPS = (
    Op(
        "ConvTranspose",
        convert_conv_transpose,
        CHANNELS_LAST,
        INT8,
        (of_types("float32"), windows_in_space),
        hybrid=(output_channel_weights, window_in_the_plane, one_or_many_groups),
        fuses=True,
    ),
)
