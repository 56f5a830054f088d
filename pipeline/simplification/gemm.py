"""Returns rules that write every fully connected layer in one way: Gemm(x, W, b) = x W^T + b with W of shape (out, in).

MatMul(x, B) with constant B of rank 2 and x of rank 2 is Gemm(x, B^T, transB=1); an Add after it is folded by
affine.py. Gemm(alpha, beta): alpha*(x W^T) + beta*b = x (alpha W)^T + (beta b). For x of higher rank MatMul stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import constant, input_at, new_constant, producer, rank
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse


class MatMulToGemm(Rule):
    """`MatMul(x, B)` of rank 2 with constant B becomes `Gemm`."""

    def __init__(self) -> None:
        super().__init__("MatMul made a Gemm")

    def pattern(self, op: Builder, x: ir.Value, weight: ir.Value) -> Any:
        """What is looked for."""
        return op.MatMul(x, weight, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, weight: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        values = constant(weight)
        if rank(x) != 2 or values is None or values.ndim != 2:
            return refuse(f"{outer.name}: needs rank 2 and a constant second operand")
        if not np.issubdtype(values.dtype, np.floating):
            return refuse(f"{outer.name}: {values.dtype} operands")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, weight: ir.Value, outer: ir.Value) -> Any:
        """The Gemm."""
        node, values = producer(outer), constant(weight)
        if values is None:
            raise ValueError(f"{weight.name} was not checked")
        turned = new_constant(op, node, f"{outer.name}_weight", values.T, weight)
        return op.Gemm(x, turned, transB=1, _name=node.name)


class PlainGemm(Rule):
    """`Gemm` with constant weight and bias gets alpha = beta = 1, transB = 1 and a bias of shape (out,)."""

    def __init__(self) -> None:
        super().__init__("Gemm written with alpha = beta = 1 and transB = 1")

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return op.Gemm(x, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        node = producer(outer)
        weight, bias = constant(input_at(node, 1)), constant(input_at(node, 2))
        attributes = node.attributes
        if weight is None or not np.issubdtype(weight.dtype, np.floating):
            return refuse(f"{outer.name}: the weight is not a floating-point constant")
        channels = weight.shape[0 if attributes.get_int("transB", 0) else 1]
        beta = attributes.get_float("beta", 1.0)
        if input_at(node, 2) is None:
            plain_bias = True
        elif bias is None:
            if beta != 1.0:
                return refuse(f"{outer.name}: beta is {beta} and the third operand is not constant")
            plain_bias = True
        elif bias.size not in (1, channels) or any(size != 1 for size in bias.shape[:-1]):
            return refuse(f"{outer.name}: the third operand has the shape {bias.shape}")
        else:
            plain_bias = beta == 1.0 and bias.shape == (channels,)
        if plain_bias and attributes.get_int("transB", 0) == 1 and attributes.get_float("alpha", 1.0) == 1.0:
            return refuse(f"{outer.name}: is plain already")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The plain Gemm."""
        node = producer(outer)
        attributes = node.attributes
        weight_value, bias_value = input_at(node, 1), input_at(node, 2)
        weight, bias = constant(weight_value), constant(bias_value)
        if weight is None:
            raise ValueError(f"{outer.name} was not checked")
        turned = weight if attributes.get_int("transB", 0) else weight.T
        scaled = (turned.astype(np.float64) * attributes.get_float("alpha", 1.0)).astype(weight.dtype)
        inputs: list[ir.Value | None] = [x, new_constant(op, node, f"{outer.name}_weight", scaled, weight_value)]
        if bias is not None:
            plain = bias.astype(np.float64).reshape(-1) * attributes.get_float("beta", 1.0)
            plain = np.broadcast_to(plain, (turned.shape[0],)).astype(weight.dtype)
            inputs.append(new_constant(op, node, f"{outer.name}_bias", plain, bias_value))
        elif bias_value is not None:
            inputs.append(bias_value)
        extra = {"transA": 1} if attributes.get_int("transA", 0) == 1 else {}
        return op.Gemm(*inputs, transB=1, **extra, _name=node.name)


def gemm_rules() -> list[RewriteRule]:
    """The rules of this file."""
    return [MatMulToGemm.make(), PlainGemm.make()]
