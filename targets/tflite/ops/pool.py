"""Pooling: MAX_POOL_2D, AVERAGE_POOL_2D, and MEAN and REDUCE_MAX over the whole plane; what these do not say, axis by
axis (window_steps.py).

int8 averages: TFLite adds integers and divides, rounding half away from zero; the QDQ reference averages in float and
rounds half to even. They differ by at most one step, on ties. MEAN rescales in fixed point: at most one step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeship.calibration.types import QuantParams, TensorSpec
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import MOVES, Int8, Int16, Op
from edgeship.targets.tflite.ops.conv import bias, plane
from edgeship.targets.tflite.ops.steps import Steps, fixed
from edgeship.targets.tflite.ops.window import (
    Window,
    counts,
    finish,
    flat,
    in_the_plane,
    padded,
    spatial,
    spatial_output,
    window,
    windows_in_space,
)
from edgeship.targets.tflite.ops.window_steps import (
    Part,
    average,
    average_by_parts,
    axis_parts,
    lowest,
    maximum,
    maximum_with_indices,
)

ONES = TensorSpec(bits=8, signed=True, symmetric=True)
NO_BIAS = 1
"""The index of an input that a pooling node does not have."""
MOST_KINDS = 16
"""Pooling operators that one average may take."""


def _options(w: Window, padding: str) -> dict[str, Any]:
    return {
        "padding": padding,
        "stride_h": w.strides[0],
        "stride_w": w.strides[1],
        "filter_height": w.kernel[0],
        "filter_width": w.kernel[1],
    }


def pooling_window(node: Node) -> Window:
    """The node's window."""
    return window(node, node.attribute("kernel_shape"))


def gives_indices(node: Node) -> bool:
    """Whether the indices of the maxima are wanted."""
    return len(node.outputs) > 1 and bool(node.outputs[1].name)


def static_indices(node: Node) -> str | None:
    """The indices of maxima need a static batch."""
    return "it gives indices for a dynamic batch" if gives_indices(node) and node.x.is_dynamic else None


def averaged_in_int8(node: Node) -> str | None:
    """An int8 average is 1-D or 2-D, not dilated, and has at most 16 kinds of windows at its borders."""
    w = pooling_window(node)
    if not in_the_plane(w):
        return "its window is dilated or 3-D"
    if divides_as_tflite(node, flat(w)):
        return None
    rows, columns = _parts(node, flat(w))
    kinds = len(rows) * len(columns)
    return f"its windows are of {kinds} kinds; accepted: {MOST_KINDS}" if kinds > MOST_KINDS else None


def averaged_by_convolution(node: Node) -> bool:
    """Whether an int8 average is better a depthwise convolution with ones, which takes scales of its own.

    AVERAGE_POOL_2D keeps the scale and rounds half away from zero, ONNX half to even: of an even number of integers
    every other sum may lie half-way. With two scales none does (calibration/planning/clear_scales.py).
    """
    w = pooling_window(node)
    if not in_the_plane(w) or int(np.prod(w.kernel)) % 2:
        return False
    return bool((_shares(node, flat(w)) == 1).all())


def convert_max_pool(emit: Emit) -> None:
    """Writes a MaxPool; pads that SAME does not say hold the smallest value there is, so they never win."""
    node, w = emit.node, pooling_window(emit.node)
    if gives_indices(node):
        maximum_with_indices(emit, w)
        return
    if not in_the_plane(w):
        maximum(emit, w)
        return
    w, x = flat(w), spatial(emit, emit.input())
    padding = w.padding
    if padding is None:
        x, padding = padded(emit, x, w.pads, lowest(x)), "VALID"
    y = spatial_output(emit, x)
    emit.operator("MAX_POOL_2D", [x], y, fused_activation_function=node.activation, **_options(w, padding))
    finish(emit, y)


def divides_as_tflite(node: Node, w: Window) -> bool:
    """Whether ONNX divides each window by what AVERAGE_POOL_2D does, on padded input where SAME is no word for it."""
    if not node.attribute("count_include_pad", 0) and w.padding is not None:
        return True
    return bool((_shares(node, w) == 1).all())


