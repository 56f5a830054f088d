"""Group normalizations as exporters write them for opsets without the operator: an instance normalization of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.targets.tflite.fusion import alike, substitute
from edgeship.targets.tflite.graph import Graph, Node, Tensor, constant
from edgeship.targets.tflite.layout import extents

SINCE = 21
"""The opset whose GroupNormalization has a scale for each channel."""


def join_group_norms(graph: Graph) -> None:
    """Writes an InstanceNormalization between Reshapes, which give each group of channels a row, as the
    GroupNormalization that it was, with the factors and terms of the channels that follow it in real numbers.
    """
    uses, producers, kept = graph.consumers(), graph.producers(), set(graph.outputs.values())

    def alone(tensor: Tensor) -> Node | None:
        readers = uses.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in kept else None

    for norm in [node for node in graph.nodes if node.op_type == "InstanceNormalization"]:
        before, after = producers.get(norm.x), alone(norm.y)
        if before is None or after is None or {before.op_type, after.op_type} != {"Reshape"}:
            continue
        x, rows, y = before.x, norm.x, after.y
        whole = extents(x) == extents(y) and x.rank > 2 and extents(x)[0] == extents(rows)[0]
        grouped = rows.rank == 3 and not x.shape[1] % rows.shape[1] and x.signature[1] > 0
        if not (whole and grouped and alike(x, rows) and alike(norm.y, y) and _are_constant(norm.inputs[1:])):
            continue
        groups, channels = rows.shape[1], x.shape[1]
        scale, bias = (np.repeat(norm.tensor(i).values(), channels // groups) for i in (1, 2))
        gone = [norm, after]
        while y.quant is None and (reader := alone(y)) is not None and reader.op_type in ("Mul", "Add"):
            other = reader.tensor(1) if reader.x is y else reader.x
            if other.data is None or other.quant or reader.y.quant or extents(reader.y) != extents(y):
                break
            shape = (*[1] * (y.rank - other.rank), *other.shape)
            if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
                break
            values = other.values().reshape(-1)
            scale, bias = (scale * values, bias * values) if reader.op_type == "Mul" else (scale, bias + values)
            y = reader.y
            gone.append(reader)
        attributes = {"num_groups": groups, "epsilon": norm.attribute("epsilon", 1e-5)}
        inputs: list[Tensor | None] = [x, constant(f"{norm.name}/scale", scale), constant(f"{norm.name}/bias", bias)]
        substitute(graph, gone, [Node("GroupNormalization", norm.name, inputs, [y], attributes, opset=SINCE)])


def _are_constant(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is not None and tensor.is_constant for tensor in tensors)
