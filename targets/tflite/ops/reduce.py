"""Reductions: MEAN, SUM, REDUCE_MAX, REDUCE_MIN, REDUCE_PROD, and what is made of them.

    L1 = sum |x|    L2 = sqrt(sum x^2)    LogSum = log(sum x)    LogSumExp = m + log(sum exp(x - m)), m = max x

int8: MEAN rescales in fixed point, at most one step from the QDQ reference; REDUCE_MAX and REDUCE_MIN are exact. SUM
stays float: TFLite's reference kernel (TensorFlow 2.21) is off by up to 192 steps where in and out differ in scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Unsupported
from edgeship.targets.tflite.layout_plan import LayoutRule
from edgeship.targets.tflite.layout_rules import NATURAL, ByNode, Drops
from edgeship.targets.tflite.op import Int8, Int16, Op

BOOLEAN = {"REDUCE_MAX": "REDUCE_ANY", "REDUCE_MIN": "REDUCE_ALL"}
LARGEST = float(np.finfo(np.float32).max)


def _computed_axes(node: Node) -> bool:
    """Whether the axes are known only at run time; none at all are known."""
    return node.has(1) and not node.tensor(1).is_constant and node.tensor(1).size > 0


def axes(node: Node) -> list[int]:
    """The reduced ONNX axes, from the front; all of them where none is named (none with noop_with_empty_axes)."""
    given = None if node.has(1) and not node.tensor(1).size else node.ints("axes", 1)
    if not given:
        return [] if node.attribute("noop_with_empty_axes", 0) else list(range(node.x.rank))
    return sorted(axis + node.x.rank if axis < 0 else axis for axis in given)


def keeps(node: Node) -> bool:
    """Whether reduced axes stay, with size 1."""
    return bool(node.attribute("keepdims", 1))


class Reducer:
    """The axes of one node as TFLite takes them: a constant, or the tensor that holds them at run time."""

    def __init__(self, emit: Emit) -> None:
        node = emit.node
        self.emit, self.keeps = emit, keeps(node)
        if _computed_axes(node):
            given = emit.input(1)
            self.places: list[int] | None = None
            self.axes = given if given.dtype == np.int32 else emit.compute("CAST", [given], dtype=np.int32)
        else:
            self.places = sorted(emit.layout.axis(axis) for axis in axes(node))
            self.axes = emit.ints("axes", self.places)

    def __call__(self, name: str, x: Operand, into: Operand | None = None, keep: bool | None = None) -> Operand:
        """`x` reduced by TFLite operator `name`."""
        keep = self.keeps if keep is None else keep
        shape, signature = ((), ()) if into else self._extent(x, keep)
        return self.emit.compute(name, [x, self.axes], shape, signature=signature, into=into, keep_dims=keep)

    def _extent(self, x: Operand, keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and signature of the result."""
        if self.places is None:
            layout, y = self.emit.output_layout, self.emit.node.y
            if keep != self.keeps:
                raise Unsupported("needs known axes", "they are computed", "a constant")
            return layout.shape(y.shape), layout.shape(y.signature)
        places = self.places

        def reduced(sizes: tuple[int, ...]) -> tuple[int, ...]:
            if keep:
                return tuple(1 if place in places else size for place, size in enumerate(sizes))
            return tuple(size for place, size in enumerate(sizes) if place not in places)

        return reduced(x.shape), reduced(x.signature)


def plain(name: str) -> Callable[[Emit], None]:
    """A `convert` that writes TFLite operator `name` over the node's axes."""

    def convert(emit: Emit) -> None:
        x, reduce = emit.input(), Reducer(emit)
        if reduce.places == []:
            emit.alias(x)
            return
        reduce(BOOLEAN[name] if x.dtype == np.bool_ else name, x, emit.output())

    return convert


def composed(before: str | None, name: str, after: str | None) -> Callable[[Emit], None]:
    """A `convert` that writes elementwise operators `before` and `after` a reduction; the first and last also without
    any axis to reduce.
    """

    def convert(emit: Emit) -> None:
        x, y, reduce = emit.input(), emit.output(), Reducer(emit)
        steps = [step for step in (before, None if reduce.places == [] else name, after) if step]
        for step in steps:
            into = y if step is steps[-1] else None
            if step == name:
                x = reduce(name, x, into)
            elif step == "SQUARE" and x.dtype != np.float32:
                x = emit.compute("MUL", [x, x], into=into)
            else:
                x = emit.compute(step, [x], into=into)

    return convert


def convert_log_sum_exp(emit: Emit) -> None:
    """Writes a ReduceLogSumExp around the largest element, so that no exponential overflows."""
    x, y, reduce = emit.input(), emit.output(), Reducer(emit)
    if reduce.places == []:
        emit.compute("LOG", [emit.compute("EXP", [x])], into=y)
        return
    if reduce.places is None:
        emit.compute("LOG", [reduce("SUM", emit.compute("EXP", [x]))], into=y)
        return
    top = reduce("REDUCE_MAX", x, keep=True)
    # An infinite maximum would make inf - inf; clamped, exp and log give what the definition says.
    low, high = (emit.constant("bound", np.array(bound, np.float32)) for bound in (-LARGEST, LARGEST))
    top = emit.compute("MINIMUM", [emit.compute("MAXIMUM", [top, low]), high])
    total = reduce("SUM", emit.compute("EXP", [emit.compute("SUB", [x, top])]))
    flat = top if reduce.keeps else emit.writer.reshape(top, total.shape, total.signature)
    emit.compute("ADD", [emit.compute("LOG", [total]), flat], into=y)


def _layout(node: Node) -> LayoutRule:
    return NATURAL if _computed_axes(node) else REDUCES


REDUCES = Drops(lambda node: [] if keeps(node) else axes(node), axes)
_NUMBERS = (of_types("float32", "int32", "int64"),)
_ORDERED = (of_types("float32", "int8", "uint8", "int16", "int32", "int64", "bool"),)
_FLOATS = (of_types("float32"),)

OPS = (
    Op("ReduceMean", plain("MEAN"), ByNode(_layout), Int8(wide=Int16()), _NUMBERS),
    Op("ReduceSum", plain("SUM"), ByNode(_layout), None, _NUMBERS),
    Op("ReduceProd", plain("REDUCE_PROD"), ByNode(_layout), None, _NUMBERS),
    Op("ReduceMax", plain("REDUCE_MAX"), ByNode(_layout), Int8(shares_scale=True, wide=Int16()), _ORDERED),
    Op("ReduceMin", plain("REDUCE_MIN"), ByNode(_layout), Int8(shares_scale=True, wide=Int16()), _ORDERED),
    Op("ReduceL1", composed("ABS", "SUM", None), ByNode(_layout), None, _FLOATS),
    Op("ReduceL2", composed("SQUARE", "SUM", "SQRT"), ByNode(_layout), None, _FLOATS),
    Op("ReduceSumSquare", composed("SQUARE", "SUM", None), ByNode(_layout), None, _NUMBERS),
    Op("ReduceLogSum", composed(None, "SUM", "LOG"), ByNode(_layout), None, _FLOATS),
    Op("ReduceLogSumExp", convert_log_sum_exp, ByNode(_layout), None, _FLOATS),
)
