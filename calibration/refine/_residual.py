"""Returns the residual groups of a graph: tensors that Adds tie together, so that one factor per channel serves all.

    x + f(x) = s (x / s + f(x) / s),  s_i > 0

A factor passes through Add and Sub of tensors of one shape and through whatever is positive-homogeneous channel by
channel: Relu, LeakyRelu, pools, flattening of one value per channel. So the tensors before and behind share their
factors, through a whole stage of blocks.
A group can be scaled where every tensor of it is made by such an operator or by a layer, which takes 1 / s into its
output channels, and read by such an operator or by a layer, which takes s into its input channels. One output of the
graph, a Clip, or any other operator among them, and the group stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from edgeship.calibration.graph.operators import value_name
from edgeship.calibration.planning.groups import Groups

SUMS = frozenset({"Add", "Sub"})
POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Identity"})
"""Homogeneous for positive factors, channel by channel."""
FLATTEN = frozenset({"Flatten", "Reshape", "Squeeze"})


@dataclass(frozen=True)
class Residual:
    """The layers that write and that read a group's tensors, and those of its tensors that layers and sums make."""

    producers: tuple[ir.Node, ...]
    consumers: tuple[ir.Node, ...]
    tensors: tuple[str, ...]


def find_residuals(
    model: ir.Model, writes: Callable[[ir.Node], bool], reads: Callable[[ir.Node], bool]
) -> list[Residual]:
    """The groups with a sum in them that can be scaled, in graph order.

    `writes` and `reads` say which layers take factors into their output and input channels.
    """
    groups = Groups[ir.Value]()
    for node in model.graph:
        tied = _tied(node)
        for value in tied:
            groups.add(value)
            groups.join(tied[0], value)
    found = (_residual(members, writes, reads) for members in groups.members())
    return [each for each in found if each is not None]


def _tied(node: ir.Node) -> list[ir.Value]:
    """The values around the node that must have the same factors; none where it is no such operator."""
    operands = [value for value in node.inputs if value is not None]
    output = node.outputs[0]
    if node.op_type in SUMS:
        alike = all(value.shape is not None and value.shape == output.shape for value in operands)
        return [*operands, output] if alike else []
    passes = node.op_type in POOLS | {"Relu", "LeakyRelu"} or (node.op_type in FLATTEN and keeps_channels(node))
    return [operands[0], output] if passes else []


def keeps_channels(node: ir.Node) -> bool:
    """Whether (N, C, 1, 1) becomes (N, C)."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or len(result.shape) != 2:
        return False
    return all(side == 1 for side in source.shape[2:]) and source.shape[1] == result.shape[1]


def _residual(
    members: Iterable[ir.Value], writes: Callable[[ir.Node], bool], reads: Callable[[ir.Node], bool]
) -> Residual | None:
    producers: dict[ir.Node, None] = {}
    consumers: dict[ir.Node, None] = {}
    tensors = []
    sums = False
    for value in members:
        maker = value.producer()
        if maker is None or value.is_graph_output() or maker.outputs[0] is not value:
            return None
        if not _tied(maker):
            if not writes(maker):
                return None
            producers[maker] = None
        if not _tied(maker) or maker.op_type in SUMS:
            tensors.append(value_name(value))
            sums = sums or maker.op_type in SUMS
        for reader, index in value.uses():
            if _tied(reader):
                continue
            if index != 0 or not reads(reader):
                return None
            consumers[reader] = None
    return Residual(tuple(producers), tuple(consumers), tuple(tensors)) if sums and consumers else None
