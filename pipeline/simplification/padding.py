"""Returns rules that move padding into the operator after it, and write automatic padding out.

Conv(Pad0(x), p) = Conv(x, p + q): zero is what Conv pads with.
AveragePool(Pad0(x)) = AveragePool(x, q, count_include_pad=1): the zeros count, as they did.
MaxPool(Pad_c(x)) = MaxPool(x, q) where c <= every x: c = -inf or the least number; c = 0 after Relu or a Clip from 0 or
more. Every window must still hold a value of x, which ONNX demands of its pads anyway (pad < kernel).
auto_pad SAME: the total padding is max(0, (ceil(in / stride) - 1) * stride + dilation * (kernel - 1) + 1 - in), its
larger half at the end (SAME_UPPER) or the beginning (SAME_LOWER).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.clip import interval
from edgeship.pipeline.simplification.graph import constant, input_at, keep_attributes, producer, rank, spatial
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

_LEAST = float(np.finfo(np.float32).min)
_KEEPS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Slice", "Identity")


def padding(node: ir.Node, data_rank: int) -> tuple[list[int], float] | str:
    """The spatial pads (begins, then ends) and the value of a constant `Pad` node, or why it pads otherwise."""
    name = f"{node.name} (Pad)"
    if node.attributes.get_string("mode", "constant") != "constant":
        return f"{name}: the mode is {node.attributes.get_string('mode')}"
    amounts, axes_value = constant(input_at(node, 1)), input_at(node, 3)
    value = 0.0
    if input_at(node, 2) is not None:
        fill = constant(input_at(node, 2))
        if fill is None:
            return f"{name}: the value is not constant"
        value = float(fill.item())
    if amounts is None or (axes_value is not None and constant(axes_value) is None):
        return f"{name}: pads or axes are not constant"
    axes = constant(axes_value)
    places = list(range(data_rank)) if axes is None else [int(axis) % data_rank for axis in axes]
    begins, ends = [0] * data_rank, [0] * data_rank
    for place, axis in enumerate(places):
        begins[axis], ends[axis] = int(amounts[place]), int(amounts[place + len(places)])
    if any(begins[:2] + ends[:2]):
        return f"{name}: it pads the batch or the channels"
    if any(amount < 0 for amount in begins + ends):
        return f"{name}: it crops"
    return begins[2:] + ends[2:], value


class _FoldPad(Rule):
    operator: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(f"Pad folded into {self.operator}")

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        inner = op.Pad(x, _allow_other_inputs=True, _outputs=["inner"])
        return getattr(op, self.operator)(inner, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, inner: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        data_rank, node = rank(x), producer(outer)
        if data_rank is None or data_rank < 3:
            return refuse(f"{x.name}: the rank is not known, or there is no map to pad")
        found = padding(producer(inner), data_rank)
        if isinstance(found, str):
            return refuse(found)
        if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return refuse(f"{outer.name}: auto_pad is set")
        reason = self.refusal(node, x, *found)
        return refuse(reason) if reason else MatchResult()

    def refusal(self, node: ir.Node, x: ir.Value, pads: list[int], value: float) -> str | None:
        """Why the fold would not be exact."""
        raise NotImplementedError

    def extra(self) -> dict[str, int]:
        """Attributes that the padded operator needs besides its pads."""
        return {}

    def rewrite(self, op: Builder, x: ir.Value, inner: ir.Value, outer: ir.Value) -> Any:
        """The operator with more padding."""
        node, data_rank = producer(outer), rank(x) or 0
        found = padding(producer(inner), data_rank)
        if isinstance(found, str):
            raise TypeError(found)
        own = node.attributes.get_ints("pads", [0] * len(found[0]))
        total = [int(a) + b for a, b in zip(own, found[0], strict=True)]
        attributes = {**keep_attributes(node, "pads", "auto_pad"), **self.extra()}
        return op.op(self.operator, x, *node.inputs[1:], pads=total, _name=node.name, **attributes)


def _pool_refusal(node: ir.Node, pads: list[int]) -> str | None:
    """Why a pool cannot take `pads` more: ONNX allows less than the window, and ceil_mode counts windows anew."""
    kernel = node.attributes.get_ints("kernel_shape", [])
    own = node.attributes.get_ints("pads", [0] * len(pads))
    if any(a + b >= size for a, b, size in zip(own, pads, [*kernel, *kernel], strict=False)):
        return f"{node.name} ({node.op_type}): the padding reaches the window's size {list(kernel)}"
    if node.attributes.get_int("ceil_mode", 0):
        return f"{node.name} ({node.op_type}): ceil_mode is set"
    return None


class PadIntoConv(_FoldPad):
    """`Conv(Pad(x))` becomes `Conv(x)` with pads."""

    operator: ClassVar[str] = "Conv"

    def refusal(self, node: ir.Node, x: ir.Value, pads: list[int], value: float) -> str | None:
        """Conv pads with zeros."""
        return None if value == 0.0 else f"{node.name} (Conv): the padding's value is {value}, not 0"


class PadIntoMaxPool(_FoldPad):
    """`MaxPool(Pad(x))` becomes `MaxPool(x)` with pads, where the padding is never the largest."""

    operator: ClassVar[str] = "MaxPool"

    def refusal(self, node: ir.Node, x: ir.Value, pads: list[int], value: float) -> str | None:
        """The padding must be no larger than any value of x."""
        if value > _LEAST and not (value <= 0.0 and is_never_negative(x)):
            return f"{node.name} (MaxPool): {x.name} may be less than the padding, {value}"
        return _pool_refusal(node, pads)


class PadIntoAveragePool(_FoldPad):
    """`AveragePool(Pad(x))` becomes `AveragePool(x)` with pads that count."""

    operator: ClassVar[str] = "AveragePool"

    def refusal(self, node: ir.Node, x: ir.Value, pads: list[int], value: float) -> str | None:
        """The padding must be zeros, and the pool's own padding must count too."""
        if value != 0.0:
            return f"{node.name} (AveragePool): the padding's value is {value}, not 0"
        if any(node.attributes.get_ints("pads", [])) and not node.attributes.get_int("count_include_pad", 0):
            return f"{node.name} (AveragePool): its own padding does not count"
        return _pool_refusal(node, pads)

    def extra(self) -> dict[str, int]:
        """The zeros count."""
        return {"count_include_pad": 1}


