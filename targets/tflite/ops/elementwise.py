"""Arithmetic between tensors, with broadcasting: ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM and their kin.

int8: ADD and SUB bring both operands to a common scale with 20 bits of headroom, MUL rescales the product once; the QDQ
reference rounds the real result. They differ by at most one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import POINTWISE
from edgeship.targets.tflite.op import Int8, Limit, Op

WIDEST_BROADCAST = 5
ARITHMETIC = ("float32", "int32", "int64")


def of_types(*accepted: str) -> Limit:
    """A limit: the operands are of the `accepted` types."""

    def limit(node: Node) -> str | None:
        return (
            None
            if node.x.dtype.name in accepted
            else f"its operands are {node.x.dtype}; accepted: {', '.join(accepted)}"
        )

    limit.__doc__ = f"Operands are {', '.join(accepted)}."
    return limit


def narrow_broadcast(node: Node) -> str | None:
    """Shapes that differ have at most 5 axes."""
    shapes = {t.shape for t in node.tensors()}
    if (
        len(shapes) > 1
        and node.y.rank > WIDEST_BROADCAST
        and not all(t.size == 1 or t.shape == node.y.shape for t in node.tensors())
    ):
        return f"it broadcasts over {node.y.rank} axes; accepted: {WIDEST_BROADCAST}"
    return None


def one_type(node: Node) -> str | None:
    """Operands are of one type."""
    types = {t.dtype.name for t in node.tensors()}
    return f"its operands are {' and '.join(sorted(types))}; accepted: one type" if len(types) > 1 else None


def moderate_scales(node: Node) -> str | None:
    """One step of an operand (for Mul: of the product) is less than 256 steps of the output."""
    y, scales = node.y.quant, [float(t.quant.scale) for t in node.tensors() if t.quant]
    if y is None or len(scales) < 2:
        return None
    factor = (float(np.prod(scales)) if node.op_type == "Mul" else max(scales)) / float(y.scale)
    return (
        None if factor < 256 else f"one step of its operands is {factor:.3g} steps of its output; accepted: under 256"
    )


def binary(name: str, *, fuses: bool = True) -> Callable[[Emit], None]:
    """A `convert` that writes TFLite operator `name` on two operands."""

    def convert(emit: Emit) -> None:
        options = {"fused_activation_function": emit.node.activation} if fuses else {}
        emit.operator(name, [emit.broadcast(0), emit.broadcast(1)], emit.output(), **options)

    return convert


def chain(name: str) -> Callable[[Emit], None]:
    """A `convert` for any number of operands: TFLite operator `name` between one after the other."""

    def convert(emit: Emit) -> None:
        count, y = len(emit.node.inputs), emit.output()
        so_far = emit.broadcast(0)
        if count == 1:
            emit.alias(so_far)
        for index in range(1, count):
            operand = emit.broadcast(index)
            last = index == count - 1
            target = y if last else emit.temporary(np.broadcast_shapes(so_far.shape, operand.shape), y, "partial")
            emit.operator(name, [so_far, operand], target)
            so_far = target

    return convert


def convert_reciprocal(emit: Emit) -> None:
    """Writes 1 / x."""
    emit.operator("DIV", [emit.constant("one", np.ones((), np.float32)), emit.input()], emit.output())


def convert_mean(emit: Emit) -> None:
    """Writes a Mean of several tensors: their sum times a constant."""
    count, y = len(emit.node.inputs), emit.output()
    total: Operand = emit.broadcast(0)
    for index in range(1, count):
        operand = emit.broadcast(index)
        target = emit.temporary(np.broadcast_shapes(total.shape, operand.shape), y, "partial")
        emit.operator("ADD", [total, operand], target)
        total = target
    emit.operator("MUL", [total, emit.constant("share", np.array(1 / count, np.float32))], y)


_PLAIN: Mapping[str, str] = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL"}
_COMMON = (of_types(*ARITHMETIC), narrow_broadcast)

OPS = (
    *(
        Op(onnx, binary(name), POINTWISE, Int8(limits=(moderate_scales,)), _COMMON, fuses=True)
        for onnx, name in _PLAIN.items()
    ),
    Op("Div", binary("DIV"), POINTWISE, None, (of_types("float32", "int32"), narrow_broadcast), fuses=True),
    Op("Pow", binary("POW", fuses=False), POINTWISE, None, (of_types("float32", "int32"), one_type, narrow_broadcast)),
    Op("Max", chain("MAXIMUM"), POINTWISE, Int8(shares_scale=True), _COMMON),
    Op("Min", chain("MINIMUM"), POINTWISE, Int8(shares_scale=True), _COMMON),
    Op("Sum", chain("ADD"), POINTWISE, None, _COMMON),
    Op("Mean", convert_mean, POINTWISE, None, (of_types("float32"), narrow_broadcast)),
    Op("Reciprocal", convert_reciprocal, POINTWISE, None, (of_types("float32"),)),
)
