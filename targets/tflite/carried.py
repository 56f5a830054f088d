"""What is known of the elements of a computed tensor, and which operators carry it on."""

from __future__ import annotations

from edgeship.targets.tflite.graph import Node

FINDERS = frozenset({"ArgMax", "ArgMin", "NonZero", "TopK"})
"""Operators whose integers are positions that count from the front."""
CARRIERS = frozenset({"Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
"""Operators that carry elements from one place to another and add none."""


def number_of(node: Node) -> float | None:
    """What every element of the node's result is, where its input tells."""
    return node.x.number if node.op_type in CARRIERS and node.has(0) else None


def makes_positions(node: Node) -> bool:
    """Whether the integers that the node makes are positions counted from the front."""
    return node.op_type in FINDERS or (node.op_type in {*CARRIERS, "Cast"} and node.has(0) and node.x.is_position)
