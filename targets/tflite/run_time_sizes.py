"""Shapes as tensors: what tells an operator sizes that are known only at run time.

A size is read off a tensor that has it, or off the model's inputs: of the sizes that stand for their dynamic
dimensions, a size is one of them or a multiple. That it is this one and no other shows when the file is compared with
the one for other sizes (dynamic.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeship.targets.tflite.dynamic import ACCEPTED
from edgeship.targets.tflite.graph import Dimension, Tensor, Unsupported

if TYPE_CHECKING:
    from edgeship.targets.tflite.emit import Operand, Writer


class RunTimeSizes:
    """The sizes of one file's tensors; each is read once.

    `dimensions`: the dynamic ones, each with the input that has it.
    """

    def __init__(self, writer: Writer, dimensions: Sequence[tuple[Tensor, Dimension]]) -> None:
        self.writer, self.dimensions = writer, dimensions
        self._shapes: dict[int, Operand] = {}
        self._sizes: dict[tuple[int, int], Operand] = {}

    def of_reshape(self, source: Operand, shape: Sequence[int], signature: Sequence[int]) -> Operand:
        """What tells RESHAPE `signature`: a constant where at most one dimension is dynamic, else computed."""
        dynamic = [place for place, size in enumerate(signature) if size == -1]
        if len(dynamic) < 2:
            return self.writer.ints("shape", np.array(signature, np.int32))
        given = [size if known == -1 else None for size, known in zip(source.shape, source.signature, strict=True)]
        unknown = [place for place in dynamic if given.count(shape[place]) != 1]
        rest = unknown[0] if unknown else dynamic[0]
        parts = []
        for place, size in enumerate(signature):
            if size != -1 or place == rest:
                parts.append(self._known(size))
            elif place in unknown:
                parts.append(self._of_inputs(shape[place]))
            else:
                parts.append(self._of(source, given.index(shape[place])))
        return self._joined(parts)

    def extent(self, shape: Sequence[int], signature: Sequence[int]) -> Operand:
        """A shape, or other numbers, as int32: a constant, or computed where `signature` is -1."""
        if -1 not in signature:
            return self.writer.ints("shape", np.asarray(shape, np.int32))
        pairs = zip(shape, signature, strict=True)
        return self._joined([self._of_inputs(size) if known == -1 else self._known(size) for size, known in pairs])

    def _known(self, size: int) -> Operand:
        return self.writer.ints("dimension", np.array([size], np.int32))

    def _joined(self, parts: Sequence[Operand]) -> Operand:
        if len(parts) == 1:
            return parts[0]
        joined = self.writer.new("shape", (len(parts),), np.dtype(np.int32))
        self.writer.operator("CONCATENATION", parts, [joined], axis=0)
        return joined

    def _of_inputs(self, size: int) -> Operand:
        """The dynamic size that `size` stands for."""
        sizes = [each.size for _, each in self.dimensions]
        base = max((each for each in sizes if size % each == 0), default=0)
        if sizes.count(base) != 1:
            seen = f"{size} where the inputs have {sizes}"
            raise Unsupported("a size follows from the inputs' in a way that is not known", seen, ACCEPTED)
        tensor, dimension = self.dimensions[sizes.index(base)]
        axis = self.writer.plan.layouts[tensor].axis(dimension.axis)
        found = self._of(self.writer.produced[tensor], axis)
        if size == base:
            return found
        many = self.writer.new("size", (1,), np.dtype(np.int32))
        factor = self.writer.ints("factor", np.array([size // base], np.int32))
        self.writer.operator("MUL", [found, factor], [many], fused_activation_function="NONE")
        return many

    def _of(self, source: Operand, axis: int) -> Operand:
        """The size of one axis of `source`, in a vector of one."""
        if source.index not in self._shapes:
            whole = self._shapes[source.index] = self.writer.new("shape", (source.rank,), np.dtype(np.int32))
            self.writer.operator("SHAPE", [source], [whole], out_type="INT32")
        key = (source.index, axis)
        if key not in self._sizes:
            self._sizes[key] = self.writer.new("dimension", (1,), np.dtype(np.int32))
            begin, one = (self.writer.ints(name, np.array([n], np.int32)) for name, n in (("begin", axis), ("size", 1)))
            self.writer.operator("SLICE", [self._shapes[source.index], begin, one], [self._sizes[key]])
        return self._sizes[key]
