"""Softmax, LogSoftmax and Hardmax, along one axis or, before opset 13, over everything from an axis on.

int8: SOFTMAX and LOG_SOFTMAX have outputs with fixed scales and are within one step of the QDQ reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeship.calibration.types import FixedOutput
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import NATURAL, ByNode, LastAxis
from edgeship.targets.tflite.op import Int8, Int16, Op

PROBABILITY = FixedOutput(1 / 256, -128)
WIDE_UNIT = FixedOutput(1 / 32768, 0)
LOG_PROBABILITY = FixedOutput(16 / 256, 127)
Rows = Callable[[Emit, Operand, Operand], None]
"""Writes the function of each row of the first operand to the second."""


def along_axis(write: Rows) -> Callable[[Emit], None]:
    """A `convert` that works along the last axis in memory, or on the rows that older opsets flatten to."""

    def convert(emit: Emit) -> None:
        node, axis = emit.node, _axis(emit.node)
        if not _coerces(node):
            x = emit.rows(axis)
            write(emit, x, emit.output_as(x.shape, x.signature))
            return
        x, y = emit.input(), emit.output()
        rows = (int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))
        signature = (-1 if x.is_dynamic else rows[0], rows[1])
        flat = emit.writer.reshape(x, rows, signature)
        result = emit.temporary(rows, y, "rows", signature=signature)
        write(emit, flat, result)
        emit.writer.reshape(result, y.shape, y.signature, y)

    return convert


def _softmax(emit: Emit, x: Operand, y: Operand) -> None:
    emit.operator("SOFTMAX", [x], y, beta=1.0)


def _log_softmax(emit: Emit, x: Operand, y: Operand) -> None:
    emit.operator("LOG_SOFTMAX", [x], y)


def _hardmax(emit: Emit, x: Operand, y: Operand) -> None:
    """1 at the first largest element of the row, 0 elsewhere."""
    places = emit.writer.new(f"{emit.node.name}/places", x.shape[:-1], np.dtype(np.int32), signature=x.signature[:-1])
    emit.operator("ARG_MAX", [x, emit.ints("axis", x.rank - 1)], places, output_type="INT32")
    one, zero = (emit.constant(name, np.array(value, np.float32)) for name, value in (("one", 1), ("zero", 0)))
    emit.operator("ONE_HOT", [places, emit.ints("depth", x.shape[-1]), one, zero], y, axis=-1)


def _axis(node: Node) -> int:
    """The axis; before opset 13 everything from the axis on counts as one, which matters only where that is more than
    one.
    """
    return node.axis(1 if node.opset < 13 else -1)


def _coerces(node: Node) -> bool:
    return node.opset < 13 and int(np.prod(node.x.shape[_axis(node) + 1 :])) != 1


_LAST = LastAxis(_axis, torn=True)
_LAYOUT = ByNode(lambda node: NATURAL if _coerces(node) else _LAST)
_REAL = (of_types("float32"),)
_SOFTMAX = Int8(fixed_output=PROBABILITY, wide=Int16(WIDE_UNIT), real_is_faster=True)

OPS = (
    Op("Softmax", along_axis(_softmax), _LAYOUT, _SOFTMAX, _REAL),
    Op("LogSoftmax", along_axis(_log_softmax), _LAYOUT, Int8(fixed_output=LOG_PROBABILITY), _REAL),
    Op("Hardmax", along_axis(_hardmax), _LAYOUT, None, _REAL),
)
