"""Reductions: MEAN, SUM, REDUCE_MAX, REDUCE_MIN, REDUCE_PROD.

int8: MEAN rescales in fixed point, at most one step from the QDQ reference; REDUCE_MAX and REDUCE_MIN are exact. SUM
stays float: TFLite's reference kernel (TensorFlow 2.21) is off by up to 192 steps where in and out differ in scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeship.targets.tflite.emit import Emit
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import Drops
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.elementwise import of_types


def axes(node: Node) -> list[int]:
    """The reduced ONNX axes, from the front; all of them where none is named (none with noop_with_empty_axes)."""
    given = node.ints("axes", 1)
    if not given:
        return [] if node.attribute("noop_with_empty_axes", 0) else list(range(node.x.rank))
    return sorted(axis + node.x.rank if axis < 0 else axis for axis in given)


def keeps(node: Node) -> bool:
    """Whether reduced axes stay, with size 1."""
    return bool(node.attribute("keepdims", 1))


def reduction(name: str) -> Callable[[Emit], None]:
    """A `convert` that writes TFLite operator `name` over the node's axes."""

    def convert(emit: Emit) -> None:
        node, x = emit.node, emit.input()
        reduced = sorted(emit.layout.axis(axis) for axis in axes(node))
        if not reduced:
            emit.alias(x)
            return
        emit.operator(name, [x, emit.ints("axes", reduced)], emit.output(), keep_dims=keeps(node))

    return convert


REDUCES = Drops(lambda node: [] if keeps(node) else axes(node))
_ARITHMETIC = (of_types("float32", "int32", "int64"),)
_OPERATORS: Mapping[str, tuple[str, Int8 | None]] = {
    "ReduceMean": ("MEAN", Int8()),
    "ReduceSum": ("SUM", None),
    "ReduceMax": ("REDUCE_MAX", Int8(shares_scale=True)),
    "ReduceMin": ("REDUCE_MIN", Int8(shares_scale=True)),
    "ReduceProd": ("REDUCE_PROD", None),
}

OPS = tuple(Op(onnx, reduction(name), REDUCES, int8, _ARITHMETIC) for onnx, (name, int8) in _OPERATORS.items())
