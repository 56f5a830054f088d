"""Models of which only the weights are small: float16 constants, and int8 ones in TFLite's hybrid kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.targets.onnxruntime.session import open_reference
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.flatfile import element_types, load, operator_names
from edgeship.targets.tflite.session import Kernels, TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Build = Callable[..., onnx.ModelProto]
IMAGE = (2, 8, 7, 7)
KERNELS: tuple[Kernels, ...] = ("default", "builtin", "reference")

LAYERS: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...], int, int, dict[str, Any]]] = {
    "convolution": ("Conv", IMAGE, (16, 8, 3, 3), 0, 16, {"pads": [1] * 4}),
    "convolution 1-D": ("Conv", (1, 8, 20), (6, 8, 5), 0, 6, {"strides": [2]}),
    "depthwise": ("Conv", IMAGE, (8, 1, 3, 3), 0, 8, {"group": 8, "pads": [0, 1, 1, 0]}),
    "depthwise with a multiplier": ("Conv", IMAGE, (16, 1, 3, 3), 0, 16, {"group": 8}),
    "groups of several channels": ("Conv", IMAGE, (6, 4, 3, 3), 0, 6, {"group": 2, "pads": [1] * 4}),
    "transposed": ("ConvTranspose", IMAGE, (8, 6, 3, 3), 1, 6, {"strides": [2, 2], "pads": [1, 0, 1, 0]}),
    "transposed, dilated": ("ConvTranspose", IMAGE, (8, 6, 3, 3), 1, 6, {"strides": [2, 1], "dilations": [2, 2]}),
    "transposed 1-D": ("ConvTranspose", (2, 8, 9), (8, 6, 4), 1, 6, {"strides": [2]}),
    "transposed in many groups": ("ConvTranspose", (2, 20, 5, 5), (20, 3, 3, 3), 1, 30, {"group": 10}),
    "dense": ("Gemm", (3, 40), (12, 40), 0, 12, {"transB": 1}),
    "dense, columns": ("Gemm", (3, 40), (40, 12), 1, 12, {}),
    "product": ("MatMul", (2, 5, 24), (24, 10), 1, 0, {}),
    "products": ("MatMul", (3, 5, 24), (3, 24, 10), 2, 0, {}),
}
"""Operator, shapes of data and weights, the weights' output axis, the bias' size, attributes."""


def weight_only(model_of: Build, name: str, *, per_tensor: bool = False) -> onnx.ModelProto:
    """A layer whose weights are int8 and whose activations are float."""
    op, shape, weights, axis, bias, attributes = LAYERS[name]
    rng = np.random.default_rng(3)
    channels = weights[axis]
    scale = np.float32(0.01) if per_tensor else rng.uniform(0.005, 0.02, channels).astype(np.float32)
    constants: dict[str, Array] = {
        "w": rng.integers(-127, 128, weights).astype(np.int8),
        "s": np.asarray(scale),
        "z": np.zeros(np.shape(scale), np.int8),
    }
    if bias:
        constants["b"] = rng.normal(size=bias).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], axis=axis),
        helper.make_node(op, ["x", "wd", *(["b"] if bias else [])], ["y"], "layer", **attributes),
    ]
    return model_of(nodes, {"x": shape}, ["y"], constants)


def kinds(path: Path) -> Counter[tuple[str, str]]:
    """How often each operator is there, with the type of its second operand."""
    model = load(path)
    names, types, graph = operator_names(model), element_types(), model.subgraphs[0]
    return Counter(
        (names[op.opcodeIndex], types[graph.tensors[op.inputs[1]].type] if len(op.inputs) > 1 else "")
        for op in graph.operators
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_int8_weights_computes_what_the_simulation_does(
    model_of: Build, convert: Any, name: str, kernels: Kernels
) -> None:
    model = weight_only(model_of, name)
    path = convert(model)
    x = (np.random.default_rng(5).normal(size=LAYERS[name][1]) * 2 + 0.3).astype(np.float32)
    expected = open_reference(to_bytes(TARGET.reference(ir.from_proto(model)))).run({"x": x})["y"]
    plain = open_reference(model.SerializeToString()).run({"x": x})["y"]
    seen = TFLiteSession(path, 1, kernels).run({"x": x})["y"]
    span = float(np.abs(expected).max())
    assert np.abs(seen - expected).max() <= 2e-5 * span
    assert np.abs(expected - plain).max() > 1e-3 * span  # the simulation does round
    assert any(kind == "INT8" for _, kind in kinds(path))


def test_one_scale_for_all_channels_keeps_a_convolution_float_and_exact(model_of: Build, convert: Any) -> None:
    model = weight_only(model_of, "convolution", per_tensor=True)
    path = convert(model)
    x = np.random.default_rng(5).normal(size=IMAGE).astype(np.float32) + 1
    expected = open_reference(model.SerializeToString()).run({"x": x})["y"]
    assert len(TARGET.reference(ir.from_proto(model)).graph) == len(model.graph.node)
    for kernels in KERNELS:
        seen = TFLiteSession(path, 1, kernels).run({"x": x})["y"]
        assert np.abs(seen - expected).max() <= 1e-5 * np.abs(expected).max()


FLOAT: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...], int, dict[str, Any]]] = {
    "a window in space": ("Conv", (1, 4, 5, 6, 6), (6, 4, 2, 3, 3), 0, {}),
    "a few transposed groups": ("ConvTranspose", IMAGE, (8, 3, 3, 3), 1, {"group": 2}),
    "stacks of stacks": ("MatMul", (2, 3, 5, 24), (2, 3, 24, 10), 3, {}),
    "a repeated stack": ("MatMul", (2, 3, 5, 24), (3, 24, 10), 2, {}),
}
"""Operator, shapes of data and weights, the weights' output axis, attributes."""


