"""Returns rules that write every change of shape as one Reshape, and remove operators that change nothing.

Flatten, Squeeze, Unsqueeze and Reshape keep the elements' order, so each is Reshape to the output's shape, with -1
for a dynamic batch, as is a Gather of all elements in order; Reshape(Reshape(x)) is the outer one. Dropout in
inference, Identity, Concat of one, Pad by nothing, Slice of everything, Expand to the same shape are x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule
from onnxscript.rewriter.rules.common import (
    no_op_cast_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
)

from edgeship.pipeline.simplification.graph import constant, dimensions, input_at, new_constant, producer
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

RESHAPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MAY_KEEP = ("Slice", "Expand", "Pad", "Reshape", "Tile")


def target_shape(value: ir.Value) -> list[int] | None:
    """The constant that Reshape needs for `value`: its sizes, -1 for the one that is dynamic; None for two or more."""
    sizes = dimensions(value)
    if sizes is None or sizes.count(None) > 1 or 0 in sizes:
        return None
    return [-1 if size is None else size for size in sizes]


class ToReshape(Rule):
    """Flatten, Squeeze, Unsqueeze and Reshape become `Reshape` to a constant shape."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"{operator} written as Reshape to a constant shape")
        self._operator = operator

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return getattr(op, self._operator)(x, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        shape = target_shape(outer)
        if shape is None:
            return refuse(f"{outer.name}: the shape is not known")
        if self._operator == "Reshape":
            given = constant(producer(outer).inputs[1])
            if given is not None and given.tolist() == shape and "allowzero" not in producer(outer).attributes:
                return refuse(f"{outer.name}: is plain already")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The Reshape."""
        node = producer(outer)
        shape = new_constant(op, node, f"{outer.name}_shape", np.array(target_shape(outer), np.int64))
        return op.Reshape(x, shape, _name=node.name)


class JoinReshapes(Rule):
    """`Reshape(Reshape(x), shape)` with a constant shape without zeros becomes `Reshape(x, shape)`."""

    def __init__(self) -> None:
        super().__init__("two Reshape joined")

    def pattern(self, op: Builder, x: ir.Value, first: ir.Value, shape: ir.Value) -> Any:
        """What is looked for."""
        return op.Reshape(op.Reshape(x, first), shape, _outputs=["outer"])

    def check(self, context: object, shape: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        values = constant(shape)
        if values is None or (values == 0).any():
            return refuse(f"{shape.name}: not constant, or it copies sizes of the value between")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, shape: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """One Reshape."""
        return op.Reshape(x, shape, _name=producer(outer).name)


class SameShape(Rule):
    """An operator that can only cut, repeat or pad, and whose output has the input's static shape, is the input."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"{operator} that changes nothing removed", remove_nodes=False)
        self._operator = operator

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return getattr(op, self._operator)(x, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        node = producer(outer)
        if x.shape is None or outer.shape is None or not _equal(x.shape, outer.shape):
            return refuse(f"{outer.name}: {x.shape} becomes {outer.shape}")
        if self._operator == "Slice" and not _steps_forward(node):
            return refuse(f"{outer.name}: it may reverse")
        if self._operator == "Pad" and not _pads_nothing(node):
            return refuse(f"{outer.name}: it may pad and crop")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The value itself."""
        return op.Identity(x)


def _equal(one: ir.Shape, other: ir.Shape) -> bool:
    """Whether two shapes are certainly the same; symbolic sizes are where they have the same name."""
    return len(one) == len(other) and all(
        a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one, other, strict=True)
    )


def _steps_forward(node: ir.Node) -> bool:
    steps = input_at(node, 4)
    values = constant(steps)
    return steps is None or (values is not None and bool((values == 1).all()))


def _pads_nothing(node: ir.Node) -> bool:
    amounts = constant(input_at(node, 1))
    return amounts is not None and not amounts.any()


class GatherAll(Rule):
    """A `Gather` of every element of an axis, in order, is a Reshape: torch writes `as_strided` so."""

    def __init__(self) -> None:
        super().__init__("Gather of everything written as Reshape")

    def pattern(self, op: Builder, x: ir.Value, indices: ir.Value) -> Any:
        """What is looked for."""
        return op.Gather(x, indices, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, indices: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        sizes, taken = dimensions(x), constant(indices)
        if not sizes or taken is None or target_shape(outer) is None:
            return refuse(f"{outer.name}: a shape or the indices are not known")
        count = sizes[producer(outer).attributes.get_int("axis", 0)]
        if count is None or taken.size != count or (taken.reshape(-1) != np.arange(count)).any():
            return refuse(f"{outer.name}: it does not take every element in order")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """The Reshape."""
        node = producer(outer)
        shape = new_constant(op, node, f"{outer.name}_shape", np.array(target_shape(outer), np.int64))
        return op.Reshape(x, shape, _name=node.name)


class Inference(Rule):
    """`Dropout` outside training, `Identity` and `Concat` of one value are the value."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"{operator} removed", remove_nodes=False)
        self._operator = operator

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return getattr(op, self._operator)(x, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        node = producer(outer)
        if self._operator == "Concat" and len(node.inputs) > 1:
            return refuse(f"{outer.name}: it joins {len(node.inputs)} values")
        training = input_at(node, 2)
        if self._operator == "Dropout" and training is not None:
            flag = constant(training)
            if flag is None or bool(flag.item()):
                return refuse(f"{outer.name}: it is in training mode")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The value itself."""
        return op.Identity(x)


def reshaping_rules() -> list[RewriteRule]:
    """The rules of this file, and those of onnxscript for Transpose and Cast."""
    foreign = (no_op_transpose_rule, transpose_transpose_rule, no_op_cast_rule)
    return [
        *(Inference.make(operator) for operator in ("Dropout", "Concat")),
        *foreign,
        *(SameShape.make(operator) for operator in _MAY_KEEP),
        *(ToReshape.make(operator) for operator in RESHAPING),
        GatherAll.make(),
        JoinReshapes.make(),
    ]
