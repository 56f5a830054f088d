"""Returns who executes a model's multiply-accumulates, read off the graph that ONNX Runtime really runs.

ONNX Runtime writes its optimised graph to a file. A layer counts as integer when an integer kernel there reads the
layer's weight (or, for a product of two activations, the layer's second operand). Layouts and names of outputs change
there, names of integer weights do not.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.macs import WEIGHT_INPUT, count_macs, node_key
from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.targets.base import IntegerShare
from edgeship.targets.onnxruntime.session import model_bytes, session_options, start

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
_THROUGH = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


def integer_share(artifact: Path) -> IntegerShare:
    """Who executes the multiply-accumulates of `artifact`. Raises InputError for a file that cannot be loaded."""
    content, where = model_bytes(artifact)
    model = load_onnx(artifact)
    counts = count_macs(model)
    integer = Counter(_weight(node) for node in optimised(content, where).graph if node.op_type in INTEGER_KERNELS)
    done, left = 0, []
    layers = [node for node in model.graph if node.op_type in WEIGHT_INPUT]
    for node, (key, macs) in zip(layers, counts.items(), strict=True):
        weight = _weight(node)
        if integer[weight] > 0:
            integer[weight] -= 1
            done += macs
        else:
            left.append(f"{key} ({node.op_type})" if key == node_key(node) else key)
    return IntegerShare(done, sum(counts.values()), tuple(left))


def optimised(content: bytes, where: str) -> ir.Model:
    """The graph that ONNX Runtime executes here with all optimisations on."""
    with tempfile.TemporaryDirectory(prefix="edgeship-") as folder:
        path = Path(folder) / "optimised.onnx"
        options = session_options(1, optimise=True)
        options.optimized_model_filepath = str(path)
        start(content, where, options)
        if not path.is_file():
            raise InputError(f"ONNX Runtime did not write the graph it executes for {where}")
        return ir.load(path)


def _weight(node: ir.Node) -> str:
    """The name of the tensor that a layer's second operand comes from, before it was dequantized or laid out anew."""
    value = node.inputs[WEIGHT_INPUT[node.op_type]]
    while value is not None:
        producer = value.producer()
        if producer is None or producer.op_type not in _THROUGH:
            break
        value = producer.inputs[0]
    return "" if value is None or value.name is None else value.name
