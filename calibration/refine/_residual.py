"""Returns the residual groups of a graph: tensors that Adds tie together, so that one factor per channel serves all.

    x + f(x) = s (x / s + f(x) / s),  s_i > 0

A factor passes through Add and Sub of tensors of one shape and through whatever is positive-homogeneous channel by
channel: Relu, LeakyRelu, pools, flattening of one value per channel, a Slice that keeps all channels, a Pad with zeros.
So the tensors before and behind share their factors, through a whole stage of blocks. A Pad that adds channels, as in
shortcuts without parameters (He et al., 2015, "Deep Residual Learning for Image Recognition", section 3.3, option A),
ties stages together: the channels of its input are some of its output's, and the added ones are zero whatever their
factor.
A group can be scaled where every tensor of it is made by such an operator or by a layer, which takes 1 / s into its
output channels, and read by such an operator or by a layer, which takes s into its input channels. One output of the
graph, a Clip, or any other operator among them, and the group stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import attribute, constant_array, value_name

SUMS = frozenset({"Add", "Sub"})
POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Identity"})
"""Homogeneous for positive factors, channel by channel."""
FLATTEN = frozenset({"Flatten", "Reshape", "Squeeze"})


@dataclass(frozen=True)
class Residual:
    """The layers that write and that read a group's tensors, and those of its tensors that layers and sums make.

    Each with the place of its channels among the `channels` of the group.
    """

    channels: int
    producers: Mapping[ir.Node, slice]
    consumers: Mapping[ir.Node, slice]
    tensors: Mapping[str, slice]


def find_residuals(
    model: ir.Model, writes: Callable[[ir.Node], bool], reads: Callable[[ir.Node], bool]
) -> list[Residual]:
    """The groups with a sum in them that can be scaled, in graph order.

    `writes` and `reads` say which layers take factors into their output and input channels.
    """
    ties: dict[ir.Value, list[tuple[ir.Value, int]]] = {}
    for node in model.graph:
        tied = _tied(node)
        for value, place in tied:
            first, origin = tied[0]
            ties.setdefault(first, []).append((value, place - origin))
            ties.setdefault(value, []).append((first, origin - place))
    found = []
    seen: set[ir.Value] = set()
    for start in ties:
        if start not in seen:
            places = _places(start, ties)
            seen.update(places)
            if all(places[other] == places[value] + shift for value in places for other, shift in ties[value]):
                found.append(_residual({value: places[value] for value in ties if value in places}, writes, reads))
    return [each for each in found if each is not None]


def _places(start: ir.Value, ties: Mapping[ir.Value, list[tuple[ir.Value, int]]]) -> dict[ir.Value, int]:
    """Every value tied to `start`, with the place of its first channel relative to that of `start`."""
    places = {start: 0}
    waiting = [start]
    while waiting:
        value = waiting.pop()
        for other, shift in ties[value]:
            if other not in places:
                places[other] = places[value] + shift
                waiting.append(other)
    return places


def _tied(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """The values around the node that must have the same factors; none where it is no such operator.

    Each with the place of its first channel; values whose channels are the same have the same place.
    """
    operands = [value for value in node.inputs if value is not None]
    output = node.outputs[0]
    if node.op_type in SUMS:
        alike = all(value.shape is not None and value.shape == output.shape for value in operands)
        return [(value, 0) for value in (*operands, output)] if alike else []
    if node.op_type == "Pad":
        before = _zeros_before(node)
        return [] if before is None else [(operands[0], before), (output, 0)]
    passes = node.op_type in POOLS | {"Relu", "LeakyRelu"} or (node.op_type in FLATTEN and keeps_channels(node))
    return [(operands[0], 0), (output, 0)] if passes or (node.op_type == "Slice" and _cuts_the_image(node)) else []


def keeps_channels(node: ir.Node) -> bool:
    """Whether (N, C, 1, 1) becomes (N, C)."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or len(result.shape) != 2:
        return False
    return all(side == 1 for side in source.shape[2:]) and source.shape[1] == result.shape[1]


def _zeros_before(node: ir.Node) -> int | None:
    """How many channels of zeros a Pad puts before its input's; None for padding with anything else."""
    source, pads = node.inputs[0], constant_array(node.inputs[1] if len(node.inputs) > 1 else None)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    filling = None if value is None else constant_array(value)
    if source is None or source.shape is None or pads is None or attribute(node, "mode", "constant") != "constant":
        return None
    if value is not None and (filling is None or np.any(filling)):
        return None
    rank = len(source.shape)
    axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(rank)
    if axes is None or pads.size != 2 * axes.size:
        return None
    return sum(int(pad) for axis, pad in zip(axes, pads, strict=False) if axis % rank == 1)


def _cuts_the_image(node: ir.Node) -> bool:
    """Whether a Slice leaves out values of every channel, and no channel."""
    source, result = node.inputs[0], node.outputs[0]
    axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if source is None or source.shape is None or result.shape is None or axes is None:
        return False
    return all(axis % len(source.shape) > 1 for axis in axes)


def _residual(
    places: Mapping[ir.Value, int], writes: Callable[[ir.Node], bool], reads: Callable[[ir.Node], bool]
) -> Residual | None:
    producers: dict[ir.Node, ir.Value] = {}
    consumers: dict[ir.Node, ir.Value] = {}
    tensors = []
    sums = False
    for value in places:
        maker = value.producer()
        if maker is None or value.is_graph_output() or maker.outputs[0] is not value:
            return None
        made = _tied(maker)
        if not made:
            if not writes(maker):
                return None
            producers[maker] = value
        if not made or maker.op_type in SUMS:
            tensors.append(value)
            sums = sums or maker.op_type in SUMS
        for reader, index in value.uses():
            if _tied(reader):
                continue
            if index != 0 or not reads(reader):
                return None
            consumers[reader] = value
    return _placed(places, producers, consumers, tensors) if sums and consumers else None


def _placed(
    places: Mapping[ir.Value, int],
    producers: Mapping[ir.Node, ir.Value],
    consumers: Mapping[ir.Node, ir.Value],
    tensors: Sequence[ir.Value],
) -> Residual | None:
    """The group with its channels counted from 0; None where a tensor's number of channels is not known."""
    widths = {value: _width(value) for value in (*producers.values(), *consumers.values(), *tensors)}
    known = {value: width for value, width in widths.items() if width is not None}
    if len(known) < len(widths):
        return None
    origin = min(places[value] for value in known)
    windows = {value: slice(places[value] - origin, places[value] - origin + width) for value, width in known.items()}
    return Residual(
        max(window.stop for window in windows.values()),
        {node: windows[value] for node, value in producers.items()},
        {node: windows[value] for node, value in consumers.items()},
        {value_name(value): windows[value] for value in tensors},
    )


def _width(value: ir.Value) -> int | None:
    """How many channels the value has, where that is known."""
    side = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
    return side if isinstance(side, int) else None
