"""TFLite's quantization rules, read off the operators' own entries: there is no second table."""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.types import OperatorRule, QuantRules
from edgeship.targets.tflite.graph import Unsupported
from edgeship.targets.tflite.lower import single
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops import REGISTRY


def rules() -> QuantRules:
    """The rules of every operator with an int8 kernel."""
    return QuantRules("tflite", {name: rule(op) for name, op in REGISTRY.items() if op.int8 is not None})


def rule(op: Op) -> OperatorRule:
    """What the int8 kernel behind one ONNX operator demands."""
    if op.int8 is None:
        raise ValueError(f"{op.onnx} has no int8 kernel")

    def check(node: ir.Node) -> str | None:
        try:
            return op.int8_refusal(single(node))
        except Unsupported as error:
            return f"{error.rule} ({error.seen})" if error.seen else error.rule

    return OperatorRule(op.onnx, op.int8.shares_scale, op.int8.fixed_output, check, op.int8.symmetric)
