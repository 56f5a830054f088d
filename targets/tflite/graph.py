"""The conversion graph: an ONNX model with its quantization absorbed into the tensors, before anything of TFLite is
known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeship.calibration.types import Array, Finding, QuantParams

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))
BITS, WIDE_BITS = 8, 16
QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"


class Unsupported(Exception):  # noqa: N818 - a verdict on one node, which the converter collects
    """Why a node cannot be expressed in TFLite: the value seen, and what would be accepted."""

    def __init__(self, rule: str, seen: str = "", accepted: str = "") -> None:
        super().__init__(rule)
        self.rule, self.seen, self.accepted = rule, seen, accepted


MALFORMED = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What code that reads valid models raises on others: an index out of range, a shape that does not fit."""


@contextmanager
def judged(where: str, findings: list[Finding]) -> Iterator[None]:
    """Adds to `findings` why the node at `where` cannot be expressed, or that it makes no sense."""
    try:
        yield
    except Unsupported as error:
        findings.append(Finding(where, error.rule, error.seen, error.accepted))
    except MALFORMED as error:
        findings.append(malformed(where, error))


def malformed(where: str, error: Exception) -> Finding:
    """What is said of a node, or a model, that makes no sense to the code that reads it."""
    text = (str(error).strip().splitlines() or [""])[0]
    return Finding(where, "is malformed, or beyond what is known", f"{type(error).__name__}: {text}", "valid ONNX")


