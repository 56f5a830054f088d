"""ONNX's own definition of an operator by others, for a node whose input types are known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgeship.targets.tflite.expansion import Scope
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported


def has_function(node: Node) -> bool:
    """Whether the standard defines the operator by others at the node's opset."""
    schema = _schema(node)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def expand_function(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """The standard's own definition by other operators."""
    body = _body(node)
    opset = next(entry.version for entry in body.opset_import if entry.domain in ("", "ai.onnx"))
    given = {**_defaults(node), **{a.name: a for a in (*body.attribute_proto, *_proto(node).attribute)}}
    absent = {name for place, name in enumerate(body.input) if not node.has(place)}
    nodes = [_bound(inner, given, absent) for inner in body.node]
    values = [onnx.ValueInfoProto(name=name) for name in body.input]
    wanted = [name for name, tensor in zip(body.output, node.outputs, strict=False) if tensor.name]
    results = [onnx.ValueInfoProto(name=name) for name in wanted]
    graph = ir.serde.deserialize_graph(onnx.GraphProto(name=body.name, node=nodes, input=values, output=results))
    names = {old: tensor.name for old, tensor in zip(body.output, node.outputs, strict=False) if tensor.name}
    for value in (value for inner in graph for value in inner.outputs if value.name):
        value.name = names.get(value.name or "", f"{scope.prefix}/{value.name}")
    inputs = [*node.inputs, *[None] * (len(body.input) - len(node.inputs))]
    with scope.reading.at_opset(opset):
        made = dict(zip(wanted, scope.body(graph, inputs), strict=True))
    return [made.get(name) for name in body.output[: len(node.outputs)]]


def _schema(node: Node) -> Any:  # onnx's stubs leave out the methods for functions that depend on their inputs
    try:
        return onnx.defs.get_schema(node.op_type, node.opset, "")
    except onnx.defs.SchemaError:
        return None


def _defaults(node: Node) -> dict[str, onnx.AttributeProto]:
    schema = _schema(node)
    defaults = {} if schema is None else {name: a.default_value for name, a in schema.attributes.items()}
    return {name: value for name, value in defaults.items() if value.type}


def _body(node: Node) -> onnx.FunctionProto:
    """The definition as of the node's opset, or the oldest there is."""
    schema = _schema(node)
    if schema is None:
        raise Unsupported("is not an operator of the standard")
    if schema.has_function:
        version = _version(schema.function_opset_versions, node.opset)
        return _parsed(schema.get_function_with_opset_version(version))
    version = _version(schema.context_dependent_function_opset_versions, node.opset)
    types = [_type(tensor).SerializeToString() for tensor in node.inputs]
    content = schema.get_context_dependent_function_with_opset_version(version, _proto(node).SerializeToString(), types)
    body = _parsed(content)
    if not body.node:
        raise Unsupported("the standard gives it no definition for these inputs")
    return body


def _parsed(content: bytes) -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.ParseFromString(content)
    return function


def _version(versions: Sequence[int], opset: int) -> int:
    return max((v for v in versions if v <= opset), default=min(versions))


def _type(tensor: Tensor | None) -> onnx.TypeProto:
    if tensor is None:
        return onnx.TypeProto()
    return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype), tensor.shape)


def _proto(node: Node) -> onnx.NodeProto:
    inputs = ["" if tensor is None else f"in{place}" for place, tensor in enumerate(node.inputs)]
    outputs = [f"out{place}" if tensor.name else "" for place, tensor in enumerate(node.outputs)]
    proto = onnx.helper.make_node(node.op_type, inputs, outputs)
    for name, value in node.attributes.items():
        plain = onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        proto.attribute.append(onnx.helper.make_attribute(name, plain))
    return proto


def _bound(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto], absent: Collection[str]) -> onnx.NodeProto:
    """The node with the function's attributes filled in; attributes and inputs that are not given are left out."""
    bound = onnx.NodeProto()
    bound.CopyFrom(node)
    bound.input[:] = ["" if name in absent else name for name in node.input]
    del bound.attribute[:]
    bound.attribute.extend(_attributes(node.attribute, given, absent))
    return bound


def _attributes(
    attributes: Iterable[onnx.AttributeProto], given: Mapping[str, onnx.AttributeProto], absent: Collection[str]
) -> Iterable[onnx.AttributeProto]:
    for attribute in attributes:
        filled = onnx.AttributeProto()
        if not attribute.ref_attr_name:
            filled.CopyFrom(attribute)
        elif attribute.ref_attr_name in given:
            filled.CopyFrom(given[attribute.ref_attr_name])
            filled.name = attribute.name
        else:
            continue
        if filled.HasField("g"):
            nodes = [_bound(inner, given, absent) for inner in filled.g.node]
            del filled.g.node[:]
            filled.g.node.extend(nodes)
        yield filled
