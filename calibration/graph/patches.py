"""What a layer multiplies its weights with: the input values under each tap of the kernel, and the kernel's K order.

An integer convolution is a matrix product: rows are output positions, columns the K = kH * kW * C/group values under
the kernel. ONNX Runtime's kernels (onnxruntime/core/providers/cpu/quantization/qlinearconv.cc,
core/mlas/lib/convsym.cpp) work channels-last, so channels run innermost in K: k = (h * kW + w) * C/group + c.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import attribute, weight_axis
from edgeship.calibration.types import Array

MATRIX_OPERATORS = frozenset({"Gemm", "MatMul"})


def kernel_rows(node: ir.Node, weights: Array) -> Array:
    """The weights as (rows, K) in the kernel's K order; row r belongs to channel r modulo the number of scales."""
    if node.op_type == "Conv":
        return np.moveaxis(weights, 1, -1).reshape(weights.shape[0], -1)
    channels_first = np.moveaxis(weights, weight_axis(node, weights), -2)
    return channels_first.reshape(-1, channels_first.shape[-1])


def from_kernel_rows(node: ir.Node, rows: Array, like: Array) -> Array:
    """The inverse of `kernel_rows`: weights with the shape of `like`."""
    if node.op_type == "Conv":
        last = (like.shape[0], *like.shape[2:], like.shape[1])
        return np.ascontiguousarray(np.moveaxis(rows.reshape(last), -1, 1))
    axis = weight_axis(node, like)
    shape = np.moveaxis(like, axis, -2).shape
    return np.ascontiguousarray(np.moveaxis(rows.reshape(shape), -2, axis))


class Patches:
    """The values of one input under a layer's kernel, tap by tap, as views.

    `values` is the layer's input (N, C, spatial...) for Conv, (..., K) for Gemm and MatMul; `weights` its weights.
    Padding has the value `padding` (the zero point for integers).
    """

    def __init__(self, node: ir.Node, values: Array, weights: Array, padding: float = 0) -> None:
        self._node = node
        self._matrix = node.op_type in MATRIX_OPERATORS
        if self._matrix:
            self._values = values.reshape(-1, values.shape[-1])
            self.positions = self._values.shape[0]
            return
        rank = weights.ndim - 2
        self.kernel = weights.shape[2:]
        self._group_size = weights.shape[1]
        self._rows_per_group = weights.shape[0] // int(attribute(node, "group", 1))
        self._strides = [int(s) for s in attribute(node, "strides", [1] * rank)]
        self._dilations = [int(d) for d in attribute(node, "dilations", [1] * rank)]
        pads = _pads(node, values.shape[2:], self.kernel, self._strides, self._dilations)
        self._values = np.pad(values, [(0, 0), (0, 0), *pads], constant_values=padding)
        padded: tuple[int, ...] = self._values.shape[2:]
        self._size = [
            (full - dilation * (kernel - 1) - 1) // stride + 1
            for full, kernel, stride, dilation in zip(padded, self.kernel, self._strides, self._dilations, strict=True)
        ]
        self.positions = values.shape[0] * int(np.prod(self._size))

    def taps(self) -> Iterator[tuple[int, ...]]:
        """The positions of the kernel, in K order."""
        return iter([()]) if self._matrix else product(*(range(k) for k in self.kernel))

    def under(self, tap: tuple[int, ...]) -> Array:
        """All channels under `tap`: (positions, K) for matrices, (N, C, spatial out...) for a Conv."""
        if self._matrix:
            return self._values
        window = [
            slice(at * dilation, at * dilation + stride * (size - 1) + 1, stride)
            for at, dilation, stride, size in zip(tap, self._dilations, self._strides, self._size, strict=True)
        ]
        return self._values[(slice(None), slice(None), *window)]

    def largest(self) -> int:
        """The largest of integer values, padding included."""
        return int(self._values.max())

    def group(self, row: int) -> int:
        """The group of input channels that output row `row` reads."""
        return 0 if self._matrix else row // self._rows_per_group

    def column(self, row: int, k: int) -> Array:
        """The values that weight `k` of `row` meets: (positions,)."""
        if self._matrix:
            return self._values[:, k]
        place, channel = divmod(k, self._group_size)
        tap = np.unravel_index(place, self.kernel)
        group = self.group(row)
        return self.under(tuple(int(t) for t in tap))[:, group * self._group_size + channel].reshape(-1)


def _pads(
    node: ir.Node, size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    rank = len(size)
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        pads = []
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return pads
    explicit = [0] * (2 * rank) if mode == "VALID" else [int(p) for p in attribute(node, "pads", [0] * (2 * rank))]
    return list(zip(explicit[:rank], explicit[rank:], strict=True))
