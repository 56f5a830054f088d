"""One policy for the element types that a kernel lacks: the node computes in the next type that holds every value, and
CASTs stand where values come in and go out.

float16, bfloat16 and float64 are computed in float32: a chain of such nodes keeps its float32 values, so the CASTs end
up at the model's own inputs and outputs, which keep their types. Integers go to the next wider type that the kernel
takes and come back modulo 2^n, as ONNX's arithmetic wraps. uint64 has no wider type: the operators that work on bits
and sums alone name it among their types and see int64 of the same bits; those that order (`SHIFTED`) see values that
are 2^63 less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx

from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE, Graph, Node, Tensor, constant

STORED = (
    "float32", "float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool",
)  # fmt: skip
"""What TFLite can store and CAST (uint64: BITCAST) brings to another type."""
USUAL = ("float32", "int8", "uint8", "int16", "int32", "int64", "bool")
"""What operators that say nothing of types are given."""
SHIFTED = "uint64 as int64"
"""Among the types of an operator that orders values: uint64 is computed 2^63 lower."""
_TOP = np.uint64(1 << 63)
_WIDER = {
    "float16": ("float32",),
    "float64": ("float32",),
    "bool": ("uint8", "int8", "int32", "int64", "float32"),
    "int8": ("int16", "int32", "int64", "float32"),
    "uint8": ("int16", "int32", "int64", "float32"),
    "int16": ("int32", "int64", "float32"),
    "uint16": ("int32", "uint32", "int64", "float32"),
    "int32": ("int64",),
    "uint32": ("int64",),
}


@dataclass(frozen=True)
class Types:
    """A limit: the operands of ONNX's type variable `variable` (the first input's by default) are of types that the
    kernel takes, or come to one of them by the policy.
    """

    accepted: tuple[str, ...]
    variable: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", f"Operands are {', '.join(self.accepted)}, or fit one of these.")

    def __call__(self, node: Node) -> str | None:
        """Why the node's operands fit none of the types, or None."""
        for tensor, variable in _typed(node):
            if variable == self._of(node) and computed_in(tensor, self.accepted) is None:
                return f"its operands are {tensor.dtype}; accepted: {', '.join(self.accepted)}"
        return None

    def _of(self, node: Node) -> str:
        return self.variable or next((variable for _, variable in _typed(node)), "")


def of_types(*accepted: str, variable: str = "") -> Types:
    """A limit: the operands are of the `accepted` types, or fit one of them."""
    return Types(accepted, variable)


LimitsOf = Callable[[Node], tuple[Any, ...] | None]
"""A node's limits, None for an operator that is not known."""


def computed_in(tensor: Tensor, accepted: tuple[str, ...]) -> str | None:
    """The type that stands for the tensor's in a kernel that takes `accepted`; None when there is none."""
    name = tensor.dtype.name
    if name == "uint64":
        return "int64" if "int64" in accepted and (name in accepted or SHIFTED in accepted) else None
    if name in accepted or tensor.quant is not None:
        return name
    return next((wider for wider in _WIDER.get(name, ()) if wider in accepted), None)


def refusal(node: Node, limits: tuple[Any, ...]) -> str | None:
    """Why an operand's type cannot be computed on, or None; operands that a `Types` speaks of are left to it."""
    spoken = accepted_types(node, limits)
    for tensor, variable in _typed(node):
        accepted = spoken.get(variable, USUAL)
        if tensor.dtype.name not in STORED or computed_in(tensor, accepted) is None:
            return f"it works on {tensor.dtype}; accepted: {', '.join(accepted)}"
    return None


def accepted_types(node: Node, limits: tuple[Any, ...]) -> dict[str, tuple[str, ...]]:
    """ONNX's type variable -> what the kernel takes for it."""
    return {limit._of(node): limit.accepted for limit in limits if isinstance(limit, Types)}


def settle_types(graph: Graph, limits_of: LimitsOf) -> None:
    """Lets every node work on types that its kernel takes, with CASTs where these are not the model's."""
    settling = _Settling(graph)
    for node in graph.nodes:
        limits = limits_of(node)
        if limits is not None and all(tensor.known for tensor in node.tensors()):
            settling.settle(node, accepted_types(node, limits))
        else:
            settling.nodes.append(node)
    graph.nodes = settling.nodes
    graph.prune()


