"""Who multiplies: the multiply-accumulates of a TFLite file, by the element types its operators work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.targets.base import IntegerShare
from edgeship.targets.tflite.flatfile import element_types, load, operator_names, text

INTEGERS = ("INT8", "UINT8", "INT16")
Shape = tuple[int, ...]


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _convolution(shapes: list[Shape], output: Shape) -> int:
    """Each output element sums over one filter: [M, h, w, C]."""
    return _size(output) * _size(shapes[1][1:])


def _depthwise(shapes: list[Shape], output: Shape) -> int:
    """Each output element sums over one plane of [1, h, w, M]."""
    return _size(output) * _size(shapes[1][1:3])


def _fully_connected(shapes: list[Shape], output: Shape) -> int:
    """Each output element sums over one row of [M, K]."""
    return _size(output) * shapes[1][-1]


def _transposed(shapes: list[Shape], output: Shape) -> int:
    """Each input element (operand 2) meets the whole filter [M, h, w, C] except its own channel axis."""
    return _size(shapes[2]) * _size(shapes[1][:3])


def _in_space(shapes: list[Shape], output: Shape) -> int:
    """Each output element sums over one filter of [d, h, w, C, M]."""
    return _size(output) * _size(shapes[1][:4])


def _transposed_in_space(shapes: list[Shape], output: Shape) -> int:
    """Each input element (operand 2) meets the whole filter [d, h, w, M, C] except its own channel axis."""
    return _size(shapes[2]) * _size(shapes[1][:4])


def _batch_matmul(shapes: list[Shape], output: Shape) -> int:
    """Each output element sums over the last axis of the left operand."""
    return _size(output) * shapes[0][-1]


COUNTED: Mapping[str, tuple[int, Callable[[list[Shape], Shape], int]]] = {
    "CONV_2D": (0, _convolution),
    "DEPTHWISE_CONV_2D": (0, _depthwise),
    "FULLY_CONNECTED": (0, _fully_connected),
    "TRANSPOSE_CONV": (2, _transposed),
    "CONV_3D": (0, _in_space),
    "CONV_3D_TRANSPOSE": (2, _transposed_in_space),
    "BATCH_MATMUL": (0, _batch_matmul),
}
"""Operator -> the operand whose type decides, and the count."""


def integer_share(artifact: Path) -> IntegerShare:
    """The share of multiply-accumulates on integer tensors, and the names of the layers that work on floats."""
    model = load(artifact)
    names, types = operator_names(model), element_types()
    integer = total = 0
    floats: list[str] = []
    for graph in model.subgraphs:
        for operator in graph.operators or []:
            name = names[operator.opcodeIndex]
            if name not in COUNTED:
                continue
            data, count = COUNTED[name]
            try:
                inputs = [graph.tensors[i] for i in operator.inputs if i >= 0]
                output = graph.tensors[operator.outputs[0]]
                macs = count([_shape(t) for t in inputs], _shape(output))
                kinds = {types[inputs[data].type], types[output.type]}
                is_hybrid = types[inputs[1].type] == "INT8" and kinds == {"FLOAT32"}
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise InputError(f"{artifact} is a damaged TFLite model: a {name} lacks what it works on") from error
            total += macs
            if is_hybrid or kinds <= set(INTEGERS):
                integer += macs
            else:
                floats.append(text(output.name))
    return IntegerShare(integer, total, tuple(floats))


def _shape(tensor: Any) -> Shape:
    return () if tensor.shape is None else tuple(int(s) for s in tensor.shape)
