"""Returns a float32 model of one that somebody exported in float16, or for pixels as uint8.

Half precision: every float16 tensor becomes float32, which holds its values exactly; what is computed from them loses
less. Pixels: an input of uint8 that the model itself makes floats becomes a float32 input for the same numbers, 0..255;
what moves values on the way (Transpose, Slice ...) moves floats, and the Cast to float has nothing left to do.
"""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError

MOVING = frozenset(
    {"DepthToSpace", "Flatten", "Gather", "Identity", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)
"""Operators that give the values of their first input other places, whatever type they have."""
PIXELS_KEY = "edgeship.pixels"
"""Metadata: JSON, the names of the inputs that `take_floats` changed."""
_NUMBERS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64)
"""Types that a Cast makes of 0..255 alike, from uint8 and from float32."""


def widen(model: ir.Model) -> int:
    """How many tensors and values of the model, which is changed in place, were float16 and are float32."""
    count = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16:
                value.const_value = _widened(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                node.attributes[name] = _widened_attribute(node, attribute)
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.dtype == ir.DataType.FLOAT16:
                value.dtype = ir.DataType.FLOAT
                count += 1
    return count


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(tensor.numpy(), np.float32), name=tensor.name)


def _widened_attribute(node: ir.Node, attribute: ir.Attr) -> ir.Attr:
    """The attribute without float16: a tensor, or the type that the node makes."""
    if attribute.is_ref():
        return attribute
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT16:
        return ir.AttrTensor(attribute.name, _widened(attribute.as_tensor()))
    names_type = attribute.name == "dtype" or (attribute.name == "to" and node.op_type == "Cast")
    if names_type and attribute.type == ir.AttributeType.INT and attribute.as_int() == ir.DataType.FLOAT16:
        return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    return attribute


def take_floats(model: ir.Model, where: str) -> list[str]:
    """The names of the inputs of uint8, which take the same numbers as float32 in the changed model.

    They are written into its metadata. Raises InputError where the model computes with the integers themselves.
    """
    pixels = [value for value in model.graph.inputs if value.dtype == ir.DataType.UINT8]
    names = [str(value.name) for value in pixels]
    for value in pixels:
        waiting = [value]
        while waiting:
            each = waiting.pop()
            each.dtype = ir.DataType.FLOAT
            for node, place in each.uses():
                waiting += _moved(node, place, f"{where}: input {value.name!r} is UINT8")
    if names:
        model.metadata_props[PIXELS_KEY] = json.dumps(names)
    return names


def pixel_inputs(model: ir.Model) -> frozenset[str]:
    """The names of the inputs that were of uint8, so that no other numbers than pixels can be meant for them."""
    return frozenset(json.loads(model.metadata_props.get(PIXELS_KEY, "[]")))


def _moved(node: ir.Node, place: int, where: str) -> list[ir.Value]:
    """The values that hold uint8 behind `node`, which takes them at `place`."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) in {int(each) for each in _NUMBERS}:
        return []
    if node.op_type in MOVING and place == 0:
        return list(node.outputs)
    raise InputError(
        f"{where}, and {node.op_type} {node.name or node.outputs[0].name!r} computes with these integers; accepted: "
        'FLOAT, or UINT8 that a Cast makes float; export the model with a float32 input (io_dtype = "uint8" gives its '
        "artifacts one of uint8)"
    )
