"""Activations and other functions of one tensor.

int8: LOGISTIC, TANH, EXP, ELU, GELU and SOFTMAX go through tables or fixed point of 16 bits and more and land within
one step of the QDQ reference; HARD_SWISH computes in 16 bits and is within two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgeship.calibration.types import FixedOutput
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.fusion import activation_of, clip_range
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import NATURAL, POINTWISE, ByNode, LastAxis
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.elementwise import binary, narrow_broadcast, of_types

UNIT = FixedOutput(1 / 256, -128)
SIGNED_UNIT = FixedOutput(1 / 128, 0)
LOG_PROBABILITY = FixedOutput(16 / 256, 127)
REAL = (of_types("float32"),)


def unary(name: str) -> Callable[[Emit], None]:
    """A `convert` that writes TFLite operator `name` on one tensor."""

    def convert(emit: Emit) -> None:
        emit.operator(name, [emit.input()], emit.output())

    return convert


def convert_clip(emit: Emit) -> None:
    """Writes a Relu or Clip: TFLite's own where the interval has one, else MAXIMUM and MINIMUM with constants."""
    activation = activation_of(emit.node)
    if activation:
        emit.operator(activation, [emit.input()], emit.output())
        return
    low, high = clip_range(emit.node)
    x, y = emit.input(), emit.output()
    bounds = [(name, bound) for name, bound in (("MAXIMUM", low), ("MINIMUM", high)) if np.isfinite(bound)]
    if not bounds:
        emit.writer.reshape(x, y.shape, y.signature, y)
    for count, (name, bound) in enumerate(bounds, 1):
        target = y if count == len(bounds) else emit.temporary(y.shape, y, "clipped")
        limit = (
            emit.real(name.lower(), bound, x)
            if x.dtype.kind == "f" or x.quant
            else emit.constant("limit", np.array(bound, x.dtype))
        )
        emit.operator(name, [x, limit], target)
        x = target


def convert_leaky_relu(emit: Emit) -> None:
    """Writes a LeakyRelu."""
    emit.operator("LEAKY_RELU", [emit.input()], emit.output(), alpha=float(emit.node.attribute("alpha", 0.01)))


def convert_hard_sigmoid(emit: Emit) -> None:
    """Writes max(0, min(1, alpha x + beta)): one sixth of RELU6(x + 3) for the usual constants."""
    alpha, beta = float(emit.node.attribute("alpha", 0.2)), float(emit.node.attribute("beta", 0.5))
    x, y = emit.input(), emit.output()
    _hard_sigmoid(emit, x, y, alpha, beta)


def _hard_sigmoid(emit: Emit, x: Operand, y: Operand, alpha: float, beta: float) -> None:
    shifted = emit.temporary(y.shape, y, "shifted")
    if np.isclose(alpha, 1 / 6) and np.isclose(beta, 0.5):
        emit.operator("ADD", [x, emit.real("three", 3, x)], shifted, fused_activation_function="RELU6")
        emit.operator("MUL", [shifted, emit.real("sixth", 1 / 6, x)], y)
        return
    scaled = emit.temporary(y.shape, y, "scaled")
    emit.operator("MUL", [x, emit.real("alpha", alpha, x)], scaled)
    emit.operator("ADD", [scaled, emit.real("beta", beta, x)], shifted, fused_activation_function="RELU")
    emit.operator("MINIMUM", [shifted, emit.real("one", 1, x)], y)


def convert_gelu(emit: Emit) -> None:
    """Writes a Gelu."""
    emit.operator(
        "GELU", [emit.input()], emit.output(), approximate=emit.node.attribute("approximate", "none") == "tanh"
    )


def hard_swish_scales(node: Node) -> str | None:
    """A HardSwish's input scale is less than 128 output scales: its kernel shifts right only."""
    x, y = node.x.quant, node.y.quant
    if x is None or y is None or float(x.scale) < 128 * float(y.scale):
        return None
    return f"its scales are {float(x.scale):.3g} and {float(y.scale):.3g}; accepted: a ratio under 128"


def unit_alpha(node: Node) -> str | None:
    """alpha is 1."""
    alpha = node.attribute("alpha", 1.0)
    return None if alpha == 1.0 else f"its alpha is {alpha}; accepted: 1"


def softmax(name: str, **options: float) -> Callable[[Emit], None]:
    """A `convert` for Softmax or LogSoftmax along the last axis in memory."""

    def convert(emit: Emit) -> None:
        node, x, y = emit.node, emit.input(), emit.output()
        axis = _axis(node)
        if not _coerces(node):
            emit.operator(name, [x], y, **options)
            return
        rows = (int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))
        signature = (-1 if x.is_dynamic else rows[0], rows[1])
        flat = emit.writer.reshape(x, rows, signature)
        result = emit.temporary(rows, y, "rows", signature=signature)
        emit.operator(name, [flat], result, **options)
        emit.writer.reshape(result, y.shape, y.signature, y)

    return convert


def _axis(node: Node) -> int:
    """The axis; before opset 13 everything from the axis on counts as one, which matters only where that is more than
    one.
    """
    return node.axis(1 if node.opset < 13 else -1)


def _coerces(node: Node) -> bool:
    return node.opset < 13 and int(np.prod(node.x.shape[_axis(node) + 1 :])) != 1


_LAST = LastAxis(_axis)
_SOFTMAX_LAYOUT = ByNode(lambda node: NATURAL if _coerces(node) else _LAST)
_FLOAT_ONLY: Mapping[str, str] = {
    "Abs": "ABS",
    "Ceil": "CEIL",
    "Cos": "COS",
    "Floor": "FLOOR",
    "Log": "LOG",
    "Neg": "NEG",
    "Round": "ROUND",
    "Sin": "SIN",
    "Sqrt": "SQRT",
}

OPS = (
    Op("Relu", convert_clip, POINTWISE, Int8(), REAL),
    Op(
        "Clip",
        convert_clip,
        POINTWISE,
        Int8(shares_scale=True, real_inputs=frozenset({1, 2})),
        (of_types("float32", "int32", "int64"),),
    ),
    Op("Sigmoid", unary("LOGISTIC"), POINTWISE, Int8(fixed_output=UNIT), REAL),
    Op("Tanh", unary("TANH"), POINTWISE, Int8(fixed_output=SIGNED_UNIT), REAL),
    Op("HardSwish", unary("HARD_SWISH"), POINTWISE, Int8(limits=(hard_swish_scales,)), REAL),
    Op("HardSigmoid", convert_hard_sigmoid, POINTWISE, None, REAL),
    Op("LeakyRelu", convert_leaky_relu, POINTWISE, Int8(), REAL),
    Op("PRelu", binary("PRELU", fuses=False), POINTWISE, None, (*REAL, narrow_broadcast)),
    Op("Elu", unary("ELU"), POINTWISE, Int8(), (*REAL, unit_alpha)),
    Op("Gelu", convert_gelu, POINTWISE, Int8(), REAL, since=20),
    Op("Exp", unary("EXP"), POINTWISE, Int8(), REAL),
    *(Op(onnx, unary(name), POINTWISE, None, REAL) for onnx, name in _FLOAT_ONLY.items()),
    Op("Softmax", softmax("SOFTMAX", beta=1.0), _SOFTMAX_LAYOUT, Int8(fixed_output=UNIT), REAL),
    Op("LogSoftmax", softmax("LOG_SOFTMAX"), _SOFTMAX_LAYOUT, Int8(fixed_output=LOG_PROBABILITY), REAL),
)
