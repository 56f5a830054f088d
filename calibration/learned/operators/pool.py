"""Pooling over windows and over whole planes.

ceil_mode and uneven paddings are done by padding: a maximum ignores -inf, an average divides by the counted places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator
from edgeship.calibration.learned.operators.window import overhang, pad, paddings, per_axis

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Window:
    """The window of one node over its input."""

    def __init__(self, call: Call) -> None:
        size = call.tensor().shape[2:]
        rank = len(size)
        if rank not in _MAX:
            raise call.refuse(f"{rank} spatial axes", "1 to 3")
        self.rank = rank
        self.kernel = [int(k) for k in call.get("kernel_shape")]
        self.strides, self.dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
        self.pads = paddings(call, size, self.kernel, self.strides, self.dilations)
        ceil_mode = bool(call.get("ceil_mode", 0)) and call.get("auto_pad", "NOTSET") == "NOTSET"
        each = zip(size, self.pads, self.kernel, self.strides, self.dilations, strict=True)
        self.over = [(0, overhang(*axis, ceil_mode)) for axis in each]


def _max_pool(call: Call) -> Tensor:
    if call.outputs > 1:
        raise call.refuse("the output Indices", "the output Y alone")
    x, window = call.tensor(), _Window(call)
    for pads in (window.pads, window.over):
        x = pad(x, pads, -math.inf)
    return _MAX[window.rank](x, window.kernel, window.strides, 0, window.dilations)


def _average_pool(call: Call) -> Tensor:
    x, window = call.tensor(), _Window(call)

    def sums(values: Tensor) -> Tensor:
        flat = pad(values, window.over).flatten(0, 1).unsqueeze(1)
        ones = values.new_ones(1, 1, *window.kernel)
        summed = _CONV[window.rank](flat, ones, None, window.strides, 0, window.dilations)
        return summed.reshape(*values.shape[:2], *summed.shape[2:])

    padded = pad(x, window.pads)
    if call.get("count_include_pad", 0):
        counted = x.new_ones(1, 1, *padded.shape[2:])
    else:
        counted = pad(x.new_ones(1, 1, *x.shape[2:]), window.pads)
    return sums(padded) / sums(counted)


def _global(function: str) -> Operator:
    def apply(call: Call) -> Tensor:
        x = call.tensor()
        axes = tuple(range(2, x.ndim))
        return x.mean(axes, keepdim=True) if function == "mean" else torch.amax(x, axes, keepdim=True)

    return apply


OPERATORS: Mapping[str, Operator] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global("mean"),
    "GlobalMaxPool": _global("max"),
    "MaxPool": _max_pool,
}