@dataclass(eq=False)
class Tensor:
    """One value: `shape` and `dtype` as ONNX has them; `quant` says that it is stored as integers; `data` makes it a
    constant.

    `data` holds the integers when `quant` is set. `signature` is the shape with -1 where the dimension is dynamic
    (`shape` then holds the size that stands for it). `axis` of `quant.spec` counts ONNX axes. `known` is false for the
    result of a node that could not be read. `number`: what every element is of a tensor whose shape alone is computed.
    `is_position`: its integers count from the front of an axis. `model_shape`: the one that the model gives it, where
    it stands under another here.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    quant: QuantParams | None = None
    data: Array | None = None
    signature: tuple[int, ...] = ()
    known: bool = True
    number: float | None = None
    is_position: bool = False
    model_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.signature) != len(self.shape):
            self.signature = self.shape

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_constant(self) -> bool:
        """Whether the value is known at conversion time."""
        return self.data is not None

    @property
    def is_float(self) -> bool:
        """Whether the value is a real number, stored as such or quantized."""
        return self.dtype in FLOATS

    @property
    def is_dynamic(self) -> bool:
        """Whether a dimension is known only at run time."""
        return -1 in self.signature

    @property
    def storage(self) -> np.dtype[Any]:
        """The dtype of the numbers that are stored."""
        return self.quant.spec.dtype if self.quant else self.dtype

    def values(self) -> Array:
        """The constant's real values, dequantized where it is quantized. Raises Unsupported for a value that is
        computed.
        """
        if self.data is None:
            raise Unsupported("needs a constant", f"{self.name} is computed", "a constant")
        return self.quant.dequantize(self.data) if self.quant else self.data


@dataclass(eq=False)
class Node:
    """One ONNX operator: inputs (None where left out), outputs, attributes as Python and NumPy values.

    `int8`: runs in integers, of 8 bits or (`is_wide`) 16. `activation`: the fused one, as TFLite's schema names it.
    `unsigned`: its integers of 64 bits are those of numbers without a sign.
    """

    op_type: str
    name: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = ""
    opset: int = 0
    int8: bool = False
    activation: str = "NONE"
    unsigned: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether it runs in integers of 16 bits."""
        return self.int8 and any(t.quant is not None and t.quant.spec.bits == WIDE_BITS for t in self.outputs)

    @property
    def where(self) -> str:
        """What a message calls this node."""
        return f"{self.op_type} {self.name!r}"

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def tensor(self, index: int) -> Tensor:
        """Input `index`. Raises Unsupported when it was left out."""
        tensor = self.inputs[index] if index < len(self.inputs) else None
        if tensor is None:
            raise Unsupported(f"needs input {index}", "it is left out")
        return tensor

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.tensor(0)

    @property
    def y(self) -> Tensor:
        """The first output."""
        return self.outputs[0]

    def attribute(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or `default`."""
        return self.attributes.get(name, default)

    def parameter(self, name: str, index: int | None = None) -> Array | None:
        """What newer opsets give as constant input `index` and older ones as attribute `name`; None when neither is
        there.
        """
        if index is not None and self.has(index):
            tensor = self.tensor(index)
            if not tensor.is_constant:
                raise Unsupported(f"{name} must be known at conversion", f"{tensor.name} is computed", "a constant")
            return tensor.values()
        value = self.attributes.get(name)
        return None if value is None else np.asarray(value)

    def ints(self, name: str, index: int | None = None) -> list[int] | None:
        """`parameter` as a list of integers."""
        value = self.parameter(name, index)
        return None if value is None else [int(v) for v in np.atleast_1d(value)]

    def axis(self, default: int, rank: int | None = None) -> int:
        """Attribute `axis`, counted from the front."""
        axis = int(self.attribute("axis", default))
        return axis + (self.x.rank if rank is None else rank) if axis < 0 else axis

    def tensors(self) -> Iterator[Tensor]:
        """The inputs that are given."""
        return (tensor for tensor in self.inputs if tensor is not None)


@dataclass(frozen=True)
class Dimension:
    """A size that is known only at run time: the input and the axis where it can be read, and what stands for it."""

    input: str
    axis: int
    size: int


@dataclass(eq=False)
class Graph:
    """A model: nodes in execution order, inputs and outputs by their ONNX names in ONNX order.

    `integers`: the inputs and outputs whose integers the caller sees as such (the ONNX model's own are int8 or uint8).
    `has_halves`: the model has float16 constants. `dimensions`: the dynamic ones, each by its first place.
    """

    nodes: list[Node]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    integers: frozenset[str] = frozenset()
    has_halves: bool = False
    dimensions: tuple[Dimension, ...] = ()

    def consumers(self) -> dict[Tensor, list[Node]]:
        """Tensor -> the nodes that read it, once per reading."""
        uses: dict[Tensor, list[Node]] = {}
        for node in self.nodes:
            for tensor in node.tensors():
                uses.setdefault(tensor, []).append(node)
        return uses

    def producers(self) -> dict[Tensor, Node]:
        """Tensor -> the node that makes it."""
        return {tensor: node for node in self.nodes for tensor in node.outputs}

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Lets every reader of `old`, and the graph's outputs, read `new`."""
        for node in self.nodes:
            if old in node.inputs:
                node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
        for name, tensor in self.outputs.items():
            if tensor is old:
                self.outputs[name] = new

    def prune(self) -> None:
        """Drops the nodes whose outputs nobody reads."""
        needed = set(self.outputs.values())
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(tensor in needed for tensor in node.outputs):
                kept.append(node)
                needed.update(node.tensors())
        self.nodes = kept[::-1]


def constant(name: str, data: Array, quant: QuantParams | None = None, dtype: np.dtype[Any] | None = None) -> Tensor:
    """A constant tensor; `dtype` is the real value's when `data` are integers that `quant` explains."""
    real = dtype or (np.dtype(np.float32) if quant else data.dtype)
    return Tensor(name, tuple(data.shape), real, quant, data)


def unsigned(tensor: Tensor, name: str) -> Tensor:
    """The same values in uint8: integers and zero point 128 higher."""
    quant = tensor.quant
    if quant is None:
        raise Unsupported("is not quantized", tensor.name, "an int8 tensor")
    shifted = QuantParams(quant.scale, quant.zero_point + 128, replace(quant.spec, signed=False))
    return Tensor(name, tensor.shape, tensor.dtype, shifted, signature=tensor.signature)
