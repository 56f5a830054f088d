"""ONNX to the conversion graph: shapes made known, constants folded, QuantizeLinear/DequantizeLinear absorbed into
tensors.

`value -> QuantizeLinear -> DequantizeLinear` becomes one integer tensor that carries its scale; an integer constant
through DequantizeLinear becomes an integer constant. What remains of the two operators stands where a tensor really
changes its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import NoReturn

import numpy as np
import onnx
import onnx_ir as ir

from edgeship.calibration.types import Array, Finding, QuantParams
from edgeship.targets.tflite.affine import INTEGERS, integer_type, is_shifted, quant_params
from edgeship.targets.tflite.carried import makes_positions, number_of
from edgeship.targets.tflite.expansion import Expand, Expander, Scope
from edgeship.targets.tflite.fusion import absorb_quantizers
from edgeship.targets.tflite.graph import (
    DEQUANTIZE,
    QUANTIZE,
    WIDE_BITS,
    Dimension,
    Graph,
    Node,
    Tensor,
    Unsupported,
    constant,
    judged,
    unsigned,
)
from edgeship.targets.tflite.inference import (
    constant_value,
    declared_shape,
    evaluate,
    is_element_type,
    may_be_folded,
    rounds_up,
    types_of,
)
from edgeship.targets.tflite.single import attributes_of

STANDARD_DOMAINS = ("", "ai.onnx")
LARGEST_FOLDED = 1 << 24
"""Elements; a larger constant is not computed at conversion time (it would grow the file beyond its weights)."""
LARGEST_SIZE = 2**31
SIZED_AT_RUN_TIME = frozenset({"ConstantOfShape", "Expand", "Tile"})
"""Operators that repeat a constant as often as a dynamic dimension says."""
NEWEST_OPSET = onnx.defs.onnx_opset_version()
STAND_INS = ((1, 224), (2, 735), (2, 736))
"""What stands for dynamic dimensions: (batch, any other). The model is read under the first pair, and, to see what
depends on them, under another: an odd one, or, for models that need multiples of 32, one that is. Each further name of
a dimension stands for 32 more.
"""


def lower(model: ir.Model, expander: Expander) -> tuple[list[Graph], list[Finding]]:
    """The conversion graph of `model`, and what in it could not even be read, node by node.

    Where the model has dynamic dimensions, sizes stand for them, and a second graph is the same under other sizes.
    """
    first = _Lowering(model, STAND_INS[0], expander)
    if not first.dynamic or first.findings:
        return [first.graph()], first.findings
    second = _second(model, expander)
    grown = first.grown_otherwise(second)
    if grown and not second.findings:
        first, second = _Lowering(model, STAND_INS[0], expander, grown), _Lowering(model, second.sizes, expander, grown)
    first.sign(second)
    if first.findings:
        return [first.graph()], first.findings
    second.sign(first)
    return [first.graph(), second.graph()], []


def _second(model: ir.Model, expander: Expander) -> _Lowering:
    """The model under other sizes than the first: those that it takes."""
    others = (_Lowering(model, sizes, expander) for sizes in STAND_INS[1:])
    return next((other for other in others if not other.findings), None) or _Lowering(model, STAND_INS[-1], expander)


class _Lowering:
    """One walk over the model with `sizes` (batch, any other) standing for the dynamic dimensions.

    `kept`: nodes that are not computed at conversion although all their inputs are known, and the one number that all
    elements of their results are, if they are.
    """

    def __init__(
        self,
        model: ir.Model,
        sizes: tuple[int, int],
        expander: Expander,
        kept: Mapping[ir.Node, float | None] | None = None,
    ) -> None:
        self.model, self.sizes, self.expander, self.kept = model, sizes, expander, kept or {}
        self.opset = int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)))
        self.tensors: dict[ir.Value, Tensor] = {}
        self.nodes: list[Node] = []
        self.findings: list[Finding] = []
        self.quantized: dict[tuple[Tensor, str], Tensor] = {}
        self.signed: dict[Tensor, Tensor] = {}
        self.read_as: dict[Tensor, str] = {}
        self.dynamic: dict[str, int] = {}
        self.dimensions: dict[str, Dimension] = {}
        self.grown: dict[ir.Node, Array] = {}
        self.has_halves = False
        self.checks = not any(rounds_up(node) for node in model.graph)
        if self.opset > NEWEST_OPSET:
            seen, accepted = f"opset {self.opset}", f"opset {NEWEST_OPSET} or older"
            self.findings.append(
                Finding("the model", "declares operators of an opset that is not known", seen, accepted)
            )
        for value in model.graph.inputs:
            if not value.is_initializer():
                self.tensors[value] = self._input(value)
        for node in model.graph:
            self._guarded(node)

    @contextmanager
    def at_opset(self, opset: int) -> Iterator[None]:
        """Lets nodes be read as of another opset."""
        before, self.opset = self.opset, opset
        try:
            yield
        finally:
            self.opset = before

    def _input(self, value: ir.Value) -> Tensor:
        if value.shape is None or value.dtype is None:
            raise_unreadable(f"input {value.name!r}", "its shape or type is unknown", "a static shape")
        shape = []
        if not is_element_type(value.dtype) or any(
            isinstance(d, int) and not 0 <= d < LARGEST_SIZE for d in value.shape
        ):
            raise_unreadable(f"input {value.name!r}", f"{value.dtype} {value.shape}", "a tensor of numbers")
        for axis, dimension in enumerate(value.shape):
            if isinstance(dimension, int):
                shape.append(dimension)
            else:  # dimensions of one name are of one size
                name = dimension.value or f"{value.name}:{axis}"
                size = self.sizes[0] if axis == 0 else self.sizes[1] + 32 * len(self.dynamic)
                shape.append(self.dynamic.setdefault(name, size))
                self.dimensions.setdefault(name, Dimension(value.name or "", axis, shape[-1]))
        return Tensor(value.name or "", tuple(shape), value.dtype.numpy())

    def _guarded(self, node: ir.Node) -> None:
        known = len(self.findings)
        with judged(f"{node.op_type} {node.name!r}", self.findings):
            self.read(node)
        if len(self.findings) > known:
            for value in node.outputs:
                self.tensors.setdefault(value, Tensor(value.name or "", (), np.dtype(np.float32), known=False))

    def _tensor(self, value: ir.Value) -> Tensor:
        if value not in self.tensors:
            if value.const_value is None:
                raise Unsupported("reads a value that nothing makes", value.name or "")
            self.tensors[value] = constant(value.name or "", value.const_value.numpy())
            self.has_halves |= self.tensors[value].dtype == np.float16
        return self.tensors[value]

    def read(self, node: ir.Node) -> None:
        """Reads one node, whose inputs are known; its outputs become so."""
        if node.domain not in STANDARD_DOMAINS and node.op_type not in (QUANTIZE, DEQUANTIZE):
            raise Unsupported(f"operators of the domain {node.domain!r} are not known", "", "standard ONNX operators")
        inputs = [None if value is None else self._tensor(value) for value in node.inputs]
        if node.op_type in (QUANTIZE, DEQUANTIZE) and self._is_storage(node, inputs):
            self._affine(node, inputs)
            return
        lowered = Node(node.op_type, node.name or "", inputs, [], attributes_of(node), node.domain, self.opset)
        lowered.outputs = [
            Tensor(v.name or "", (), np.dtype(np.float32), known=False, model_shape=declared_shape(v) or ())
            for v in node.outputs
        ]
        if not all(tensor.known for tensor in lowered.tensors()):
            self.tensors.update(zip(node.outputs, lowered.outputs, strict=True))
            self.nodes.append(lowered)
            return
        folded = self._fold(node, lowered)
        if folded is not None:
            for value, data in zip(node.outputs, folded, strict=True):
                self.tensors[value] = constant(value.name or "", data)
            return
        if node.op_type == "Identity" or (node.op_type == "Dropout" and len(node.outputs) == 1 and not lowered.has(2)):
            self.tensors[node.outputs[0]] = lowered.x
        elif expand := self.expander.at_once(lowered):
            self._expand(node, lowered, expand)
        else:
            self._keep(node, lowered)

    def _keep(self, node: ir.Node, lowered: Node) -> None:
        """Adds the node with its outputs' types, or what stands instead of one that its entry refuses."""
        lowered.outputs = []
        types = types_of(node, lowered, self.opset, declared=not self.dynamic, checked=self.checks)
        number = self.kept[node] if node in self.kept else number_of(lowered)
        if node.op_type == "Reshape" and np.prod(types[0][0]) != lowered.x.size:
            raise Unsupported("the number of elements changes", f"{list(lowered.x.shape)} to {list(types[0][0])}")
        if not any(np.prod(shape) for shape, _ in types):  # nothing is computed
            for value, (shape, dtype) in zip(node.outputs, types, strict=True):
                self.tensors[value] = constant(value.name or "", np.zeros(shape, dtype))
            return
        for value, (shape, dtype) in zip(node.outputs, types, strict=True):
            if (size := int(np.prod(shape, dtype=np.float64))) >= LARGEST_SIZE:
                raise Unsupported("makes a tensor that TFLite cannot count", f"{size} elements", "fewer than 2^31")
            self.tensors[value] = Tensor(value.name or f"{node.name}_output", shape, dtype)
            self.tensors[value].number, self.tensors[value].is_position = number, makes_positions(lowered)
            lowered.outputs.append(self.tensors[value])
        if expand := self.expander.instead(lowered):
            self._expand(node, lowered, expand)
        else:
            self.nodes.append(lowered)

    def _expand(self, node: ir.Node, lowered: Node, expand: Expand) -> None:
        for value, tensor in zip(node.outputs, expand(Scope(self, lowered), lowered), strict=True):
            if tensor is not None:
                self.tensors[value] = tensor

    # Quantization ---------------------------------------------------------------------------------------------------

    def _is_storage(self, node: ir.Node, inputs: list[Tensor | None]) -> bool:
        """Whether QuantizeLinear or DequantizeLinear says how a tensor is stored in TFLite; else it is arithmetic."""
        x, *parameters = inputs
        if x is None or any(t is not None and t.data is None for t in parameters):
            return x is None or not x.known
        if node.attributes.get_int("block_size", 0) or integer_type(node, inputs) not in INTEGERS:
            return False
        if x.data is not None or x.quant or not x.known:
            return True
        is_wide = integer_type(node, inputs) == ir.DataType.INT16
        if (parameters[0] is not None and parameters[0].size > 1) or (is_wide and is_shifted(parameters[1:])):
            return False
        if x.is_float or x.dtype.itemsize > 1:
            return x.is_float
        return not any(x in made.outputs for made in self.nodes if made.op_type == "Cast")

    def _affine(self, node: ir.Node, inputs: list[Tensor | None]) -> None:
        x, output = inputs[0], node.outputs[0]
        if x is None or inputs[1] is None:
            raise Unsupported("needs a value and a scale", "one is left out")
        zero = inputs[2] if len(inputs) > 2 else None
        dtype = integer_type(node, inputs)
        params, shift = quant_params(inputs[1].values(), zero.values() if zero else None, dtype, self._axis(node, x))
        if x.data is None and params.spec.axis is not None:
            raise Unsupported("a quantized tensor that is computed has one scale", x.name, "per tensor")
        if node.op_type == DEQUANTIZE:
            seen = self.tensors[output] = self._dequantized(x, params, shift)
            self.read_as.setdefault(seen, output.name or seen.name)
        else:
            self.tensors[output] = self._quantized(x, params, output.name or node.name or "", node.name or "")

    @staticmethod
    def _axis(node: ir.Node, x: Tensor) -> int:
        axis = node.attributes.get_int("axis", 1)
        return axis + x.rank if axis < 0 else axis

    def _dequantized(self, x: Tensor, params: QuantParams, shift: int) -> Tensor:
        """The tensor that the readers of DequantizeLinear(x) see."""
        if x in self.signed:
            return self.signed[x]
        if x.data is not None and x.quant is None:
            data = (x.data.astype(np.int16) - shift).astype(np.int8) if shift else x.data
            return constant(x.name, data, params)
        if x.quant is None and params.spec.bits > WIDE_BITS:
            seen = f"{x.name}: {params.spec.bits} bits"
            raise Unsupported("computed integers have 8 or 16 bits", seen, "int8, uint8 or int16")
        if x.quant is None and shift:
            return self._signed(x, params)
        if x.quant is None:
            x.quant, x.dtype = params, np.dtype(np.float32)
        if not x.quant.same_as(params):
            raise Unsupported(
                "reads integers that another scale explains", x.name, "the scale they were quantized with"
            )
        return x

    def _signed(self, x: Tensor, params: QuantParams) -> Tensor:
        """The int8 tensor of a uint8 graph input."""
        if x not in self.signed:
            y = self.signed[x] = Tensor(f"{x.name}/int8", x.shape, np.dtype(np.float32), params)
            twin = unsigned(y, x.name)
            x.quant, x.dtype = twin.quant, twin.dtype
            self.nodes.append(Node(QUANTIZE, x.name, [x], [y], opset=self.opset))
        return self.signed[x]

    def _quantized(self, x: Tensor, params: QuantParams, name: str, node_name: str) -> Tensor:
        if x.quant and x.quant.same_as(params):
            return x
        if x.data is not None:
            return constant(name, params.quantize(x.values()), params)
        key = (x, repr((params.scale.tolist(), params.zero_point.tolist(), params.spec)))
        if key not in self.quantized:
            y = Tensor(name, x.shape, x.dtype, params)
            self.nodes.append(Node(QUANTIZE, node_name, [x], [y], opset=self.opset))
            self.quantized[key] = y
        return self.quantized[key]

    # Shapes and constants -------------------------------------------------------------------------------------------

    def _fold(self, node: ir.Node, lowered: Node) -> list[Array] | None:
        """The outputs when everything they depend on is known."""
        if node.op_type == "Constant":
            return [constant_value(lowered)]
        if node.op_type == "Size":
            return [np.asarray(lowered.x.size, np.int64)]
        if node.op_type == "Shape":
            start, end = lowered.attribute("start", 0), lowered.attribute("end", lowered.x.rank)
            return [np.asarray(lowered.x.shape[start:end], np.int64)]
        tensors = list(lowered.tensors())
        if (
            not tensors
            or any(_content(t) is None or t.quant for t in tensors)
            or any(a.type.name == "GRAPH" for a in node.attributes.values())
        ):
            return None
        if node in self.kept or not may_be_folded(node, lowered, self.opset, LARGEST_FOLDED):
            return None
        proto = ir.to_proto(node)
        feeds = {name: _content(t) for name, t in zip(proto.input, lowered.inputs, strict=True) if t is not None}
        folded = evaluate(proto, feeds, self.opset)
        if node.op_type in SIZED_AT_RUN_TIME:
            self.grown[node] = folded[0]
        return folded

    # Result ---------------------------------------------------------------------------------------------------------

    def grown_otherwise(self, other: _Lowering) -> dict[ir.Node, float | None]:
        """The nodes whose constant result has another shape in `other`, which their operators can be told at run time,
        each with the one number that all its elements are.
        """
        return {
            node: float(made.flat[0]) if made.size and (made == made.flat[0]).all() else None
            for node, made in self.grown.items()
            if other.grown.get(node, made).shape != made.shape
        }

    def sign(self, other: _Lowering) -> None:
        """Marks the dimensions that differ in `other`, the same model under other sizes, as dynamic."""
        only_batch = all(size == self.sizes[0] for size in self.dynamic.values())
        accepted = "a static batch" if only_batch else "static dimensions"
        if other.findings:
            self.findings += [replace(finding, accepted=accepted) for finding in other.findings]
            return
        pairs = list(zip_longest(self.nodes, other.nodes))
        for node, twin in pairs:
            if node is None or twin is None or node.op_type != twin.op_type:
                seen = ", ".join(sorted(self.dynamic))
                where = (node or twin).where
                self.findings.append(Finding(where, "stands or falls with a dynamic dimension", seen, accepted))
                return
        same = [(t, other.tensors[value]) for value, t in self.tensors.items() if value in other.tensors]
        same += [two for node, twin in pairs for two in zip(node.outputs, twin.outputs, strict=True)]
        for tensor, twin in same:
            if tensor.data is None and tensor.rank == twin.rank:
                tensor.signature = tuple(a if a == b else -1 for a, b in zip(tensor.shape, twin.shape, strict=True))

    def graph(self) -> Graph:
        """The finished graph; a real-valued output of an integer tensor gets its DequantizeLinear back."""
        inputs = {v.name or "": self.tensors[v] for v in self.model.graph.inputs if not v.is_initializer()}
        outputs: dict[str, Tensor] = {}
        for value in self.model.graph.outputs:
            tensor, name = self._tensor(value), value.name or ""
            if tensor.quant and (value.dtype is None or value.dtype.is_floating_point()):
                real = Tensor(name, tensor.shape, tensor.dtype, signature=tensor.signature)
                self.nodes.append(Node(DEQUANTIZE, name, [tensor], [real], opset=self.opset))
                tensor = real
            elif value.dtype == ir.DataType.UINT8 and tensor.quant and tensor.quant.spec.signed:
                raw = unsigned(tensor, name)
                self.nodes.append(Node(QUANTIZE, name, [tensor], [raw], opset=self.opset))
                tensor = raw
            outputs[name] = tensor
        border = (*self.model.graph.inputs, *self.model.graph.outputs)
        integers = frozenset(v.name or "" for v in border if v.dtype is not None and not v.dtype.is_floating_point())
        graph = Graph(self.nodes, inputs, outputs, integers, self.has_halves, tuple(self.dimensions.values()))
        absorb_quantizers(graph, self.read_as)
        graph.prune()
        return graph


def _content(tensor: Tensor) -> Array | None:
    """What is known of the value: a constant, or nothing at all of a tensor without elements."""
    return np.zeros(tensor.shape, tensor.dtype) if tensor.data is None and not tensor.size else tensor.data


def raise_unreadable(where: str, seen: str, accepted: str) -> NoReturn:
    """Raises UnsupportedError for a model whose inputs cannot be read."""
    from edgeship.calibration.errors import UnsupportedError

    raise UnsupportedError("the model cannot become TFLite:", [Finding(where, "needs a known shape", seen, accepted)])
