"""TFLite's quantization rules, read off the operators' own entries: there is no second table."""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.types import OperatorRule, QuantParams, QuantRules
from edgeship.targets.tflite.graph import Unsupported
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops import REGISTRY
from edgeship.targets.tflite.single import single


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

    of_kernel = op.int8.misses

    def misses(node: ir.Node, x: QuantParams, y: QuantParams) -> int:
        return 0 if of_kernel is None else of_kernel(single(node), x, y)

    int8 = op.int8
    apart = int8.rescales

    def rescales(node: ir.Node) -> bool:
        return apart is not None and apart(single(node))

    return OperatorRule(
        op.onnx,
        int8.shares_scale,
        int8.fixed_output,
        check,
        int8.symmetric,
        misses if of_kernel else None,
        rescales,
        real=int8.real_is_faster is True,
    )
