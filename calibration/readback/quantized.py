"""Returns what in a model is quantized already, whoever did it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from edgeship.calibration.readback.rewrite import is_known, place

PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})
_RUN_TIME = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QAttention"})


def find_quantized(model: ir.Model) -> Mapping[str, int]:
    """The operators that quantize, or compute on quantized tensors, and how many nodes there are of each."""
    return dict(Counter(node.op_type for node in model.graph.all_nodes() if is_quantized(node)))


def is_quantized(node: ir.Node) -> bool:
    """Whether the operator quantizes, or computes on quantized tensors."""
    name = node.op_type
    return name in PAIR or name in _RUN_TIME or name in _INTEGER or name.startswith("QLinear")


def quantizes_activations(graph: ir.Graph) -> bool:
    """Whether fed or computed numbers become integers, by parameters chosen beforehand: not weights alone."""
    return any(
        node.op_type.startswith("QLinear") or (node.op_type == "QuantizeLinear" and not is_known(place(node, 0)))
        for node in graph
    )


def form(model: ir.Model) -> str:
    """How the model says that it is quantized, in a few words; "" for a float model."""
    found = find_quantized(model)
    if not found:
        return ""
    words = []
    if any(name.startswith("QLinear") or name == "QGemm" for name in found):
        words.append("quantized operators (QOperator)")
    if any(name in _RUN_TIME for name in found):
        words.append("quantized at run time (dynamic)")
    elif any(name in ("ConvInteger", "MatMulInteger") for name in found):
        words.append("integer operators")
    if "QuantizeLinear" in found:
        words.append("QDQ")
    elif "DequantizeLinear" in found and not words:
        words.append("QDQ on weights only")
    return ", ".join(words) or "quantized operators"
