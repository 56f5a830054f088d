"""What an operator's `convert` sees: its node, its operands as they lie in memory, a way to write operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeship.calibration.types import Array, QuantParams
from edgeship.targets.tflite.builder import Builder
from edgeship.targets.tflite.graph import Dimension, Node, Tensor, Unsupported
from edgeship.targets.tflite.layout import Digit, Extents, Layout, extents, marked, natural, same_bytes, unmarked
from edgeship.targets.tflite.layout_moves import moves
from edgeship.targets.tflite.layout_plan import Arrangement, LayoutPlan
from edgeship.targets.tflite.run_time_sizes import RunTimeSizes


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of the TFLite model: its index, and its physical shape, signature and storage."""

    index: int
    name: str
    shape: tuple[int, ...]
    signature: tuple[int, ...]
    dtype: np.dtype[Any]
    quant: QuantParams | None

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def extents(self) -> Extents:
        """The shape with dynamic dimensions marked."""
        return marked(self.shape, self.signature)

    @property
    def is_dynamic(self) -> bool:
        """Whether a dimension is known only at run time."""
        return -1 in self.signature


class Writer:
    """Everything written so far: which tensor lies where, in which orders."""

    def __init__(self, builder: Builder, plan: LayoutPlan, dimensions: Sequence[tuple[Tensor, Dimension]] = ()) -> None:
        """`dimensions`: the dynamic ones, each with the input that has it."""
        self.builder, self.plan = builder, plan
        self.sizes = RunTimeSizes(self, dimensions)
        self.produced: dict[Tensor, Operand] = {}
        self._arranged: dict[tuple[Tensor, Layout], Operand] = {}
        self._moved: dict[tuple[Tensor, tuple[Digit, ...]], Operand] = {}
        self._views: dict[tuple[int, tuple[int, ...]], Operand] = {}
        self._names: dict[str, int] = {}
        self.torn: dict[str, tuple[tuple[int, ...], tuple[Digit, ...]]] = {}
        """Tensors that are no permutation of the ONNX model's: the shape there, and memory as digits of it."""

    def new(  # noqa: PLR0913 - the fields of a tensor
        self,
        name: str,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        quant: QuantParams | None = None,
        *,
        data: Array | None = None,
        signature: Sequence[int] = (),
    ) -> Operand:
        """A new tensor; the channel axis of `quant` counts physical axes."""
        count = self._names[name] = self._names.get(name, -1) + 1
        name = f"{name}_{count}" if count else name
        signature = tuple(signature) or tuple(shape)
        index = self.builder.tensor(
            name,
            shape,
            dtype,
            data=data,
            scale=quant.scale.reshape(-1) if quant else None,
            zero_point=quant.zero_point.reshape(-1) if quant else None,
            axis=quant.spec.axis or 0 if quant else 0,
            signature=signature,
        )
        return Operand(index, name, tuple(int(s) for s in shape), signature, dtype, quant)

    def declare(self, tensor: Tensor, layout: Layout) -> Operand:
        """The operand that holds `tensor` in the layout it is made in."""
        operand = self.new(
            tensor.name,
            layout.shape(tensor.shape),
            tensor.storage,
            tensor.quant,
            signature=layout.shape(tensor.signature),
        )
        self.made(tensor, layout, operand)
        return operand

    def made(self, tensor: Tensor, layout: Layout, operand: Operand) -> None:
        """Says that `operand` was made to hold `tensor` in `layout`, under any shape."""
        self.place(tensor, layout, operand)
        self._note(tensor, layout, operand)

    def _note(self, tensor: Tensor, layout: Layout, operand: Operand) -> None:
        is_other = layout.is_torn or tensor.model_shape or operand.shape != layout.shape(tensor.shape)
        if is_other and not tensor.is_dynamic:
            shape = tensor.model_shape or tensor.shape
            self.torn.setdefault(operand.name, (shape, layout.digits(tensor.shape)))

    def place(self, tensor: Tensor, layout: Layout, operand: Operand) -> None:
        """Says that `operand` holds `tensor` in `layout`, under any shape."""
        self.produced[tensor] = operand
        if operand.shape == layout.shape(tensor.shape):
            self._arranged[tensor, layout] = operand

    def arranged(self, tensor: Tensor, layout: Layout) -> Operand:
        """`tensor` in `layout`: as it is, or through one RESHAPE or TRANSPOSE that all who want it so share."""
        key = (tensor, layout)
        if key not in self._arranged:
            if tensor.data is not None:
                self._arranged[key] = self._constant(tensor, layout)
            else:
                shape, signature = layout.shape(tensor.shape), layout.shape(tensor.signature)
                source = self.in_memory(tensor, layout)
                operand = self._arranged[key] = self.viewed(source, shape, signature, tensor.name)
                if operand is not source:
                    self._note(tensor, layout, operand)
        return self._arranged[key]

    def in_memory(self, tensor: Tensor, layout: Layout) -> Operand:
        """The computed `tensor` in the order of `layout`, under whatever shape."""
        have, source = self.plan.layouts[tensor], self.produced[tensor]
        if have == layout or same_bytes(have, layout, extents(tensor)):
            return source
        key = (tensor, layout.digits(extents(tensor)))
        if key not in self._moved:
            self._moved[key] = self._transposed(tensor, source, layout)
        return self._moved[key]

    def _constant(self, tensor: Tensor, layout: Layout) -> Operand:
        data, quant = tensor.data, tensor.quant
        if data is None:
            raise Unsupported("needs a constant", tensor.name, "a constant")
        if quant and quant.spec.axis is not None:
            quant = replace(quant, spec=replace(quant.spec, axis=layout.axis(quant.spec.axis)))
        return self.new(tensor.name, layout.shape(tensor.shape), tensor.storage, quant, data=layout.lay(data))

    def _transposed(self, tensor: Tensor, source: Operand, layout: Layout) -> Operand:
        operand = source
        for way in moves(tensor, self.plan.layouts[tensor], layout, source.extents):
            given = self.viewed(operand, *unmarked(way.shape))
            shape, signature = unmarked(way.result)
            operand = self.new(f"{tensor.name}/transposed", shape, tensor.storage, tensor.quant, signature=signature)
            permutation = self.ints("permutation", np.array(way.permutation, np.int32))
            self.operator("TRANSPOSE", [given, permutation], [operand])
        return operand

    def viewed(self, source: Operand, shape: Sequence[int], signature: Sequence[int], name: str = "") -> Operand:
        """`source` under another shape, through a RESHAPE that all who want it so share, called `name` where that is
        not the source's own.
        """
        key = (source.index, tuple(shape))
        if key not in self._views:
            target = None
            if name and name != source.name and tuple(shape) != source.shape:
                target = self.new(name, shape, source.dtype, source.quant, signature=signature)
            self._views[key] = self.reshape(source, shape, signature, target)
        return self._views[key]

    def reshape(
        self, source: Operand, shape: Sequence[int], signature: Sequence[int], target: Operand | None = None
    ) -> Operand:
        """`source` under another shape, written to `target` or a new tensor; itself when nothing changes."""
        if target is None and tuple(shape) == source.shape:
            return source
        if target is None:
            target = self.new(f"{source.name}/reshaped", shape, source.dtype, source.quant, signature=signature)
        if not shape:
            self.operator("SQUEEZE", [source], [target])  # RESHAPE cannot say "scalar": an empty shape is no constant
        else:
            self.operator("RESHAPE", [source, self.sizes.of_reshape(source, shape, signature)], [target])
        return target

    def ints(self, name: str, values: Array) -> Operand:
        """A constant of int32 parameters."""
        return self.new(name, values.shape, np.dtype(np.int32), data=values)

    def operator(self, name: str, inputs: Sequence[Operand | None], outputs: Sequence[Operand], **options: Any) -> None:
        """Adds one TFLite operator."""
        indices = [-1 if operand is None else operand.index for operand in inputs]
        self.builder.operator(name, indices, [operand.index for operand in outputs], options)


