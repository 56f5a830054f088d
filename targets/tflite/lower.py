"""ONNX to the conversion graph: shapes made known, constants folded, QuantizeLinear/DequantizeLinear absorbed into
tensors.

`value -> QuantizeLinear -> DequantizeLinear` becomes one integer tensor that carries its scale; an integer constant
through DequantizeLinear becomes an integer constant. What remains of the two operators stands where a tensor really
changes its type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import onnx
import onnx_ir as ir

from edgeship.calibration.types import Array, Finding, QuantParams, TensorSpec
from edgeship.targets.tflite.expansion import Expand, Expander, Scope
from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE, Graph, Node, Tensor, Unsupported, constant, unsigned

STANDARD_DOMAINS = ("", "ai.onnx")
LARGEST_FOLDED = 1 << 24
"""Elements; a larger constant is not computed at conversion time (it would grow the file beyond its weights)."""
_INTEGERS = {ir.DataType.INT8: (8, True), ir.DataType.UINT8: (8, False), ir.DataType.INT32: (32, True)}


def lower(model: ir.Model, expander: Expander) -> tuple[Graph, list[Finding]]:
    """The conversion graph of `model`, and what in it could not even be read, node by node."""
    lowering = _Lowering(model, 1, expander)
    if lowering.is_dynamic and not lowering.findings:
        lowering.sign(_Lowering(model, 2, expander))
    return lowering.graph(), lowering.findings


def single(node: ir.Node) -> Node:
    """One ONNX node by itself, for rules that look at a node of a float graph; unknown dimensions are -1."""
    inputs = [None if value is None else _peek(value) for value in node.inputs]
    return Node(
        node.op_type,
        node.name or "",
        inputs,
        [_peek(value) for value in node.outputs],
        _attributes(node),
        node.domain,
        node.version or _opset(node.graph),
    )


def _opset(graph: Any) -> int:
    return int(graph.opset_imports.get("", 0)) if isinstance(graph, ir.Graph) else 0


def _peek(value: ir.Value) -> Tensor:
    known = None if value.is_graph_input() and not value.is_initializer() else ir.convenience.get_const_tensor(value)
    data = None if known is None else known.numpy()
    shape = tuple(d if isinstance(d, int) else -1 for d in value.shape) if value.shape is not None else ()
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    return Tensor(value.name or "", shape if data is None else tuple(data.shape), dtype, None, data)


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {
        name: attribute.value.numpy() if attribute.type == ir.AttributeType.TENSOR else attribute.value
        for name, attribute in node.attributes.items()
        if not attribute.is_ref()
    }


class _Lowering:
    """One walk over the model with one batch size standing for the dynamic one."""

    def __init__(self, model: ir.Model, batch: int, expander: Expander) -> None:
        self.model, self.batch, self.expander = model, batch, expander
        self.opset = int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)))
        self.tensors: dict[ir.Value, Tensor] = {}
        self.nodes: list[Node] = []
        self.findings: list[Finding] = []
        self.quantized: dict[tuple[Tensor, str], Tensor] = {}
        self.signed: dict[Tensor, Tensor] = {}
        self.is_dynamic = False
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
        shape: list[int] = []
        for axis, dimension in enumerate(value.shape):
            if isinstance(dimension, int):
                shape.append(dimension)
            elif axis == 0:
                self.is_dynamic = True
                shape.append(self.batch)
            else:
                raise_unreadable(
                    f"input {value.name!r}", f"axis {axis} is dynamic ({dimension})", "only the batch (axis 0) may be"
                )
        return Tensor(value.name or "", tuple(shape), value.dtype.numpy())

    def _guarded(self, node: ir.Node) -> None:
        try:
            self.read(node)
        except Unsupported as error:
            self.findings.append(Finding(f"{node.op_type} {node.name!r}", error.rule, error.seen, error.accepted))
            for value in node.outputs:
                self.tensors.setdefault(value, Tensor(value.name or "", (), np.dtype(np.float32), known=False))

    def _tensor(self, value: ir.Value) -> Tensor:
        if value not in self.tensors:
            if value.const_value is None:
                raise Unsupported("reads a value that nothing makes", value.name or "")
            self.tensors[value] = constant(value.name or "", value.const_value.numpy())
        return self.tensors[value]

    def read(self, node: ir.Node) -> None:
        """Reads one node, whose inputs are known; its outputs become so."""
        if node.domain not in STANDARD_DOMAINS:
            raise Unsupported(f"operators of the domain {node.domain!r} are not known", "", "standard ONNX operators")
        inputs = [None if value is None else self._tensor(value) for value in node.inputs]
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            self._affine(node, inputs)
            return
        lowered = Node(node.op_type, node.name or "", inputs, [], _attributes(node), node.domain, self.opset)
        if not all(tensor.known for tensor in lowered.tensors()):
            lowered.outputs = [Tensor(v.name or "", (), np.dtype(np.float32), known=False) for v in node.outputs]
            self.tensors.update(zip(node.outputs, lowered.outputs, strict=True))
            self.nodes.append(lowered)
            return
        folded = self._fold(node, lowered)
        if folded is not None:
            for value, data in zip(node.outputs, folded, strict=True):
                self.tensors[value] = constant(value.name or "", data)
            return
        if node.op_type == "Identity" or (node.op_type == "Dropout" and len(node.outputs) == 1):
            self.tensors[node.outputs[0]] = lowered.x
            return
        lowered.outputs = [Tensor(v.name or "", (), np.dtype(np.float32), known=False) for v in node.outputs]
        expand = self.expander.at_once(lowered)
        if expand:
            self._expand(node, lowered, expand)
            return
        types, lowered.outputs = self._types(node, lowered), []
        if node.op_type == "Reshape" and np.prod(types[0][0]) != lowered.x.size:
            raise Unsupported("the number of elements changes", f"{list(lowered.x.shape)} to {list(types[0][0])}")
        for value, (shape, dtype) in zip(node.outputs, types, strict=True):
            self.tensors[value] = Tensor(value.name or f"{node.name}_output", shape, dtype)
            lowered.outputs.append(self.tensors[value])
        expand = self.expander.instead(lowered)
        if expand:
            self._expand(node, lowered, expand)
        else:
            self.nodes.append(lowered)

    def _expand(self, node: ir.Node, lowered: Node, expand: Expand) -> None:
        for value, tensor in zip(node.outputs, expand(Scope(self, lowered), lowered), strict=True):
            if tensor is not None:
                self.tensors[value] = tensor

    # Quantization ---------------------------------------------------------------------------------------------------

    def _affine(self, node: ir.Node, inputs: list[Tensor | None]) -> None:
        x, output = inputs[0], node.outputs[0]
        if x is None or inputs[1] is None:
            raise Unsupported("needs a value and a scale", "one is left out")
        integers = node.inputs[0].dtype if node.op_type == DEQUANTIZE and node.inputs[0] is not None else None
        zero = inputs[2] if len(inputs) > 2 else None
        dtype = ir.DataType.from_numpy(zero.dtype) if zero is not None and not zero.quant else integers
        dtype = dtype or (ir.DataType(node.attributes.get_int("output_dtype", 0)) or ir.DataType.UINT8)
        if dtype not in _INTEGERS:
            raise Unsupported("integers of this type are not known", dtype.name, "int8, uint8, or int32 for a bias")
        params, shift = _params(inputs[1].values(), zero.values() if zero else None, dtype, self._axis(node, x))
        if not x.known or (x.data is None and params.spec.axis is not None):
            raise Unsupported("a computed tensor has one scale", x.name, "per tensor; weights may be per channel")
        if node.op_type == DEQUANTIZE:
            self.tensors[output] = self._dequantized(x, params, shift)
        else:
            self.tensors[output] = self._quantized(x, params, output.name or node.name or "", node.name or "")

    @staticmethod
    def _axis(node: ir.Node, x: Tensor) -> int:
        axis = node.attributes.get_int("axis", 1)
        if node.attributes.get_int("block_size", 0):
            raise Unsupported(
                "blocked quantization has no TFLite form", "block_size is set", "per tensor or per channel"
            )
        return axis + x.rank if axis < 0 else axis

    def _dequantized(self, x: Tensor, params: QuantParams, shift: int) -> Tensor:
        """The tensor that the readers of DequantizeLinear(x) see."""
        if x in self.signed:
            return self.signed[x]
        if x.data is not None and x.quant is None:
            data = (x.data.astype(np.int16) - shift).astype(np.int8) if shift else x.data
            return constant(x.name, data, params)
        if x.quant is None and params.spec.bits != 8:
            raise Unsupported("computed integers have 8 bits", f"{x.name}: {params.spec.bits} bits", "int8 or uint8")
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
            return [_constant_value(lowered)]
        if node.op_type == "Shape" and not (self.is_dynamic and lowered.x.shape[:1] == (self.batch,)):
            start, end = lowered.attribute("start", 0), lowered.attribute("end", lowered.x.rank)
            return [np.asarray(lowered.x.shape[start:end], np.int64)]
        tensors = list(lowered.tensors())
        if (
            not tensors
            or any(t.data is None or t.quant for t in tensors)
            or any(a.type.name == "GRAPH" for a in node.attributes.values())
        ):
            return None
        proto = ir.to_proto(node)
        feeds = {name: t.data for name, t in zip(proto.input, lowered.inputs, strict=True) if t is not None}
        outputs = _evaluate(proto, feeds, self.opset)
        return outputs if sum(o.size for o in outputs) <= LARGEST_FOLDED else None

    def _types(self, node: ir.Node, lowered: Node) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of every output: the model's own where it says them, else ONNX's inference for this node."""
        told = [_told(value) for value in node.outputs]
        if not self.is_dynamic and all(t is not None for t in told):
            return [t for t in told if t is not None]
        proto = ir.to_proto(node)
        types, data = {}, {}
        for name, tensor in zip(proto.input, lowered.inputs, strict=True):
            if tensor is None:
                continue
            kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
            types[name] = onnx.helper.make_tensor_type_proto(kind, tensor.shape)
            if tensor.data is not None and tensor.size <= 64 and not tensor.quant:
                data[name] = onnx.numpy_helper.from_array(tensor.data, name)
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
            opsets = [onnx.helper.make_opsetid("", self.opset)]
            inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=opsets)
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError) as error:
            raise Unsupported("its output's shape cannot be inferred", str(error).splitlines()[0]) from error
        return [_inferred(inferred, value, lowered) for value in node.outputs]

    # Result ---------------------------------------------------------------------------------------------------------

    def sign(self, other: _Lowering) -> None:
        """Marks the dimensions that differ in `other`, the same model at another batch size, as dynamic."""
        if other.findings:
            self.findings += [replace(finding, accepted="a static batch") for finding in other.findings]
            return
        for value, tensor in self.tensors.items():
            twin = other.tensors.get(value)
            if twin is None or tensor.data is not None:
                continue
            tensor.signature = tuple(a if a == b else -1 for a, b in zip(tensor.shape, twin.shape, strict=True))
        for node, twin_node in zip(self.nodes, other.nodes, strict=False):
            for tensor, twin in zip(node.outputs, twin_node.outputs, strict=True):
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
        graph = Graph(self.nodes, inputs, outputs, integers)
        _absorb(graph)
        graph.prune()
        return graph


