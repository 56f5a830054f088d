"""Positions and orders of elements: ARG_MAX, ARG_MIN, TOPK_V2, CUMSUM.

A running product takes ceil(log2 n) steps: after step k every element holds the product of the 2^k elements up to it.
TFLite's ARG_MAX, ARG_MIN and TOPK_V2 prefer the lower index between equals, as ONNX does. int8: all exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeship.targets.tflite.dtypes import SHIFTED, of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Unsupported
from edgeship.targets.tflite.layout_rules import ALONG_AXES, Drops, LastAxis
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.broadcast import apply
from edgeship.targets.tflite.ops.reduce import keeps


def reversed_along(emit: Emit, x: Operand, place: int) -> Operand:
    """`x` with its axis `place` backwards."""
    return emit.compute("REVERSE_V2", [x, emit.ints("axis", [place])], x.shape, signature=x.signature)


def known_size(node: Node, axis: int) -> int:
    """The size of ONNX axis `axis`. Raises Unsupported when it is known only at run time."""
    if node.x.signature[axis] == -1:
        raise Unsupported("counts along a dynamic dimension", f"axis {axis}", "a static batch")
    return node.x.shape[axis]


def extremum(name: str) -> Callable[[Emit], None]:
    """A `convert` for the position of an extremum by TFLite operator `name`."""

    def convert(emit: Emit) -> None:
        node, x, y = emit.node, emit.input(), emit.output()
        axis = node.axis(0)
        place, last = emit.layout.axis(axis), bool(node.attribute("select_last_index", 0))
        if last:
            x = reversed_along(emit, x, place)
        kernel = name
        if x.dtype == np.int64:  # no kernel takes it: the first that equals the extremum
            x, kernel = _equals_extremum(emit, x, place, "REDUCE_MAX" if name == "ARG_MAX" else "REDUCE_MIN"), "ARG_MAX"
        shape, signature = (tuple(s for i, s in enumerate(sizes) if i != place) for sizes in (x.shape, x.signature))
        direct = not last and y.rank == len(shape)
        at = emit.compute(
            kernel,
            [x, emit.ints("axis", place)],
            shape,
            signature=signature,
            dtype=np.int64,
            into=y if direct else None,
            output_type="INT64",
        )
        if last:
            end = emit.constant("end", np.array(known_size(node, axis) - 1, np.int64))
            at = emit.compute("SUB", [end, at], shape, signature=signature, into=None if y.rank > len(shape) else y)
        if y.rank > len(shape):
            emit.writer.reshape(at, y.shape, y.signature, y)

    return convert


def _equals_extremum(emit: Emit, x: Operand, place: int, reduction: str) -> Operand:
    shape, signature = ([1 if i == place else s for i, s in enumerate(of)] for of in (x.shape, x.signature))
    axis = emit.ints("axis", [place])
    top = emit.compute(reduction, [x, axis], shape, signature=signature, keep_dims=True)
    return apply(emit, "EQUAL", x, top, dtype=np.bool_)


def convert_topk(emit: Emit) -> None:
    """Writes a TopK; the smallest are the largest of the mirrored numbers (-x, or -1 - x for integers)."""
    node, x = emit.node, emit.input()
    values, indices = emit.output(0), emit.output(1)
    count = values.shape[-1]
    smallest = node.attribute("largest", 1) != 1
    operand = _mirrored(emit, x) if smallest else x
    found = emit.temporary(values.shape, values, "found", signature=values.signature) if smallest else values
    shape = indices.shape
    places = emit.writer.new(f"{node.name}/places", shape, np.dtype(np.int32), signature=indices.signature)
    emit.operator("TOPK_V2", [operand, emit.ints("k", count)], [found, places])
    if smallest:
        _mirrored(emit, found, values)
    emit.compute("CAST", [places], into=indices)


def _mirrored(emit: Emit, x: Operand, into: Operand | None = None) -> Operand:
    if x.dtype == np.float32:
        return emit.compute("NEG", [x], into=into)
    if x.dtype in (np.dtype(np.int32), np.dtype(np.int64)):
        return emit.compute("SUB", [emit.constant("minus_one", np.array(-1, x.dtype)), x], x.shape, into=into)
    raise Unsupported("the smallest of these numbers cannot be found", str(x.dtype), "float32, int32, int64")


def largest_in_int8(node: Node) -> str | None:
    """The smallest elements are found in float32, int32 and int64."""
    return None if node.attribute("largest", 1) == 1 else "it looks for the smallest elements"


def known_count(node: Node) -> str | None:
    """The number of elements is a constant."""
    return None if not node.has(1) or node.tensor(1).is_constant else f"K is {node.tensor(1).name}, computed"


def running_axis(node: Node) -> int:
    """The axis of a CumSum or CumProd, from the front."""
    axis = node.ints("axis", 1)
    if not axis:
        raise Unsupported("needs an axis", "it is left out")
    return axis[0] + node.x.rank if axis[0] < 0 else axis[0]


def convert_cumsum(emit: Emit) -> None:
    """Writes a CumSum."""
    node = emit.node
    place = emit.layout.axis(running_axis(node))
    options = {name: bool(node.attribute(name, 0)) for name in ("exclusive", "reverse")}
    emit.operator("CUMSUM", [emit.input(), emit.ints("axis", place)], emit.output(), **options)


def convert_cumprod(emit: Emit) -> None:
    """Writes a CumProd by doubling."""
    node, x, y = emit.node, emit.input(), emit.output()
    axis = running_axis(node)
    size, place, backwards = known_size(node, axis), emit.layout.axis(axis), bool(node.attribute("reverse", 0))
    if node.attribute("exclusive", 0):
        x = _shifted(emit, x, place, 1, backwards)
    step = 1
    while step < size:
        last = step * 2 >= size
        x = emit.compute("MUL", [x, _shifted(emit, x, place, step, backwards)], into=y if last else None)
        step *= 2
    if size <= 1:
        emit.alias(x)


def _shifted(emit: Emit, x: Operand, place: int, step: int, backwards: bool) -> Operand:
    """`x` moved by `step` along an axis, with ones where nothing comes from."""
    step = min(step, x.shape[place])
    sizes, signature = list(x.shape), list(x.signature)
    sizes[place] = signature[place] = x.shape[place] - step
    begin = [step if backwards and axis == place else 0 for axis in range(x.rank)]
    extent = [size if d != -1 else -1 for size, d in zip(sizes, signature, strict=True)]
    kept = emit.compute("SLICE", [x, emit.ints("begin", begin), emit.ints("size", extent)], sizes, signature=signature)
    widths = np.zeros((x.rank, 2), np.int32)
    widths[place, int(backwards)] = step
    one = emit.constant("one", np.array(1, x.dtype))
    return emit.compute("PADV2", [kept, emit.ints("paddings", widths), one], x.shape, signature=x.signature)


_ARGUMENTS = (of_types("float32", "uint8", "int8", "int32", "int64", "bool"),)
_SORTED = (of_types("float32", "uint8", "int8", "int16", "int32", "int64", SHIFTED), known_count)
_ALONG = Drops(lambda node: [] if keeps(node) else [node.axis(0)])

OPS = (
    Op("ArgMax", extremum("ARG_MAX"), _ALONG, Int8(), _ARGUMENTS),
    Op("ArgMin", extremum("ARG_MIN"), _ALONG, Int8(), _ARGUMENTS),
    Op(
        "TopK",
        convert_topk,
        LastAxis(lambda node: node.axis(-1)),
        Int8(shares_scale=True, limits=(largest_in_int8,)),
        _SORTED,
    ),
    Op("CumSum", convert_cumsum, ALONG_AXES, None, (of_types("float32", "int32", "int64"),)),
    Op("CumProd", convert_cumprod, ALONG_AXES, None, (of_types("float32", "int32", "int64"),)),
)
