"""Returns a graph with another border: NHWC images, or integers instead of float32, told in the artifact's metadata.

The metadata key `edgeship.io` holds, by input or output name, what differs from float32 NCHW:
{"image": {"layout": "nhwc", "dtype": "uint8", "scale": 0.0078, "zero_point": 128}}. Integers mean
real = scale * (integer - zero_point).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array, Finding
from edgeship.targets.base import ConvertOptions, IoDtype, IoLayout

KEY = "edgeship.io"
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
_OFFSET = {"uint8": 0, "int8": -128}


@dataclass(frozen=True)
class Port:
    """How one input or output of an artifact differs from float32 NCHW."""

    layout: IoLayout = "nchw"
    dtype: IoDtype = "float32"
    scale: float = 1.0
    zero_point: int = 0

    def enter(self, values: Array) -> Array:
        """What the artifact takes for `values`, float32 NCHW: rounded half to even, saturated."""
        if self.layout == "nhwc":
            values = values.transpose(_TO_NHWC)
        if self.dtype != "float32":
            limits = np.iinfo(self.dtype)
            integers = np.rint(values / np.float32(self.scale)) + self.zero_point
            values = np.clip(integers, limits.min, limits.max).astype(self.dtype)
        return np.asarray(values, order="C")

    def leave(self, values: Array) -> Array:
        """float32 NCHW of `values` as the artifact gives them."""
        if self.dtype != "float32":
            values = (values.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)
        return np.asarray(values.transpose(_TO_NCHW) if self.layout == "nhwc" else values, order="C")


def read_ports(metadata: Mapping[str, str]) -> dict[str, Port]:
    """The ports that an artifact's metadata tells of. Raises InputError when it is damaged."""
    text = metadata.get(KEY)
    if text is None:
        return {}
    try:
        return {name: Port(**facts) for name, facts in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the artifact's metadata {KEY} cannot be read: {error}; seen: {text[:200]!r}") from error


def check_border(graph: ir.Graph, options: ConvertOptions) -> list[Finding]:
    """The inputs and outputs that cannot be the integers asked for: the model has them in float, or in 16 bits.

    What is no real number (an index, a truth value) stays as it is.
    """
    if options.io_dtype == "float32":
        return []
    border = [
        *(("input", value, next(iter(_quantizers(value)), None)) for value in graph.inputs),
        *(("output", value, _dequantizer(value)) for value in graph.outputs),
    ]
    return [finding for part in border for finding in _unfit(*part, options.io_dtype)]


def _unfit(kind: str, value: ir.Value, node: ir.Node | None, dtype: IoDtype) -> Iterator[Finding]:
    where = f"{kind} {value.name}"
    if node is None:
        if value.dtype is None or value.dtype.is_floating_point():
            rule, accepted = f"cannot be {dtype}: it is not quantized", "float32, or a model that quantizes it"
            yield Finding(where, rule, str(value.dtype), accepted)
    elif (inside := _scale_and_zero_point(node)[2]) not in _OFFSET:
        yield Finding(where, f"cannot be {dtype}: it is not quantized to 8 bits", inside, "float32")


def change_border(model: ir.Model, options: ConvertOptions) -> None:
    """Gives `model` the border that `options` asks for, in place, and writes it into its metadata."""
    ports: dict[str, Port] = {}
    for index in range(len(model.graph.inputs)):
        port = _input_port(model.graph.inputs[index], options)
        if port != Port():
            ports[str(model.graph.inputs[index].name)] = port
            _change_input(model.graph, index, port)
    for index in range(len(model.graph.outputs)):
        port = _output_port(model.graph.outputs[index], options)
        if port != Port():
            ports[str(model.graph.outputs[index].name)] = port
            _change_output(model.graph, index, port)
    if ports:
        facts = {name: _facts(port) for name, port in sorted(ports.items())}
        model.metadata_props[KEY] = json.dumps(facts, sort_keys=True)


def _facts(port: Port) -> dict[str, Any]:
    facts: dict[str, Any] = {"layout": port.layout, "dtype": port.dtype}
    if port.dtype != "float32":
        facts |= {"scale": port.scale, "zero_point": port.zero_point}
    return facts


def _quantizers(value: ir.Value) -> list[ir.Node]:
    """The QuantizeLinear nodes that are all an input goes into, and that agree; else none."""
    nodes = [node for node, place in value.uses() if node.op_type == "QuantizeLinear" and place == 0]
    if not nodes or len(nodes) != len(tuple(value.uses())) or value.is_graph_output():
        return []
    return nodes if len({_scale_and_zero_point(node) for node in nodes}) == 1 else []


def _dequantizer(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _scale_and_zero_point(node: ir.Node) -> tuple[float, int, str]:
    scale = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if scale is None or scale.size != 1:
        raise InputError(f"{node.op_type} {node.name}: a border's scale must be one constant number")
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = ir.convenience.get_const_tensor(zero_point) if zero_point is not None else None
    integer = 0 if tensor is None else int(tensor.numpy().reshape(()))
    dtype = "uint8" if tensor is None else tensor.dtype.numpy().name
    return float(scale.numpy().reshape(())), integer, dtype


def _layout(value: ir.Value, options: ConvertOptions) -> IoLayout:
    return "nhwc" if options.io_layout == "nhwc" and value.shape is not None and len(value.shape) == 4 else "nchw"


def _port(layout: IoLayout, node: ir.Node | None, dtype: IoDtype) -> Port:
    if node is None or dtype == "float32":
        return Port(layout)
    scale, zero_point, inside = _scale_and_zero_point(node)
    return Port(layout, dtype, scale, zero_point + _OFFSET[dtype] - _OFFSET[inside])


def _input_port(value: ir.Value, options: ConvertOptions) -> Port:
    return _port(_layout(value, options), next(iter(_quantizers(value)), None), options.io_dtype)


def _output_port(value: ir.Value, options: ConvertOptions) -> Port:
    return _port(_layout(value, options), _dequantizer(value), options.io_dtype)


def _change_input(graph: ir.Graph, index: int, port: Port) -> None:
    """input -> [Transpose] -> what was there, or input -> [Transpose] -> DequantizeLinear -> QuantizeLinear -> ..."""
    value = graph.inputs[index]
    quantizers = _quantizers(value)
    users = tuple(value.uses())
    nodes = []
    inside = value
    if port.layout == "nhwc":
        nodes.append(_transpose(value, _TO_NCHW, f"{value.name}_nchw"))
        inside = nodes[-1].outputs[0]
        inside.shape, inside.type = value.shape, value.type
        value.shape = _permuted(value.shape, _TO_NHWC)
    if port.dtype != "float32":
        value.type = inside.type = ir.TensorType(ir.DataType[port.dtype.upper()])
        nodes.append(_linear("DequantizeLinear", inside, quantizers[0], port, f"{value.name}_real"))
        inside = nodes[-1].outputs[0]
    for node, place in users:
        node.replace_input_with(place, inside)
    graph.insert_before(next(iter(graph)), nodes)
    if port.dtype != "float32":
        _drop_same(graph, nodes[-1], quantizers)


def _drop_same(graph: ir.Graph, dequantize: ir.Node, quantizers: list[ir.Node]) -> None:
    """Takes DequantizeLinear -> QuantizeLinear away where both have one format: the integers are there already."""
    for node in quantizers:
        if _scale_and_zero_point(node) == _scale_and_zero_point(dequantize):
            ir.convenience.replace_all_uses_with(node.outputs[0], _source(dequantize))
            graph.remove(node, safe=True)
    if not tuple(dequantize.outputs[0].uses()):
        graph.remove(dequantize, safe=True)


def _change_output(graph: ir.Graph, index: int, port: Port) -> None:
    value = graph.outputs[index]
    name, shape = str(value.name), value.shape
    value.name = f"{name}_real" if port.dtype != "float32" else f"{name}_nchw"
    nodes = []
    inside = value
    dequantize = _dequantizer(value)
    if port.dtype != "float32" and dequantize is not None:
        source = _source(dequantize)
        if _scale_and_zero_point(dequantize)[1:] == (port.zero_point, port.dtype) and not source.is_graph_output():
            inside = source
        else:
            nodes.append(_linear("QuantizeLinear", value, dequantize, port, f"{name}_integers"))
            inside = nodes[-1].outputs[0]
    if port.layout == "nhwc":
        nodes.append(_transpose(inside, _TO_NHWC, name))
        inside = nodes[-1].outputs[0]
    inside.name = name
    inside.shape = _permuted(shape, _TO_NHWC) if port.layout == "nhwc" else shape
    inside.type = ir.TensorType(ir.DataType[port.dtype.upper()]) if port.dtype != "float32" else value.type
    graph.outputs[index] = inside
    graph.extend(nodes)
    if dequantize is not None and not tuple(value.uses()) and not value.is_graph_output():
        graph.remove(dequantize, safe=True)


def _source(dequantize: ir.Node) -> ir.Value:
    source = dequantize.inputs[0]
    if source is None:
        raise InputError(f"DequantizeLinear {dequantize.name} has no input")
    return source


def _transpose(value: ir.Value, order: tuple[int, ...], name: str) -> ir.Node:
    node = ir.node("Transpose", [value], {"perm": list(order)}, name=f"{name}_transpose")
    node.outputs[0].name, node.outputs[0].type = name, value.type
    return node


def _linear(op_type: str, value: ir.Value, like: ir.Node, port: Port, name: str) -> ir.Node:
    """A QuantizeLinear or DequantizeLinear with the scale of `like` and the border's zero point."""
    graph = like.graph
    if not isinstance(graph, ir.Graph):
        raise InputError(f"{like.op_type} {like.name} is not part of the main graph")
    dtype = ir.DataType[port.dtype.upper()]
    tensor = ir.Tensor(np.asarray(port.zero_point, port.dtype), name=f"{name}_zero_point")
    zero_point = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(()), type=ir.TensorType(dtype))
    graph.register_initializer(zero_point)
    node = ir.node(op_type, [value, like.inputs[1], zero_point], name=name)
    node.outputs[0].name = name
    node.outputs[0].shape = value.shape
    node.outputs[0].type = ir.TensorType(dtype if op_type == "QuantizeLinear" else ir.DataType.FLOAT)
    return node


def _permuted(shape: ir.Shape | None, order: tuple[int, ...]) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[place] for place in order])
