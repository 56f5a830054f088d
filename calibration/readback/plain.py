"""Whether a quantized model is QDQ already, in the form that every target starts from: nothing is to be read back."""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.readback.constants import MOVING
from edgeship.calibration.readback.integers import CARRIERS
from edgeship.calibration.readback.moved import needs_pair
from edgeship.calibration.readback.quantized import PAIR, is_quantized
from edgeship.calibration.readback.rewrite import DATA_TYPES, is_known, place


def is_plain(graph: ir.Graph) -> bool:
    """Whether every rewrite of this folder would leave the graph as it is; False where that takes a closer look."""
    return all(_is_plain(node) for node in graph) and all(
        value.uses() or value.is_graph_output() or value.is_graph_input() for value in graph.initializers.values()
    )


def _is_plain(node: ir.Node) -> bool:
    if is_quantized(node):
        folds = node.op_type == "QuantizeLinear" and is_known(place(node, 0))
        return node.op_type in PAIR and not node.domain and not folds
    carries = node.op_type in MOVING | CARRIERS.keys() and any(
        value is not None and _holds_integers(value) for value in node.inputs
    )
    return not carries and not needs_pair(node)


def _holds_integers(value: ir.Value) -> bool:
    """Whether the value is, or may be, quantized numbers, or constant ones made real."""
    maker = value.producer()
    if maker is None or maker.op_type == "Constant":
        return value.dtype is None or value.dtype in DATA_TYPES
    if maker.op_type == "DequantizeLinear":
        return is_known(place(maker, 0))
    return is_quantized(maker)
