"""Layers that stay float between quantized ones have their own weights in ONNX Runtime, not rounded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import InputError
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET
from edgeship.targets.onnxruntime.session import open_reference

RNG = np.random.default_rng(0)
SPREAD = np.logspace(-3, 0, 8, dtype=np.float32)
"""Sizes of channels: with one scale for all of them the small ones would be nothing."""
LAYERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "depthwise": ("Conv", (8, 1, 3, 3), {"group": 8, "pads": [1] * 4}),
    "pointwise": ("Conv", (8, 8, 1, 1), {}),
    "transposed": ("ConvTranspose", (8, 8, 1, 1), {}),
    "matrix": ("Gemm", (8, 8), {"transB": 1}),
    "product": ("MatMul", (8, 8), {}),
}


def shape_of(layer: str) -> tuple[int, ...]:
    return (2, 8) if layer in ("matrix", "product") else (1, 8, 6, 6)


def model(layer: str, activations: list[str]) -> ir.Model:
    operator, shape, attributes = LAYERS[layer]
    weights = RNG.normal(size=shape).astype(np.float32)
    channel = 1 if operator in ("ConvTranspose", "MatMul") else 0
    weights *= SPREAD.reshape([-1 if axis == channel else 1 for axis in range(len(shape))])
    data = shape_of(layer)
    constants = {
        "w": weights, "b": SPREAD, "low": np.float32(0), "high": np.float32(6), "zero": np.int8(-128),
        "x_scale": np.float32(0.02), "y_scale": np.float32(6 / 255),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "zero"], ["x_d"]),
        *(
            [helper.make_node("MatMul", ["x_d", "w"], ["v"]), helper.make_node("Add", ["v", "b"], ["v0"])]
            if operator == "MatMul"
            else [helper.make_node(operator, ["x_d", "w", "b"], ["v0"], **attributes)]
        ),
    ]
    for place, activation in enumerate(activations):
        bounds = ["low", "high"] if activation == "Clip" else []
        nodes.append(helper.make_node(activation, [f"v{place}", *bounds], [f"v{place + 1}"]))
    nodes += [
        helper.make_node("QuantizeLinear", [f"v{len(activations)}", "y_scale", "zero"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "y_scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "float between integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, data)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, data)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


@pytest.mark.parametrize("activations", [[], ["Relu"], ["Clip"], ["Relu", "Clip"]])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_float_layer_between_integers_keeps_its_weights(layer: str, activations: list[str], tmp_path: Path) -> None:
    source, path = model(layer, activations), tmp_path / "model.onnx"
    path.write_bytes(TARGET.convert(source, ConvertOptions()))
    feeds = {"x": RNG.uniform(0, 5, shape_of(layer)).astype(np.float32)}
    expected = open_reference(ir.serde.serialize_model(source).SerializeToString()).run(feeds)["y"]
    steps = np.abs(TARGET.open(path).run(feeds)["y"] - expected) / (6 / 255)
    assert steps.max() < 1.001
    assert np.mean(steps > 0.5) < 0.02


def test_what_onnxruntime_writes_into_a_layer_does_not_round_it_either(tmp_path: Path) -> None:
    source, path = model("pointwise", ["Relu"]), tmp_path / "model.onnx"
    (conv,) = (node for node in source.graph if node.op_type == "Conv")
    term = ir.Value(name="term", const_value=ir.tensor(np.full((1, 8, 1, 1), 0.5, np.float32), name="term"))
    source.graph.register_initializer(term)
    relu = next(iter(conv.outputs[0].uses()))[0]
    relu.prepend(more := ir.node("Add", [conv.outputs[0], term]))
    relu.replace_input_with(0, more.outputs[0])
    path.write_bytes(TARGET.convert(source, ConvertOptions()))
    feeds = {"x": RNG.uniform(0, 5, shape_of("pointwise")).astype(np.float32)}
    expected = open_reference(ir.serde.serialize_model(source).SerializeToString()).run(feeds)["y"]
    assert np.abs(TARGET.open(path).run(feeds)["y"] - expected).max() < 1.001 * 6 / 255


def test_a_float_layer_that_nothing_quantizes_is_left_as_it_is() -> None:
    source = model("depthwise", [])
    (conv,) = (node for node in source.graph if node.op_type == "Conv")
    source.graph.outputs[0] = conv.outputs[0]
    converted = onnx.load_from_string(TARGET.convert(source, ConvertOptions()))
    assert not [node for node in converted.graph.node if node.op_type == "Max"]


def test_integer_only_is_no_wish_that_onnxruntime_can_be_told() -> None:
    with pytest.raises(InputError, match=r"integer_only: ONNX Runtime chooses its kernels by itself.*left out"):
        TARGET.convert(model("pointwise", []), ConvertOptions(integer_only=True))