@pytest.mark.parametrize("name", FLOAT)
def test_what_has_no_hybrid_kernel_stays_float_and_exact(model_of: Build, convert: Any, name: str) -> None:
    op, shape, weights, axis, attributes = FLOAT[name]
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=axis),
        helper.make_node(op, ["x", "wd"], ["y"], "layer", **attributes),
    ]
    constants = {
        "w": rng.integers(-127, 128, weights).astype(np.int8),
        "s": rng.uniform(0.01, 0.02, weights[axis]).astype(np.float32),
    }
    model = model_of(nodes, {"x": shape}, ["y"], constants)
    x = rng.normal(size=shape).astype(np.float32)
    assert [node.op_type for node in TARGET.reference(ir.from_proto(model)).graph] == ["DequantizeLinear", op]
    expected = open_reference(model.SerializeToString()).run({"x": x})["y"]
    np.testing.assert_allclose(TFLiteSession(convert(model)).run({"x": x})["y"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
def test_float16_weights_are_stored_in_float16_and_computed_in_float32(
    model_of: Build, convert: Any, kernels: Kernels
) -> None:
    rng = np.random.default_rng(3)
    cast = {"to": int(TensorProto.FLOAT)}
    nodes = [
        helper.make_node("Cast", ["w"], ["wf"], **cast),
        helper.make_node("Conv", ["x", "wf", "b"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Cast", ["m"], ["mf"], **cast),
        helper.make_node("Gemm", ["f", "mf"], ["y"]),
    ]
    constants = {
        "w": rng.normal(size=(16, 8, 3, 3)).astype(np.float16),
        "b": rng.normal(size=16).astype(np.float32),
        "m": rng.normal(size=(784, 9)).astype(np.float16),
    }
    model = model_of(nodes, {"x": IMAGE}, ["y"], constants)
    path = convert(model)
    x = rng.normal(size=IMAGE).astype(np.float32)
    expected = open_reference(model.SerializeToString()).run({"x": x})["y"]
    seen = TFLiteSession(path, 1, kernels).run({"x": x})["y"]
    assert np.abs(seen - expected).max() <= 1e-5 * np.abs(expected).max()
    assert path.stat().st_size < 2 * (constants["w"].size + constants["m"].size) + 4000
