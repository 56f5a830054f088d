"""Operators that become other ONNX operators while the model is read: `Scope` writes them, constants fold on the way.

An expansion sees shapes, types and constants as they are known at its place in the model. What it writes goes through
the same reading as the model's own nodes, so that shape arithmetic vanishes and a nested expansion needs nothing of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from edgeship.calibration.types import Array
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported, constant

OPSET = 21
"""The opset that expansions are written in; Reduce, Squeeze and Split take their axes as inputs."""
MOST_NODES = 20_000
"""Nodes that one expansion may write: an unrolled loop beyond it is refused."""


SEQUENCES = frozenset({
    "ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "SequenceLength", "SequenceMap", "SplitToSequence",
})  # fmt: skip
"""Operators on lists of tensors, which TFLite has not."""


class Reading(Protocol):
    """What an expansion needs of the walk over the model."""

    tensors: dict[ir.Value, Tensor]
    nodes: list[Node]
    dynamic: dict[str, int]

    def at_opset(self, opset: int) -> AbstractContextManager[None]:
        """Lets nodes be read as of another opset."""

    def read(self, node: ir.Node) -> None:
        """Reads one node whose inputs are among `tensors`; its outputs join them."""


class Scope:
    """The place of one expanded node: writes operators there, under names that begin with the node's own."""

    def __init__(self, reading: Reading, node: Node) -> None:
        self.reading, self.node = reading, node
        self.prefix = node.name or node.op_type
        self._start = len(reading.nodes)
        self._count = 0

    def op(self, op_type: str, *inputs: Tensor | Array | None, **attributes: Any) -> Tensor:
        """The result of an operator of opset 21; arrays become constants, attributes that are None are left out."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(self, op_type: str, count: int, *inputs: Tensor | Array | None, **attributes: Any) -> list[Tensor]:
        """The `count` results of an operator of opset 21."""
        self._count += 1
        name = f"{self.prefix}/{op_type}_{self._count}"
        given = {key: value for key, value in attributes.items() if value is not None}
        node = ir.Node(
            "",
            op_type,
            [self._value(tensor, f"{name}:in{place}") for place, tensor in enumerate(inputs)],
            [ir.convenience.convert_attribute(key, value) for key, value in given.items()],
            outputs=[ir.Value(name=name if count == 1 else f"{name}:{place}") for place in range(count)],
            name=name,
        )
        with self.reading.at_opset(OPSET):
            self._read(node)
        return [self.reading.tensors[value] for value in node.outputs]

    def body(self, graph: ir.Graph, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The outputs of a graph's nodes written here, with `inputs` in place of the graph's."""
        for value, tensor in zip(graph.inputs, inputs, strict=True):
            if tensor is not None:
                self.reading.tensors[value] = tensor
        names = [node.name for node in graph]
        for node in graph:
            node.name = f"{self.prefix}/{node.name or node.op_type}"
            self._read(node)
        for node, name in zip(graph, names, strict=True):
            node.name = name
        return [self.output(value) for value in graph.outputs]

    def apart(
        self,
        graph: ir.Graph,
        inputs: Sequence[Tensor | None],
        finish: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> tuple[list[Node], list[Tensor]]:
        """The nodes of a graph, written nowhere yet, and its outputs; `finish` may make others of them."""
        outside, self.reading.nodes = self.reading.nodes, []
        try:
            outputs = finish(self.body(graph, inputs))
            return self.reading.nodes, outputs
        finally:
            self.reading.nodes = outside

    def output(self, value: ir.Value) -> Tensor:
        """The tensor of a graph's output, which may be one of its constants."""
        if value not in self.reading.tensors:
            if value.const_value is None:
                raise Unsupported("reads a value that nothing makes", value.name or "")
            self.reading.tensors[value] = constant(value.name or "", value.const_value.numpy())
        return self.reading.tensors[value]

    def _read(self, node: ir.Node) -> None:
        if len(self.reading.nodes) - self._start > MOST_NODES:
            raise Unsupported("becomes too many operators", f"over {MOST_NODES}", "fewer or shorter loops")
        try:
            self.reading.read(node)
        except Unsupported as error:
            raise Unsupported(f"{node.op_type} in it: {error.rule}", error.seen, error.accepted) from error

    def _value(self, tensor: Tensor | Array | None, name: str) -> ir.Value | None:
        if tensor is None:
            return None
        if not isinstance(tensor, Tensor):
            tensor = constant(name, np.asarray(tensor))
        value = ir.Value(name=name)
        self.reading.tensors[value] = tensor
        return value


Expand = Callable[[Scope, Node], Sequence[Tensor | None]]
"""Writes a node as others; one tensor per output, None for an output that is left out."""


@dataclass(frozen=True)
class Expansion:
    """One ONNX operator that is written as other ONNX operators; the first line of `expand`'s docstring is the
    manual's.
    """

    onnx: str
    expand: Expand
    since: int = 7


class Expander:
    """Which nodes are expanded, and how: own expansions first, then ONNX's functions for what has no kernel."""

    def __init__(self, expansions: Mapping[str, Expansion], refuses: Callable[[Node], bool], known: set[str]) -> None:
        self.expansions, self.refuses, self.known = expansions, refuses, known

    def at_once(self, node: Node) -> Expand | None:
        """How to write `node`, whose output types nobody needs to know; None when it may stay or cannot be written."""
        if node.op_type in SEQUENCES:
            raise Unsupported("TFLite has no sequences of tensors", "", "tensors; a simplified export has no others")
        own = self.expansions.get(node.op_type)
        if own is not None:
            if node.opset < own.since:
                raise Unsupported(f"opset {node.opset} defines it differently", "", f"opset {own.since} or newer")
            return own.expand
        return None if node.op_type in self.known else _function(node)

    def instead(self, node: Node) -> Expand | None:
        """How to write `node`, an operator whose entry refuses it; None when it may stay or cannot be written."""
        return _function(node) if self.refuses(node) else None


def _function(node: Node) -> Expand | None:
    from edgeship.targets.tflite.functions import expand_function, has_function

    return expand_function if has_function(node) else None
