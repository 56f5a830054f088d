"""Writes nodes in place of one: what the rewrites of this folder share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.calibration.types import Array

DATA_TYPES = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16}


@dataclass(frozen=True)
class Affine:
    """What integers mean: the values that hold scale and zero point (None: 0)."""

    scale: ir.Value
    zero_point: ir.Value | None

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The inputs of QuantizeLinear or DequantizeLinear behind the first."""
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)


def known(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node; None for anything that is computed or fed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_known(value: ir.Value | None) -> bool:
    """Whether `known` has an array for it; none is made."""
    return value is not None and not value.is_graph_input() and ir.convenience.get_const_tensor(value) is not None


def rank_of(value: ir.Value | None) -> int | None:
    """The number of axes, None where it is not known."""
    array = known(value)
    if array is not None:
        return array.ndim
    return None if value is None or value.shape is None else len(value.shape)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The element type, None where it is not known."""
    array = known(value)
    if array is not None:
        return ir.DataType.from_numpy(array.dtype)
    return None if value is None else value.dtype


def place(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


class Rewriter:
    """Nodes in place of `node`, under names that begin with its own."""

    def __init__(self, node: ir.Node) -> None:
        if node.graph is None:
            raise ValueError(f"{node.name} is in no graph")
        self.node, self.graph = node, node.graph
        self.stem = node.name or f"{node.op_type}_{node.outputs[0].name}"
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, data: Array) -> ir.Value:
        """A new initializer."""
        wish, count = f"{self.stem}/{name}", 0
        while wish in self.graph.initializers:
            count += 1
            wish = f"{self.stem}/{name}_{count}"
        value = ir.Value(name=wish, const_value=ir.tensor(np.ascontiguousarray(data).reshape(data.shape), name=wish))
        value.shape, value.type = ir.Shape(data.shape), ir.TensorType(ir.DataType.from_numpy(data.dtype))
        self.graph.register_initializer(value)
        return value

    def write(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Iterable[ir.Attr] = (), outputs: int = 1
    ) -> list[ir.Value]:
        """The results of a new standard operator."""
        name = f"{self.stem}/{op_type}_{len(self.nodes)}"
        made = ir.Node("", op_type, inputs, list(attributes), num_outputs=outputs, name=name, version=self.node.version)
        for index, value in enumerate(made.outputs):
            value.name = f"{name}:{index}"
        self.nodes.append(made)
        return list(made.outputs)

    def real(self, value: ir.Value, meaning: Affine, axis: int | None = None) -> ir.Value:
        """The real numbers behind the integers; `axis` of the scales where there are several."""
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        (made,) = self.write("DequantizeLinear", [value, *meaning.inputs], attributes)
        made.shape, made.dtype = value.shape, ir.DataType.FLOAT
        return made

    def integers(self, value: ir.Value, meaning: Affine) -> ir.Value:
        """The integers of real numbers."""
        (made,) = self.write("QuantizeLinear", [value, *meaning.inputs])
        made.shape, made.dtype = value.shape, dtype_of(meaning.zero_point) or ir.DataType.UINT8
        return made

    def finish(self, values: Sequence[ir.Value]) -> None:
        """Puts `values` in the place of the node's outputs; the node is gone."""
        for old, new in zip(self.node.outputs, values, strict=True):
            new.shape = old.shape if old.shape is not None else new.shape
            if old.dtype is not None:
                new.dtype = old.dtype
        ir.convenience.replace_nodes_and_values(
            self.graph, self.node, [self.node], self.nodes, list(self.node.outputs), list(values)
        )