def _behinds(node: Node, w: Window) -> list[int] | None:
    """The pads behind that ONNX counts as elements; None where it counts none."""
    if not node.attribute("count_include_pad", 0):
        return None
    if node.attribute("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return [behind for _, behind in w.pads]
    rank = node.x.rank - 2
    attribute = node.attribute("pads") or (0,) * 2 * rank
    return [0] * (len(w.kernel) - rank) + list(attribute[rank:])


def _shares(node: Node, w: Window) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The number of elements ONNX divides by over the size of the window, for every output."""
    return counts(w, _behinds(node, w)) / float(np.prod(w.kernel))


def _parts(node: Node, w: Window) -> tuple[list[Part], list[Part]]:
    behinds = _behinds(node, w) or (None, None)
    return axis_parts(w, 0, behinds[0]), axis_parts(w, 1, behinds[1])


def convert_average_pool(emit: Emit) -> None:
    """Writes an AveragePool; where windows hold different numbers of elements than TFLite divides by, a factor corrects
    it.
    """
    node, w = emit.node, pooling_window(emit.node)
    plane = in_the_plane(w)
    w = flat(w) if plane else w
    if node.int8 and averaged_by_convolution(node) and not _one_scale(node):
        _average_by_convolution(emit, w)
        return
    if plane and divides_as_tflite(node, w):
        x, y, padding = spatial(emit, emit.input()), spatial_output(emit, emit.input()), w.padding
        if padding is None or (padding == "SAME" and node.attribute("count_include_pad", 0)):
            x, padding = padded(emit, x, w.pads), "VALID"
        emit.operator("AVERAGE_POOL_2D", [x], y, fused_activation_function=node.activation, **_options(w, padding))
        finish(emit, y)
        return
    steps = fixed(emit)
    if node.int8:
        x, behinds = spatial(emit, emit.input()), _behinds(node, w)
        if behinds is not None:
            fronts = [front for front, _ in w.pads]
            x = steps.pad(x, [(0, 0), *zip(fronts, behinds, strict=True), (0, 0)])
        steps.deliver(steps.activated(average_by_parts(steps, x, *_parts(node, w)), node.activation))
        return
    mean = average(steps, spatial(emit, emit.input()) if plane else emit.input(), w)
    factors = (1 / _shares(node, w))[None, ..., None].astype(np.float32)
    if (factors != 1).any() or node.activation != "NONE":
        mean = steps.binary("MUL", mean, factors, fused_activation_function=node.activation)
    steps.deliver(mean)


def _one_scale(node: Node) -> bool:
    x, y = node.x.quant, node.y.quant
    return x is None or y is None or bool(x.scale == y.scale and x.zero_point == y.zero_point)


def _average_by_convolution(emit: Emit, w: Window) -> None:
    """Writes an int8 average as DEPTHWISE_CONV_2D with the integer 1 at the scale 1 / n everywhere."""
    x = spatial(emit, emit.input())
    channels = x.shape[3]
    quant = QuantParams(np.asarray(1 / np.prod(w.kernel)), np.zeros((), np.int64), ONES)
    kernel = emit.constant("ones", np.ones((1, *w.kernel, channels), np.int8), quant)
    offset = bias(emit, NO_BIAS, channels, kernel)
    Steps(emit).deliver(plane(emit, (x, kernel, offset), w, depthwise=True))


def convert_lp_pool(emit: Emit) -> None:
    """Writes an LpPool: the p-th root of the sum of p-th powers, the sum as an average times the window's size."""
    node, w, steps = emit.node, pooling_window(emit.node), fixed(emit)
    plane = in_the_plane(w)
    x = spatial(emit, emit.input()) if plane else emit.input()
    w = flat(w) if plane else w
    powers = _power(steps, x, int(node.attribute("p", 2)))
    total = steps.binary("MUL", average(steps, powers, w), float(np.prod(w.kernel)))
    steps.deliver(_root(steps, total, int(node.attribute("p", 2))))


def _power(steps: Steps, x: Operand, p: int) -> Operand:
    """|x| to the power p."""
    if p == 2:
        return steps.binary("MUL", x, x)
    size = steps.unary("ABS", x)
    return size if p == 1 else steps.binary("POW", size, float(p))


def _root(steps: Steps, x: Operand, p: int, into: Operand | None = None) -> Operand:
    if p == 2:
        return steps.emit.compute("SQRT", [x], into=into)
    return steps.binary("POW", x, 1 / p, into=into)


def convert_global_lp(emit: Emit) -> None:
    """Writes a GlobalLpPool."""
    steps, p, y = Steps(emit), int(emit.node.attribute("p", 2)), emit.output()
    powers = _power(steps, emit.input(), p)
    total = emit.compute("SUM", [powers, _plane(emit)], y.shape, signature=y.signature, keep_dims=True)
    _root(steps, total, p, y)


def _plane(emit: Emit) -> Operand:
    return emit.ints("plane", range(1, emit.node.x.rank - 1))


def convert_global_average(emit: Emit) -> None:
    """Writes a GlobalAveragePool."""
    emit.operator("MEAN", [emit.input(), _plane(emit)], emit.output(), keep_dims=True)


def convert_global_max(emit: Emit) -> None:
    """Writes a GlobalMaxPool."""
    emit.operator("REDUCE_MAX", [emit.input(), _plane(emit)], emit.output(), keep_dims=True)


REAL = of_types("float32")
AVERAGES = Int8(shares_scale=True, limits=(averaged_in_int8,), wide=Int16(), rescales=averaged_by_convolution)

OPS = (
    Op("MaxPool", convert_max_pool, CHANNELS_LAST, MOVES, (windows_in_space, static_indices), fuses=True),
    Op("AveragePool", convert_average_pool, CHANNELS_LAST, AVERAGES, (REAL, windows_in_space), fuses=True),
    Op("LpPool", convert_lp_pool, CHANNELS_LAST, None, (REAL, windows_in_space)),
    Op("GlobalAveragePool", convert_global_average, CHANNELS_LAST, Int8(wide=Int16())),
    Op("GlobalMaxPool", convert_global_max, CHANNELS_LAST, MOVES),
    Op("GlobalLpPool", convert_global_lp, CHANNELS_LAST, None, (REAL,)),
)
