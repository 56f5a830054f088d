"""Returns what a rewrite asks of a graph: constants, shapes, attributes, and names that nobody uses yet."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeship.calibration.types import Array
from edgeship.pipeline.simplification.rule import Builder


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node; None for anything that is computed or fed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The single element of a constant; None for anything else."""
    array = constant(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions, where known."""
    return None if value is None or value.shape is None else len(value.shape)


def dimensions(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The dimensions with None for the symbolic ones; None when not even the rank is known."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def is_float(value: ir.Value | None) -> bool:
    """Whether the values are known to be floating point."""
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def spatial(value: ir.Value | None) -> tuple[int, ...] | None:
    """Height and width of an NCHW value; None unless the rank is 4 and both are static."""
    sizes = dimensions(value)
    if sizes is None or len(sizes) != 4 or None in sizes[2:]:
        return None
    return tuple(size for size in sizes[2:] if size is not None)


def producer(value: ir.Value) -> ir.Node:
    """The node that computes a matched value. Raises ValueError for a value that no node computes."""
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name} is not computed by a node")
    return node


def input_at(node: ir.Node, place: int) -> ir.Value | None:
    """The input at `place`, None where it is left out."""
    return node.inputs[place] if place < len(node.inputs) else None


def new_constant(op: Builder, node: ir.Node, wish: str, array: Array, old: ir.Value | None = None) -> ir.Value:
    """An initializer that holds `array` for the node which replaces `node`.

    It takes the name of `old` where nothing else uses that, and otherwise `wish` or `wish_1`, `wish_2` ...: constants
    that other nodes share are never overwritten.
    """
    if old is not None and old.is_initializer() and len(old.uses()) == 1 and old.name and not old.is_graph_output():
        name = old.name
    else:
        name = _unused(node, wish)
    return op.initializer(ir.tensor(np.ascontiguousarray(array), name=name), name=name)  # type: ignore[no-any-return]  # see Builder


def _unused(node: ir.Node, wish: str) -> str:
    graph = node.graph
    taken: set[str | None] = set()
    if graph is not None:
        taken |= set(graph.initializers) | {value.name for value in graph.inputs}
        taken |= {output.name for each in graph for output in each.outputs}
    if wish not in taken:
        return wish
    count = 1
    while f"{wish}_{count}" in taken:
        count += 1
    return f"{wish}_{count}"


def keep_attributes(node: ir.Node, *dropped: str) -> dict[str, ir.Attr]:
    """The node's attributes for a replacement, without those in `dropped`."""
    return {name: attribute for name, attribute in node.attributes.items() if name not in dropped}