def _absorb(graph: Graph) -> None:
    """Lets a node whose only reader is QuantizeLinear write the integers itself, under the node's own name."""
    uses, producers = graph.consumers(), graph.producers()
    kept = set(graph.outputs.values())
    for node in list(graph.nodes):
        if node.op_type != QUANTIZE or node.x.quant or node.x in kept or len(uses[node.x]) != 1:
            continue
        producer = producers.get(node.x)
        if producer is None or producer.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        node.y.name = node.x.name
        producer.outputs = [node.y if tensor is node.x else tensor for tensor in producer.outputs]
        producers[node.y] = producer
        graph.nodes.remove(node)


def _params(scale: Array, zero: Array | None, dtype: ir.DataType, axis: int) -> tuple[QuantParams, int]:
    """The parameters as signed integers, and what was subtracted to make them signed."""
    bits, signed = _INTEGERS[dtype]
    shift = 0 if signed else 128
    if scale.size == 1:
        scale = scale.reshape(())
    points = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64).reshape(scale.shape)
    spec = TensorSpec(bits=bits, signed=True, axis=axis if scale.ndim else None)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise Unsupported("scales must be finite and positive", f"the smallest is {scale.min()}")
    return QuantParams(scale, points - shift, spec), shift


def _constant_value(node: Node) -> Array:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            dtype = None if name == "value" else np.float32 if "float" in name else np.int64
            return np.asarray(node.attributes[name], dtype)
    raise Unsupported("constants of this kind are not known", ", ".join(node.attributes), "a dense tensor of numbers")


def _evaluate(proto: onnx.NodeProto, feeds: dict[str, Array | None], opset: int) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    values = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds]
    results = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "constant", values, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]
    except Exception as error:
        raise Unsupported("its constant inputs cannot be computed with", str(error).splitlines()[0]) from error


def _told(value: ir.Value) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    if value.shape is None or value.dtype is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape), value.dtype.numpy()  # type: ignore[arg-type]  # all are int


def _inferred(types: dict[str, onnx.TypeProto], value: ir.Value, node: Node) -> tuple[tuple[int, ...], np.dtype[Any]]:
    kind = types[value.name or ""].tensor_type if (value.name or "") in types else None
    if kind is None or not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        raise Unsupported(
            "the shape of its output depends on values known only at run time", value.name or "", "static shapes"
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return tuple(d.dim_value for d in kind.shape.dim), dtype


def raise_unreadable(where: str, seen: str, accepted: str) -> NoReturn:
    """Raises UnsupportedError for a model whose inputs cannot be read."""
    from edgeship.calibration.errors import UnsupportedError

    raise UnsupportedError("the model cannot become TFLite:", [Finding(where, "needs a known shape", seen, accepted)])
