"""Comparisons, boolean algebra, choices by a condition, and conversions between types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from edgeship.targets.tflite.dtypes import SHIFTED, STORED, USUAL, of_types
from edgeship.targets.tflite.emit import Emit
from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import Node, Tensor
from edgeship.targets.tflite.layout_rules import CONVERTS, POINTWISE
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.broadcast import apply


def relation(name: str) -> Callable[[Emit], None]:
    """A `convert` for two operands and a boolean result."""

    def convert(emit: Emit) -> None:
        apply(emit, name, emit.broadcast(0), emit.broadcast(1), into=emit.output())

    return convert


def convert_not(emit: Emit) -> None:
    """Writes a Not."""
    emit.operator("LOGICAL_NOT", [emit.input()], emit.output())


def convert_where(emit: Emit) -> None:
    """Writes a Where."""
    apply(emit, "SELECT_V2", *(emit.broadcast(place) for place in range(3)), into=emit.output())


def convert_is_nan(emit: Emit) -> None:
    """Writes x != x."""
    x = emit.input()
    emit.operator("NOT_EQUAL", [x, x], emit.output())


def convert_is_inf(emit: Emit) -> None:
    """Writes an IsInf: equal to one infinity, or the size to both."""
    x, y, node = emit.input(), emit.output(), emit.node
    signs = node.attribute("detect_negative", 1), node.attribute("detect_positive", 1)
    if signs == (0, 0):
        apply(emit, "LESS", x, -np.inf, into=y)
    elif signs == (1, 1):
        apply(emit, "EQUAL", apply(emit, "ABS", x), np.inf, into=y)
    else:
        apply(emit, "EQUAL", x, -np.inf if signs[0] else np.inf, into=y)


def convert_cast(emit: Emit) -> None:
    """Writes a Cast between numbers; nothing where the type stays."""
    x, y = emit.input(), emit.node.y
    if x.dtype == y.dtype:
        emit.alias(x)
    else:
        emit.operator("CAST", [x], emit.output())


def expand_cast_like(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """A Cast to the type of the other tensor."""
    return [scope.op("Cast", node.x, to=onnx.helper.np_dtype_to_tensor_dtype(node.tensor(1).dtype))]


def convert_bit_cast(emit: Emit) -> None:
    """Writes a BitCast between types of one size."""
    emit.operator("BITCAST", [emit.input()], emit.output())


def convert_dropout(emit: Emit) -> None:
    """Writes a Dropout of inference: its input, and a mask that keeps all."""
    x = emit.input()
    emit.alias(x)
    if len(emit.node.outputs) > 1:
        nothing = apply(emit, "CAST", apply(emit, "ZEROS_LIKE", x), dtype=np.bool_)
        emit.operator("LOGICAL_NOT", [nothing], emit.output(1))


def keeps_all(node: Node) -> str | None:
    """Dropout is that of inference, or its ratio is 0."""
    if not node.has(2):
        return None
    training = node.parameter("training_mode", 2)
    ratio = node.parameter("ratio", 1)
    is_random = training is not None and training.any() and (ratio is None or ratio.any())
    return "it drops at random; accepted: training_mode false" if is_random else None


ORDERED = ("float32", "int32", "int64", SHIFTED)
_RELATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "Equal": ("EQUAL", ("float32", "int32", "int64", "uint64", "bool")),
    "Greater": ("GREATER", ORDERED),
    "GreaterOrEqual": ("GREATER_EQUAL", ORDERED),
    "Less": ("LESS", ORDERED),
    "LessOrEqual": ("LESS_EQUAL", ORDERED),
    "And": ("LOGICAL_AND", ("bool",)),
    "Or": ("LOGICAL_OR", ("bool",)),
    "Xor": ("NOT_EQUAL", ("bool",)),
}
_CAST = tuple(name for name in STORED if name != "uint64")
_CASTS = (of_types(*_CAST, variable="T1"), of_types(*_CAST, variable="T2"))
_BITS = (of_types(*STORED, variable="T1"), of_types(*STORED, variable="T2"))
_CHOICE = Int8(shares_scale=True)

OPS = (
    *(Op(onnx, relation(name), POINTWISE, None, (of_types(*types),)) for onnx, (name, types) in _RELATIONS.items()),
    Op("Not", convert_not, POINTWISE, None, (of_types("bool"),), since=1),
    Op(
        "Where",
        convert_where,
        POINTWISE,
        _CHOICE,
        (of_types(*USUAL, "uint16", "uint32", "uint64", variable="T"),),
        since=9,
    ),
    Op("Dropout", convert_dropout, POINTWISE, None, (of_types("float32", variable="T"), keeps_all)),
    Op("IsNaN", convert_is_nan, POINTWISE, None, (of_types("float32"),), since=9),
    Op("IsInf", convert_is_inf, POINTWISE, None, (of_types("float32"),), since=10),
    Op("Cast", convert_cast, CONVERTS, None, _CASTS),
    Op("BitCast", convert_bit_cast, CONVERTS, None, _BITS),
)
EXPANSIONS = (Expansion("CastLike", expand_cast_like, 15),)
