"""Quantized models of others as QDQ: the same integers, said the one way that every target starts from.

Four habits of exporters are undone. Operators that take scales themselves (QLinearConv and its relatives) become the
operator between DequantizeLinear and QuantizeLinear. Operators that carry integers from place to place (a Reshape
between QuantizeLinear and DequantizeLinear) carry real numbers instead: real = scale * (integer - zero point) and back
gives the same integer. What is done to a constant before it is dequantized, or after, is done to its integers here.
Numbers that are moved between DequantizeLinear and a layer get the pair behind them (`moved`).
Normalizations that edgeship itself wrote in single operations become one operator again.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.readback.constants import fold_constants
from edgeship.calibration.readback.dynamic import write_weight_only
from edgeship.calibration.readback.exact import with_operators
from edgeship.calibration.readback.integers import carry_real_numbers
from edgeship.calibration.readback.moved import requantize_moved
from edgeship.calibration.readback.plain import is_plain
from edgeship.calibration.readback.qoperator import QOPERATORS, write_qdq
from edgeship.calibration.readback.quantized import PAIR, find_quantized
from edgeship.calibration.readback.rewrite import dtype_of

__all__ = ["QOPERATORS", "read_back", "with_operators"]
AXIS_OPSET, WIDE_OPSET = 13, 21
SIXTEEN_BITS = frozenset({ir.DataType.INT16, ir.DataType.UINT16})


def read_back(model: ir.Model, *, run_time: bool = False) -> ir.Model:
    """The model as QDQ, its integers as they were; the same object where that is how it is. Nothing is modified.

    `run_time`: layers that quantize their activations at run time as well, which become float layers with quantized
    weights; the runtime's own kernels for these are to be preferred where it has them.
    Raises UnsupportedError for quantized operators in a form that QDQ does not have.
    """
    if not find_quantized(model):
        return model
    model = with_operators(model)
    if all(is_plain(graph) for graph in model.graphs()):
        return model
    model = model.clone()
    for graph in model.graphs():
        write_qdq(graph)
        if run_time:
            write_weight_only(graph)
        _standardize(graph)
        fold_constants(graph)
        carry_real_numbers(graph)
        requantize_moved(graph)
    return model


def _standardize(graph: ir.Graph) -> None:
    """Makes ONNX Runtime's own QuantizeLinear and DequantizeLinear the standard's, which mean the same.

    The standard has scales per channel from opset 13 on, and 16 bits from opset 21.
    """
    opset = graph.opset_imports.get("", 0)
    for node in graph:
        if node.op_type not in PAIR or not node.domain:
            continue
        kinds = {dtype_of(value) for value in (*node.inputs[:1], *node.inputs[2:])}
        if opset >= WIDE_OPSET or (opset >= AXIS_OPSET and not kinds & SIXTEEN_BITS):
            node.domain = ""
