"""Returns what ONNX Runtime's CPU kernels demand of an int8 graph.

Read off the QDQ transformer's selectors (onnxruntime/core/optimizer/qdq_transformer/selectors_actions, 1.31) and
confirmed by looking at optimised graphs (tests/targets/onnxruntime). Three groups:

- integer kernels: Conv -> QLinearConv, Gemm -> QGemm, MatMul -> QLinearMatMul, Add, Mul, Concat, AveragePool,
  GlobalAveragePool, LeakyRelu, Sigmoid, Softmax -> QLinear*; QLinearSoftmax can be dozens of
  steps off where the output's scale is smaller than 1 / 256 (rows of nearly equal scores), so it has that one;
- moved as integers ("drop QDQ"), provided that both sides have one scale;
- the rest runs in float between its DequantizeLinear and QuantizeLinear: the reference's arithmetic itself, so it
  makes no difference to the numbers, and the layers around it keep their integer kernels, which need a QuantizeLinear
  behind them.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.types import FixedOutput, OperatorRule, QuantRules

MOVED = (
    "Expand", "Flatten", "Gather", "GatherElements", "Identity", "MaxPool", "ReduceMax", "ReduceMin", "Reshape",
    "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
INTEGER = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax")
BETWEEN = (
    "Clip", "DepthToSpace", "Elu", "Gelu", "HardSigmoid", "HardSwish", "PRelu", "Pad", "ReduceMean", "Relu",
    "Resize", "SpaceToDepth", "Sub", "Tanh",
)  # fmt: skip


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _gemm(node: ir.Node) -> str | None:
    if _number(node, "transA", 0):
        return "QGemm does not transpose its first input (transA = 1); accepted: transA = 0"
    if len(node.inputs) > 2 and node.inputs[2] is not None and _number(node, "beta", 1.0) != 1.0:
        return f"QGemm adds its bias unscaled (beta = {_number(node, 'beta', 1.0)}); accepted: beta = 1"
    if _number(node, "alpha", 1.0) != 1.0:
        return f"the bias' scale is s_x * s_w (alpha = {_number(node, 'alpha', 1.0)}); accepted: alpha = 1"
    return None


def _max_pool(node: ir.Node) -> str | None:
    if len(node.outputs) > 1 and node.outputs[1].name:
        return "MaxPool with indices is not moved as integers; accepted: one output"
    return None


def _rules() -> QuantRules:
    operators = {name: OperatorRule(name) for name in (*INTEGER, *BETWEEN, "Conv", "MatMul")}
    operators |= {name: OperatorRule(name, shares_scale=True) for name in MOVED}
    operators["Softmax"] = OperatorRule("Softmax", fixed_output=FixedOutput(1 / 256, -128))
    operators["Gemm"] = OperatorRule("Gemm", check=_gemm)
    operators["MaxPool"] = OperatorRule("MaxPool", shares_scale=True, check=_max_pool)
    return QuantRules("onnxruntime", operators)


RULES = _rules()
