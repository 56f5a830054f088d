"""What can be known of one node before it runs: the shapes of its outputs, and its outputs where all inputs are
constants.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgeship.calibration.types import Array
from edgeship.targets.tflite.graph import Node, Unsupported

LIKE_THEIR_INPUT = frozenset({"GroupNormalization"})
"""Operators for which ONNX's inference has no rule of its own: the output is like the first input."""


MISREAD = {"STFT": {"onesided": 1}}
"""Defaults of the standard that ONNX's inference takes for others: they are written out for it."""
POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
CEILING_SINCE = 22
"""The opset from which ONNX's inference leaves out windows that begin beyond the input, as PyTorch and ONNX Runtime do
at every opset.
"""
GROWING = frozenset({"ConstantOfShape", "Expand", "Pad", "RandomNormal", "RandomUniform", "Range", "Resize", "Tile"})
"""Operators whose result may be far larger than what it is made of."""
FAILURES = (
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    ir.serde.SerdeError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What onnx raises on a node that breaks the rules."""


def constant_value(node: Node) -> Array:
    """The value of a Constant node. Raises Unsupported for sparse ones and strings."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            dtype = None if name == "value" else np.float32 if "float" in name else np.int64
            return np.asarray(node.attributes[name], dtype)
    raise Unsupported("constants of this kind are not known", ", ".join(node.attributes), "a dense tensor of numbers")


def evaluate(proto: onnx.NodeProto, feeds: dict[str, Array | None], opset: int) -> list[Array]:
    """The outputs of one node on constants, as ONNX's reference implementation computes them."""
    from onnx.reference import ReferenceEvaluator

    values = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds]
    results = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "constant", values, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):  # the logarithm of zero is a value like any other
            return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]
    except Exception as error:
        raise Unsupported("its constant inputs cannot be computed with", _first_line(error)) from error


def is_element_type(dtype: ir.DataType) -> bool:
    """Whether tensors of the type hold numbers or truth values that NumPy knows."""
    try:
        return dtype.numpy().kind in "biuf"
    except TypeError:
        return False


def may_be_folded(node: ir.Node, lowered: Node, opset: int, largest: int) -> bool:
    """Whether the outputs of a node on constants are known to have at most `largest` elements together."""
    try:
        types = infer(node, lowered, opset)
    except (
        Unsupported
    ):  # its sizes follow from values: no larger than what it is made of, or a matter of Range and Loop
        return node.op_type not in GROWING and sum(tensor.size for tensor in lowered.tensors()) <= largest
    return sum(int(np.prod(shape, dtype=np.float64)) for shape, _ in types) <= largest


def rounds_up(node: ir.Node) -> bool:
    """Whether the node is a pooling in ceil mode, of which old opsets and runtimes say different sizes."""
    return node.op_type in POOLS and node.attributes.get_int("ceil_mode", 0) == 1


def infer(node: ir.Node, lowered: Node, opset: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every output by ONNX's inference for this one node."""
    if node.op_type in LIKE_THEIR_INPUT:
        return [(lowered.x.shape, lowered.x.dtype)]
    types, data = {}, {}
    for value, tensor in zip(node.inputs, lowered.inputs, strict=True):
        if tensor is None or value is None:
            continue
        name = value.name or ""
        kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
        types[name] = onnx.helper.make_tensor_type_proto(kind, tensor.shape)
        if tensor.data is not None and tensor.size <= 64 and not tensor.quant:
            data[name] = onnx.numpy_helper.from_array(tensor.data, name)
    if rounds_up(node):
        opset = max(opset, CEILING_SINCE)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        opsets = [onnx.helper.make_opsetid("", opset)]
        proto = ir.to_proto(node)
        told = {**MISREAD.get(node.op_type, {}), **_transposed_same(node, lowered)}
        missing = {key: value for key, value in told.items() if key not in node.attributes}
        proto.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in missing.items())
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=opsets)
    except FAILURES as error:
        raise Unsupported("its output's shape cannot be inferred", _first_line(error)) from error
    return [_inferred(inferred, value, lowered) for value in node.outputs]


def _transposed_same(node: ir.Node, lowered: Node) -> dict[str, list[int]]:
    """`output_shape` of a ConvTranspose that pads as SAME: input times stride, or what there is where that is less.

    ONNX's inference adds `output_padding` to it; the standard, its reference and ONNX Runtime do not.
    """
    if node.op_type != "ConvTranspose" or not str(lowered.attribute("auto_pad", "")).startswith("SAME"):
        return {}
    sizes = lowered.x.shape[2:]
    ones, zeros = (1,) * len(sizes), (0,) * len(sizes)
    strides, dilations = (lowered.attribute(name) or ones for name in ("strides", "dilations"))
    extra, kernel = lowered.attribute("output_padding") or zeros, lowered.tensor(1).shape[2:]
    axes = zip(sizes, strides, kernel, dilations, extra, strict=True)
    return {"output_shape": [min(n * s, (n - 1) * s + (k - 1) * d + 1 + more) for n, s, k, d, more in axes]}


def types_of(
    node: ir.Node, lowered: Node, opset: int, *, declared: bool, checked: bool
) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of every output: by ONNX's inference; where that fails, what the model says if it is `declared`.

    Raises Unsupported where the two contradict each other and what is declared is to be `checked`.
    """
    if missing := [name for name in _required(node.op_type, opset) if name not in node.attributes]:
        raise Unsupported("lacks attributes that the standard demands", ", ".join(missing), "valid ONNX")
    known = [told for value in node.outputs if declared and (told := _told(value)) is not None]
    try:
        inferred = infer(node, lowered, opset)
    except Unsupported:
        if len(known) < len(node.outputs):
            raise
        return known
    if len(known) < len(node.outputs) or not checked:
        return inferred
    for (said, _), (follows, _) in zip(known, inferred, strict=True):
        if said != follows:
            raise Unsupported("declares another shape than its inputs give", f"{list(said)}", f"{list(follows)}")
    return known


@cache
def _required(op_type: str, opset: int) -> tuple[str, ...]:
    """The attributes that every node of the operator has."""
    try:
        attributes = onnx.defs.get_schema(op_type, opset, "").attributes
    except onnx.defs.SchemaError:
        return ()
    return tuple(name for name, attribute in attributes.items() if attribute.required)


def _told(value: ir.Value) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """The shape and dtype that the model itself gives for a value; None where they are not static."""
    shape = declared_shape(value)
    return None if shape is None or value.dtype is None else (shape, value.dtype.numpy())


def declared_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The static shape that the model itself gives for a value, or None."""
    sizes = [] if value.shape is None else [int(size) for size in value.shape if isinstance(size, int)]
    return None if value.shape is None or len(sizes) < len(value.shape) else tuple(sizes)


def _inferred(types: dict[str, onnx.TypeProto], value: ir.Value, node: Node) -> tuple[tuple[int, ...], np.dtype[Any]]:
    kind = types[value.name or ""].tensor_type if (value.name or "") in types else None
    if kind is None or not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        raise Unsupported(
            "the shape of its output depends on values known only at run time", value.name or "", "static shapes"
        )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return tuple(d.dim_value for d in kind.shape.dim), dtype


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
