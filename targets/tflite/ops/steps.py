"""Compositions: TFLite operators one after the other, with the shapes between them worked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Unsupported

Term = Operand | Array | float | int
"""What an operator takes: a tensor, or a constant that becomes one of the other operand's type."""


def fixed(emit: Emit) -> Steps:
    """Steps of a composition that is written for sizes known at conversion.

    Raises Unsupported where more than the batch of a computed input is dynamic.
    """
    for tensor in emit.node.tensors():
        if -1 in tensor.signature[1:] and not tensor.is_constant:
            raise Unsupported(
                "is composed of operators for fixed sizes", f"shape {list(tensor.signature)}", "a dynamic batch only"
            )
    return Steps(emit)


class Steps:
    """Writes one operator after the other for a node; each method returns the result, `into` names where it goes."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit

    @property
    def made(self) -> tuple[int, ...]:
        """The shape in memory that the node's first output is to have."""
        return self.emit.output_layout.shape(self.emit.node.y.shape)

    def deliver(self, result: Operand, index: int = 0) -> None:
        """Makes a tensor that this node computed its output: under the output's name, and in its shape."""
        layout, tensor = self.emit.arrangement.outputs[index], self.emit.node.outputs[index]
        shape, signature = layout.shape(tensor.shape), layout.shape(tensor.signature)
        if result.shape == shape:
            self.emit.writer.builder.rename(result.index, tensor.name)
            self.emit.alias(result, index)
        else:
            self.emit.writer.reshape(result, shape, signature, self.emit.output(index))

    def term(self, value: Term, like: Operand) -> Operand:
        """`value` as an operand, a number or array in the storage of `like`."""
        if isinstance(value, Operand):
            return value
        if like.dtype.kind == "f" or like.quant:
            return self.emit.real("constant", value, like)
        return self.emit.constant("constant", np.asarray(value, like.dtype))

    def binary(self, name: str, a: Operand, b: Term, into: Operand | None = None, **options: Any) -> Operand:
        """a `name` b, with broadcasting."""
        return self.emit.compute(name, [a, self.term(b, a)], into=into, **options)

    def compare(self, name: str, a: Operand, b: Term) -> Operand:
        """Where a `name` b holds."""
        return self.emit.compute(name, [a, self.term(b, a)], dtype=np.bool_)

    def unary(self, name: str, x: Operand, into: Operand | None = None) -> Operand:
        """`name` of every element."""
        return self.emit.compute(name, [x], into=into)

    def cast(self, x: Operand, dtype: Any, into: Operand | None = None) -> Operand:
        """`x` in another type; a float loses its fraction."""
        return (
            x if x.dtype == np.dtype(dtype) and into is None else self.emit.compute("CAST", [x], dtype=dtype, into=into)
        )

    def activated(self, x: Operand, activation: str) -> Operand:
        """`x` after a fused activation, by its name in the schema."""
        return x if activation == "NONE" else self.unary(activation, x)

    def clamp(self, x: Operand, low: float, high: float) -> Operand:
        """`x` within the bounds."""
        return self.binary("MINIMUM", self.binary("MAXIMUM", x, low), high)

    def select(self, condition: Operand, a: Operand, b: Operand, into: Operand | None = None) -> Operand:
        """`a` where the condition holds, else `b`; with broadcasting."""
        shape = np.broadcast_shapes(condition.shape, a.shape, b.shape)
        signature = [
            -1 if -1 in {o.signature[i] for o in (a, b) if o.rank == len(shape)} else s for i, s in enumerate(shape)
        ]
        if into is None:
            into = self.emit.temporary(shape, a, "selected", signature=signature)
        self.emit.operator("SELECT_V2", [condition, a, b], into)
        return into

    def reshape(self, x: Operand, shape: Sequence[int], into: Operand | None = None) -> Operand:
        """`x` under another shape; the first dimension stays dynamic where the one of `x` is."""
        signature = (-1, *shape[1:]) if x.is_dynamic else tuple(shape)
        return self.emit.writer.reshape(x, tuple(shape), signature, into)

    def transpose(self, x: Operand, order: Sequence[int], into: Operand | None = None) -> Operand:
        """The axes of `x` in another order."""
        shape, signature = [x.shape[i] for i in order], [x.signature[i] for i in order]
        return self.emit.compute(
            "TRANSPOSE", [x, self.emit.ints("order", order)], shape, signature=signature, into=into
        )

    def gather(
        self, x: Operand, indices: Operand | Array, axis: int, *, batch_dims: int = 0, into: Operand | None = None
    ) -> Operand:
        """The slices of `x` along `axis` that `indices` name; the first `batch_dims` axes of both go together."""
        places = indices if isinstance(indices, Operand) else self.emit.ints("indices", indices)
        shape, signature = (
            (*of_x[:axis], *of_places[batch_dims:], *of_x[axis + 1 :])
            for of_x, of_places in ((x.shape, places.shape), (x.signature, places.signature))
        )
        return self.emit.compute(
            "GATHER", [x, places], shape, signature=signature, into=into, axis=axis, batch_dims=batch_dims
        )

    def reduce(self, name: str, x: Operand, axis: int, into: Operand | None = None, *, keep: bool = False) -> Operand:
        """`name` (SUM, REDUCE_MAX ...) along one axis."""
        middle = (1,) if keep else ()
        shape, signature = ((*of[:axis], *middle, *of[axis + 1 :]) for of in (x.shape, x.signature))
        operands = [x, self.emit.ints("axis", [axis])]
        return self.emit.compute(name, operands, shape, signature=signature, into=into, keep_dims=keep)

    def matmul(self, a: Operand, b: Operand, into: Operand | None = None, *, adj_y: bool = False) -> Operand:
        """The matrix products of the last two axes, the others broadcast."""
        columns = -2 if adj_y else -1
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shape = (*batch, a.shape[-2], b.shape[columns])
        longer = a if a.rank >= b.rank and a.is_dynamic else b
        dynamic = longer.is_dynamic and longer.signature[0] == -1 and longer.rank > 2
        signature = (-1, *shape[1:]) if dynamic else shape
        return self.emit.compute("BATCH_MATMUL", [a, b], shape, signature=signature, into=into, adj_y=adj_y)

    def slice(self, x: Operand, axis: int, start: int, count: int, step: int = 1) -> Operand:
        """`count` elements of one axis, from `start` in steps of `step`."""
        if (start, count, step) == (0, x.shape[axis], 1):
            return x
        shape, signature = ([*of[:axis], count, *of[axis + 1 :]] for of in (x.shape, x.signature))
        begin = [start if place == axis else 0 for place in range(x.rank)]
        if step == 1:
            operands = [x, self.emit.ints("begin", begin), self.emit.ints("size", signature)]
            return self.emit.compute("SLICE", operands, shape, signature=signature)
        last = start + (count - 1) * step + 1
        end = [last if place == axis else size for place, size in enumerate(x.shape)]
        strides = [step if place == axis else 1 for place in range(x.rank)]
        operands = [x, *(self.emit.ints(n, v) for n, v in (("begin", begin), ("end", end), ("strides", strides)))]
        mask = sum(1 << place for place in range(x.rank) if place != axis)
        return self.emit.compute("STRIDED_SLICE", operands, shape, signature=signature, begin_mask=mask, end_mask=mask)

    def trim(self, x: Operand, axis: int, front: int, back: int) -> Operand:
        """`x` without its first and last elements along an axis of any size."""
        if not front and not back:
            return x
        size = x.shape[axis] - front - back
        shape, signature = ([*of[:axis], n, *of[axis + 1 :]] for of, n in ((x.shape, size), (x.signature, -1)))
        places = [place == axis for place in range(x.rank)]
        operands = [
            x,
            self.emit.ints("begin", [front * there for there in places]),
            self.emit.ints("end", [-back * there for there in places]),
            self.emit.ints("strides", [1] * x.rank),
        ]
        mask = sum(1 << place for place, there in enumerate(places) if not there or not back)
        return self.emit.compute("STRIDED_SLICE", operands, shape, signature=signature, end_mask=mask)

    def pad(self, x: Operand, widths: Sequence[tuple[int, int]], value: float | None = None) -> Operand:
        """`x` with (front, behind) more elements along every axis: zeros, or `value`."""
        if not any(front or behind for front, behind in widths):
            return x
        shape, signature = (
            [d if d == -1 else d + a + b for d, (a, b) in zip(of, widths, strict=True)] for of in (x.shape, x.signature)
        )
        operands = [x, self.emit.ints("paddings", widths)]
        if value is None:
            return self.emit.compute("PAD", operands, shape, signature=signature)
        return self.emit.compute("PADV2", [*operands, self.term(value, x)], shape, signature=signature)

    def spread(self, x: Operand, axis: int, stride: int) -> Operand:
        """`x` with `stride - 1` zeros between the elements of one axis."""
        if stride == 1 or x.shape[axis] == 1:
            return x
        size = x.shape[axis]
        before, after = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))
        wide = self.pad(self.reshape(x, (before * size, 1, after)), [(0, 0), (0, stride - 1), (0, 0)])
        result = self.reshape(wide, (*x.shape[:axis], size * stride, *x.shape[axis + 1 :]))
        return self.slice(result, axis, 0, (size - 1) * stride + 1)

    def concat(self, parts: Sequence[Operand], axis: int, into: Operand | None = None) -> Operand:
        """The parts one after the other along `axis`."""
        total = sum(part.shape[axis] for part in parts)
        shape, signature = ([*of[:axis], total, *of[axis + 1 :]] for of in (parts[0].shape, parts[0].signature))
        return self.emit.compute("CONCATENATION", list(parts), shape, signature=signature, into=into, axis=axis)