class _Settling:
    """The nodes so far, with what has been cast already."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.versions: dict[tuple[Tensor, str], Tensor] = {}

    def settle(self, node: Node, accepted: dict[str, tuple[str, ...]]) -> None:
        """Adds the node, its operands cast where they have to be."""
        ins, outs = _variables(node)
        for index, tensor in enumerate(node.inputs):
            wanted = None if tensor is None else _other_type(tensor, accepted.get(ins[index], USUAL))
            if tensor is not None and wanted is not None:
                node.inputs[index] = self._version(tensor, wanted, node.opset)
                node.unsigned |= tensor.dtype == np.uint64 and wanted != SHIFTED
        self.nodes.append(node)
        for index, tensor in enumerate(node.outputs):
            wanted = _other_type(tensor, accepted.get(outs[index], USUAL))
            if wanted is not None:
                node.outputs[index] = self._returned(tensor, wanted, node.opset)

    def _version(self, tensor: Tensor, wanted: str, opset: int) -> Tensor:
        key = (tensor, wanted)
        if key not in self.versions:
            if tensor.data is not None:
                data = tensor.data ^ _TOP if wanted == SHIFTED else tensor.data
                self.versions[key] = constant(tensor.name, data.astype(_dtype(wanted)))
            else:
                self.versions[key] = self._cast(tensor, _like(tensor, wanted), opset, shifted=wanted == SHIFTED)
        return self.versions[key]

    def _returned(self, tensor: Tensor, wanted: str, opset: int) -> Tensor:
        """The tensor the node writes in place of `tensor`; readers that compute in floats take it as it is."""
        made = _like(tensor, wanted)
        self._cast(made, tensor, opset, shifted=wanted == SHIFTED)
        if tensor.is_float:
            self.versions[tensor, wanted] = made
        return made

    def _cast(self, source: Tensor, target: Tensor, opset: int, *, shifted: bool = False) -> Tensor:
        """`target`, cast from `source`; between uint64 and int64 the bits stay, but for the top one if `shifted`."""
        is_bits = "uint64" in (source.dtype.name, target.dtype.name)
        steps: list[tuple[str, list[Tensor]]] = [("BitCast" if is_bits else "Cast", [])]
        if shifted:
            lowest = constant("lowest", np.array(np.iinfo(np.int64).min))
            steps.insert(int(source.dtype == np.uint64), ("Add", [lowest]))
        for place, (op_type, rest) in enumerate(steps):
            is_last = place == len(steps) - 1
            made = target if is_last else _like(source, "int64")
            self.nodes.append(Node(op_type, target.name, [source, *rest], [made], opset=opset))
            source = made
        return target


def _other_type(tensor: Tensor, accepted: tuple[str, ...]) -> str | None:
    """What stands for the tensor's type in a kernel that takes `accepted`; None where nothing needs to."""
    wanted = computed_in(tensor, accepted)
    if wanted is None or (wanted == tensor.dtype.name):
        return None
    return SHIFTED if tensor.dtype == np.uint64 and SHIFTED in accepted else wanted


def _dtype(wanted: str) -> str:
    return "int64" if wanted == SHIFTED else wanted


def _like(tensor: Tensor, dtype: str) -> Tensor:
    return Tensor(f"{tensor.name}/{_dtype(dtype)}", tensor.shape, np.dtype(_dtype(dtype)), signature=tensor.signature)


def _typed(node: Node) -> Iterator[tuple[Tensor, str]]:
    """The node's tensors that are read or made, each with ONNX's type variable."""
    inputs, outputs = _variables(node)
    yield from ((t, variable) for t, variable in zip(node.inputs, inputs, strict=True) if t is not None)
    yield from zip(node.outputs, outputs, strict=True)


def _variables(node: Node) -> tuple[list[str], list[str]]:
    if node.op_type in (QUANTIZE, DEQUANTIZE):
        return [""] * len(node.inputs), [""] * len(node.outputs)
    ins, outs = _schema(node.op_type, node.opset)
    return _spread(ins, len(node.inputs)), _spread(outs, len(node.outputs))


def _spread(variables: tuple[str, ...], count: int) -> list[str]:
    """One variable for each operand: the last stands for all that follow."""
    return [variables[min(place, len(variables) - 1)] if variables else "" for place in range(count)]


@cache
def _schema(op_type: str, opset: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        schema = onnx.defs.get_schema(op_type, opset, "") if opset else onnx.defs.get_schema(op_type)
    except onnx.defs.SchemaError:
        return (), ()
    return tuple(i.type_str for i in schema.inputs), tuple(o.type_str for o in schema.outputs)