class Emit:
    """One node being written."""

    def __init__(self, writer: Writer, node: Node, arrangement: Arrangement) -> None:
        self.writer, self.node, self.arrangement = writer, node, arrangement
        self._outputs: dict[int, Operand] = {}

    @property
    def layout(self) -> Layout:
        """The layout of the first input."""
        layout = self.arrangement.inputs[0]
        return natural(self.node.x.rank) if layout is None else layout

    @property
    def output_layout(self) -> Layout:
        """The layout of the first output."""
        return self.arrangement.outputs[0]

    def input(self, index: int = 0) -> Operand:
        """Input `index` in the layout the arrangement says."""
        tensor = self.node.tensor(index)
        layout = self.arrangement.inputs[index]
        return self.writer.arranged(tensor, natural(tensor.rank) if layout is None else layout)

    def in_memory(self, index: int = 0) -> Operand:
        """Computed input `index` in the order that the arrangement says, under whatever shape."""
        tensor, layout = self.node.tensor(index), self.arrangement.inputs[index]
        if tensor.is_constant or layout is None:
            return self.input(index)
        return self.writer.in_memory(tensor, layout)

    def rows(self, axis: int) -> Operand:
        """The first input with ONNX axis `axis` as the last in memory; where others are torn, they come under whatever
        shape they have.
        """
        tensor, layout = self.node.x, self.layout
        if not layout.is_torn:
            return self.input()
        x = self.in_memory()
        if x.rank > 1 and x.shape[-1] == tensor.shape[axis]:
            return x
        others = layout.before(axis)
        if layout.holds_whole([axis]) or others is None:
            return self.input()
        shape, signature = ((*others.shape(extent), tensor.shape[axis]) for extent in (tensor.shape, tensor.signature))
        return self.writer.viewed(x, shape, signature)

    def output(self, index: int = 0) -> Operand:
        """The tensor that output `index` is to be written to."""
        if index not in self._outputs:
            self._outputs[index] = self.writer.declare(self.node.outputs[index], self.arrangement.outputs[index])
        return self._outputs[index]

    def output_as(self, shape: Sequence[int], signature: Sequence[int]) -> Operand:
        """The tensor that the first output is to be written to, its memory under another shape."""
        tensor, layout = self.node.y, self.output_layout
        if tuple(shape) == layout.shape(tensor.shape):
            return self.output()
        operand = self.writer.new(tensor.name, shape, tensor.storage, tensor.quant, signature=signature)
        self.writer.made(tensor, layout, operand)
        return operand

    def alias(self, operand: Operand, index: int = 0) -> None:
        """Says that output `index` is `operand`: nothing needs to be done."""
        self.writer.place(self.node.outputs[index], self.arrangement.outputs[index], operand)

    def broadcast(self, index: int) -> Operand:
        """Input `index` for an elementwise operator: of lower rank, it is lined up with the output's axes."""
        tensor, layout = self.node.tensor(index), self.output_layout
        rank = self.node.y.rank
        if tensor.rank == rank:
            return self.input(index)
        shape = (1,) * (rank - tensor.rank) + tensor.shape
        if tensor.data is not None:
            data = tensor.data if tensor.size == 1 else layout.fitted(shape).lay(tensor.data.reshape(shape))
            while data.ndim and data.shape[0] == 1:
                data = data[0]
            return self.writer.new(tensor.name, data.shape, tensor.storage, tensor.quant, data=data)
        return self._lined_up(index, shape)

    def _lined_up(self, index: int, shape: tuple[int, ...]) -> Operand:
        tensor, layout, source = self.node.tensor(index), self.output_layout, self.input(index)
        if tensor.size == 1 or layout.is_natural:
            return source
        wide = Tensor(tensor.name, shape, tensor.dtype, tensor.quant)
        wide.signature = (1,) * (len(shape) - tensor.rank) + tensor.signature
        if same_bytes(natural(wide.rank), layout, extents(wide)):
            return self.writer.reshape(source, layout.shape(shape), layout.shape(wide.signature))
        full = self.writer.reshape(source, shape, wide.signature)
        target = self.temporary(layout.shape(shape), full, "transposed", signature=layout.shape(wide.signature))
        self.operator("TRANSPOSE", [full, self.ints("permutation", layout.perm)], target)
        return target

    def constant(self, name: str, data: Array, quant: QuantParams | None = None) -> Operand:
        """A constant of this node; the channel axis of `quant` counts the axes of `data`."""
        return self.writer.new(f"{self.node.name}/{name}", data.shape, data.dtype, quant, data=data)

    def real(self, name: str, values: Any, like: Operand) -> Operand:
        """A constant of real values in the storage of `like`: quantized with its parameters where it has some."""
        data = np.asarray(values, np.float32)
        if like.quant:
            return self.constant(name, like.quant.quantize(data), like.quant)
        return self.constant(name, data.astype(like.dtype))

    def ints(self, name: str, values: Any) -> Operand:
        """A constant of int32 parameters."""
        return self.writer.ints(f"{self.node.name}/{name}", np.asarray(values, np.int32))

    def temporary(
        self,
        shape: Sequence[int],
        like: Operand,
        name: str,
        *,
        signature: Sequence[int] = (),
        quant: QuantParams | None = None,
    ) -> Operand:
        """A tensor between two operators of this node, stored as `like` unless `quant` says otherwise."""
        quant = quant or like.quant
        if not signature and like.is_dynamic and len(shape) == like.rank:
            signature = tuple(
                -1 if d == -1 and s == n else s for s, n, d in zip(shape, like.shape, like.signature, strict=True)
            )
        return self.writer.new(f"{self.node.name}/{name}", shape, like.dtype, quant, signature=signature)

    def compute(  # noqa: PLR0913 - what a tensor consists of, given by name
        self,
        name: str,
        inputs: Sequence[Operand],
        shape: Sequence[int] | None = None,
        *,
        dtype: Any = None,
        into: Operand | None = None,
        signature: Sequence[int] = (),
        **options: Any,
    ) -> Operand:
        """The result of one TFLite operator, in `into` or a new tensor: of `shape`, or as the inputs broadcast; of the
        first input's type unless `dtype` says otherwise.
        """
        if into is None:
            like = inputs[0]
            if shape is None:
                shape, signature = broadcast_extent(inputs)
            if dtype is None or np.dtype(dtype) == like.dtype:
                into = self.temporary(shape, like, name.lower(), signature=signature)
            else:
                name_, kind = f"{self.node.name}/{name.lower()}", np.dtype(dtype)
                into = self.writer.new(name_, shape, kind, signature=signature)
        self.operator(name, inputs, into, **options)
        return into

    def operator(
        self, name: str, inputs: Sequence[Operand | None], outputs: Operand | Sequence[Operand], **options: Any
    ) -> None:
        """Adds one TFLite operator; options by the schema's field names in snake case, enum members by name."""
        self.writer.operator(name, inputs, [outputs] if isinstance(outputs, Operand) else outputs, **options)


def broadcast_extent(operands: Sequence[Operand]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the signature of what the operands broadcast to."""
    shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    signature = list(shape)
    for operand in operands:
        for place, (size, dimension) in enumerate(zip(operand.shape[::-1], operand.signature[::-1], strict=True)):
            if dimension == -1 and size == shape[-1 - place]:
                signature[-1 - place] = -1
    return tuple(shape), tuple(signature)