def is_never_negative(value: ir.Value, depth: int = 8) -> bool:
    """Whether the graph proves that no element is below zero."""
    node = value.producer()
    if node is None or depth == 0:
        return False
    if node.op_type in _KEEPS_SIGN and node.inputs[0] is not None:
        return is_never_negative(node.inputs[0], depth - 1)
    if node.op_type in ("Concat", "Add", "Mul"):
        return all(each is not None and is_never_negative(each, depth - 1) for each in node.inputs)
    if node.op_type in ("Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs"):
        return True
    bounds = interval(node)
    return bounds is not None and bounds[0] >= 0.0


class ExplicitPads(Rule):
    """`auto_pad` of Conv, MaxPool and AveragePool becomes `pads`."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"auto_pad of {operator} written as pads")
        self._operator = operator

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return getattr(op, self._operator)(x, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        if producer(outer).attributes.get_string("auto_pad", "NOTSET") == "NOTSET" or len(producer(outer).outputs) > 1:
            return refuse(f"{outer.name}: no auto_pad")
        if _pads_of(producer(outer), x) is None:
            return refuse(f"{outer.name}: height and width are not known")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The operator with explicit pads."""
        node = producer(outer)
        attributes = keep_attributes(node, "auto_pad", "pads")
        return op.op(self._operator, *node.inputs, pads=_pads_of(node, x), _name=node.name, **attributes)


def _pads_of(node: ir.Node, x: ir.Value) -> list[int] | None:
    attributes = node.attributes
    mode = attributes.get_string("auto_pad", "NOTSET")
    weight, size = input_at(node, 1), spatial(x)
    kernel = list(attributes.get_ints("kernel_shape", []))
    if not kernel and weight is not None and weight.shape is not None:
        kernel = [int(each) for each in list(weight.shape)[2:] if isinstance(each, int)]
    if mode == "VALID":
        return [0] * 2 * len(kernel)
    if size is None or len(kernel) != 2:
        return None
    strides, dilations = attributes.get_ints("strides", [1, 1]), attributes.get_ints("dilations", [1, 1])
    totals = [
        max(0, (-(-length // stride) - 1) * stride + dilation * (window - 1) + 1 - length)
        for length, window, stride, dilation in zip(size, kernel, strides, dilations, strict=True)
    ]
    less = [total // 2 for total in totals]
    more = [total - half for total, half in zip(totals, less, strict=True)]
    return less + more if mode == "SAME_UPPER" else more + less


def padding_rules() -> list[RewriteRule]:
    """The rules of this file."""
    explicit = [ExplicitPads.make(operator) for operator in ("Conv", "MaxPool", "AveragePool")]
    return [*explicit, PadIntoConv.make(), PadIntoMaxPool.make(), PadIntoAveragePool.make()]
