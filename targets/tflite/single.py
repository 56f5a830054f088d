"""One ONNX node as a node of the conversion graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeship.targets.tflite.graph import Node, Tensor


def single(node: ir.Node) -> Node:
    """One ONNX node by itself, for rules that look at a node of a float graph; unknown dimensions are -1."""
    inputs = [None if value is None else _peek(value) for value in node.inputs]
    return Node(
        node.op_type,
        node.name or "",
        inputs,
        [_peek(value) for value in node.outputs],
        attributes_of(node),
        node.domain,
        node.version or _opset(node.graph),
    )


def _opset(graph: Any) -> int:
    return int(graph.opset_imports.get("", 0)) if isinstance(graph, ir.Graph) else 0


def _peek(value: ir.Value) -> Tensor:
    known = None if value.is_graph_input() and not value.is_initializer() else ir.convenience.get_const_tensor(value)
    data = None if known is None else known.numpy()
    shape = tuple(d if isinstance(d, int) else -1 for d in value.shape) if value.shape is not None else ()
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    return Tensor(value.name or "", shape if data is None else tuple(data.shape), dtype, None, data)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The attributes as Python and NumPy values."""
    return {
        name: attribute.value.numpy() if attribute.type == ir.AttributeType.TENSOR else attribute.value
        for name, attribute in node.attributes.items()
        if not attribute.is_ref()
    }
