"""Everything known of one ONNX operator in TFLite, in one place: how to write it, on what layouts, and its int8
kernel's rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeship.calibration.types import FixedOutput, QuantParams
from edgeship.targets.tflite.emit import Emit
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_plan import LayoutRule
from edgeship.targets.tflite.layout_rules import NATURAL

Limit = Callable[[Node], str | None]
"""Why a node is beyond the operator, or None; its docstring is the manual's line."""


@dataclass(frozen=True)
class Int16:
    """What a kernel demands of 16-bit activations beyond what it demands of 8-bit ones.

    `fixed_output`: its own output parameters. `weights`: the constant inputs that have 8 bits all the same. `limits`:
    nodes it cannot take.
    """

    fixed_output: FixedOutput | None = None
    weights: frozenset[int] = frozenset()
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Int8:
    """What the int8 kernel demands.

    `shares_scale`: in and out have one scale. `rescales`: nodes whose in and out need not have one after all. `moves`:
    it only moves or selects integers, so quantizing before or after it is the same. `fixed_output`: the kernel's own
    output parameters. `real_inputs`: constant inputs that need no scale of their own. `symmetric`: computed inputs for
    which XNNPACK has a kernel only with zero point 0. `limits`: nodes it cannot take, which then run in float.
    `misses`: how many of its 256 inputs the kernel may round to another integer than the function. `real_is_faster`:
    nodes that LiteRT computes in a fraction of the time in real numbers, since XNNPACK has no kernel for their
    integers. `wide`: what the kernel demands where activations have 16 bits with zero point 0 (16x8); None: it takes
    8 bits only.
    """

    shares_scale: bool = False
    moves: bool = False
    fixed_output: FixedOutput | None = None
    real_inputs: frozenset[int] = frozenset()
    symmetric: frozenset[int] = frozenset()
    limits: tuple[Limit, ...] = ()
    wide: Int16 | None = None
    misses: Callable[[Node, QuantParams, QuantParams], int] | None = None
    rescales: Callable[[Node], bool] | None = None
    real_is_faster: bool | Callable[[Node], bool] = False

    def is_slow(self, node: Node) -> bool:
        """Whether the node takes a fraction of the time in real numbers."""
        return self.real_is_faster if isinstance(self.real_is_faster, bool) else self.real_is_faster(node)

    def ties(self, node: Node) -> bool:
        """Whether the node's kernel needs one scale for in and out."""
        return self.shares_scale and not (self.rescales is not None and self.rescales(node))


@dataclass(frozen=True)
class Op:
    """One ONNX operator: `convert` writes a node of it, `layout` says on which memory orders it works.

    `int8` None: float only. `hybrid`: what else the kernel demands that takes int8 weights and float activations; None:
    there is none. `limits`: nodes that cannot be expressed at all. `since`: the oldest opset whose meaning is
    known. `fuses`: whether a following Relu or Clip can be written into a node of it. `reads_integers`: nodes in float
    that take the integers of their first input, of 8 bits, as they are.
    """

    onnx: str
    convert: Callable[[Emit], None]
    layout: LayoutRule = NATURAL
    int8: Int8 | None = None
    limits: tuple[Limit, ...] = ()
    since: int = 7
    hybrid: tuple[Limit, ...] | None = None
    fuses: bool | Callable[[Node], bool] = False
    reads_integers: Callable[[Node], bool] | None = None

    def takes_activation(self, node: Node) -> bool:
        """Whether a Relu or Clip that follows `node` can be written into it."""
        return self.fuses if isinstance(self.fuses, bool) else self.fuses(node)

    def refusal(self, node: Node) -> str | None:
        """Why `node` cannot be converted at all, or None."""
        if node.opset < self.since:
            return f"opset {node.opset} defines it differently; opset {self.since} or newer is known"
        return _first(self.limits, node)

    def int8_refusal(self, node: Node) -> str | None:
        """Why `node` cannot run in int8, or None."""
        if self.int8 is None:
            return f"TFLite has no int8 kernel for {self.onnx}"
        return _first((*self.limits, *self.int8.limits), node)

    def int16_refusal(self, node: Node) -> str | None:
        """Why `node` cannot run on 16-bit activations, or None."""
        if self.int8 is None or self.int8.wide is None:
            return f"TFLite has no kernel with 16-bit activations for {self.onnx}"
        return self.int8_refusal(node) or _first(self.int8.wide.limits, node)


def _first(limits: tuple[Limit, ...], node: Node) -> str | None:
    return next((reason for limit in limits if (reason := limit(node))), None)


MOVES = Int8(shares_scale=True, moves=True, wide=Int16())
"""The rule of operators that only carry integers from one place to another."""
