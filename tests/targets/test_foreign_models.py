"""Models that other tools quantized, in both runtimes: their own integers, within two steps of the model itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as ortq
from random_calibration import RandomImages

from edgeship.calibration.writing.qdq import output_steps
from edgeship.targets.base import ConvertOptions, load
from edgeship.targets.onnxruntime.session import open_reference
from edgeship.targets.tflite.flatfile import element_types
from edgeship.targets.tflite.flatfile import load as load_file

Array = np.ndarray[Any, np.dtype[Any]]
SHAPE = (1, 3, 12, 12)
TARGETS = ("onnxruntime", "tflite")


def _model(nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: tuple[int, ...] = SHAPE) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def _random(*shape: int) -> Array:
    values = np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
    return values.astype(np.float32)


def network() -> onnx.ModelProto:
    """Plain and depthwise convolutions, a residual, pools, a matrix, a dense layer."""
    node = helper.make_node
    constants = {
        "w0": _random(8, 3, 3, 3),
        "b0": _random(8),
        "w1": _random(8, 1, 3, 3),
        "w2": _random(8, 8, 1, 1),
        "w3": _random(8, 6),
        "b3": _random(6),
        "w4": _random(5, 54),
        "b4": _random(5),
        "low": np.float32(0),
        "high": np.float32(6),
        "flat": np.array([1, -1], np.int64),
        "rows": np.array([1, 8, 9], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], "c0", pads=[1] * 4, strides=[2, 2]),
        node("Clip", ["c0", "low", "high"], ["r0"], "r0"),
        node("Conv", ["r0", "w1"], ["c1"], "c1", pads=[1] * 4, group=8),
        node("Relu", ["c1"], ["r1"], "r1"),
        node("Conv", ["r1", "w2"], ["c2"], "c2"),
        node("Add", ["r0", "c2"], ["a"], "a"),
        node("MaxPool", ["a"], ["p"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "rows"], ["columns"], "columns"),
        node("Transpose", ["columns"], ["t"], "t", perm=[0, 2, 1]),
        node("MatMul", ["t", "w3"], ["m"], "m"),
        node("Add", ["m", "b3"], ["mb"], "mb"),
        node("Relu", ["mb"], ["mr"], "mr"),
        node("Reshape", ["mr", "flat"], ["f"], "f"),
        node("Gemm", ["f", "w4", "b4"], ["y"], "y", transB=1),
    ]
    return _model(nodes, constants)


@dataclass(frozen=True)
class Form:
    """One way that onnxruntime's quantizer writes a model, and the least share of work that TFLite does in integers."""

    activations: str
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tflite_share: float = 1.0


FORMS = {
    "u8s8": Form("QUInt8", "QInt8"),
    "s8s8 per channel": Form("QInt8", "QInt8", {"per_channel": True}),
    "u8u8, weights asymmetric": Form("QUInt8", "QUInt8", tflite_share=0.0),
    "biases float": Form("QInt8", "QInt8", {"per_channel": True}, {"QuantizeBias": False}),
    "weights quantized in the graph": Form("QUInt8", "QInt8", {"per_channel": True}, {"AddQDQPairToWeight": True}),
    "ONNX Runtime's own pair": Form("QUInt8", "QInt8", {}, {"UseQDQContribOps": True}),
    "a pair for each reader": Form("QInt8", "QInt8", {}, {"DedicatedQDQPair": True}),
    "qoperator": Form("QUInt8", "QInt8", {"quant_format": ortq.QuantFormat.QOperator, "per_channel": True}),
}


def quantized(folder: Path, form: Form) -> Path:
    """The network as onnxruntime's quantizer writes it."""
    onnx.save(network(), folder / "float.onnx")
    types = {"activation_type": ortq.QuantType[form.activations], "weight_type": ortq.QuantType[form.weights]}
    logging.disable(logging.WARNING)
    try:
        ortq.quantize_static(
            folder / "float.onnx",
            folder / "q.onnx",
            RandomImages(SHAPE),
            **types,
            **form.options,
            extra_options=form.extra,
        )
    finally:
        logging.disable(logging.NOTSET)
    return folder / "q.onnx"


def convert(source: Path, name: str, folder: Path) -> Path:
    """The artifact of the model for the target called `name`."""
    target = load(name)
    path = folder / f"artifact{target.suffix}"
    path.write_bytes(target.convert(ir.load(source), ConvertOptions()))
    return path


def worst_steps(source: Path, artifact: Path, name: str, shape: tuple[int, ...] = SHAPE) -> float:
    """The largest difference from the model itself on four inputs, in steps of its output."""
    steps = output_steps(ir.load(source))["y"]
    assert steps
    reference, session = open_reference(source), load(name).open(artifact)
    worst = 0.0
    for seed in range(4):
        feeds = {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}
        worst = max(worst, float(np.abs(reference.run(feeds)["y"] - session.run(feeds)["y"]).max()) / steps)
    return worst


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_onnxruntime_quantized_keeps_its_integers(tmp_path: Path, form: Form, name: str) -> None:
    source = quantized(tmp_path, form)
    artifact = convert(source, name, tmp_path)
    assert worst_steps(source, artifact, name) <= 2.01
    share = load(name).integer_share(artifact)
    assert share.share >= (form.tflite_share if name == "tflite" else 1.0), share.float_layers


def test_asymmetric_weights_are_named_as_what_keeps_a_layer_in_float(tmp_path: Path) -> None:
    source = quantized(tmp_path, FORMS["u8u8, weights asymmetric"])
    notes = [str(note) for note in load("tflite").notes(ir.load(source))]
    assert len([note for note in notes if "zero points" in note and "TFLite's are symmetric" in note]) >= 3, notes
    assert not load("tflite").notes(ir.load(quantized(tmp_path, FORMS["s8s8 per channel"])))


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_what_is_quantized_at_run_time_keeps_its_weights_in_hybrid_kernels(tmp_path: Path, per_channel: bool) -> None:
    onnx.save(network(), tmp_path / "float.onnx")
    kinds = ["MatMul", "Gemm"]
    options = {"weight_type": ortq.QuantType.QInt8, "per_channel": per_channel, "op_types_to_quantize": kinds}
    logging.disable(logging.WARNING)
    try:
        ortq.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "q.onnx", **options)
    finally:
        logging.disable(logging.NOTSET)
    source = tmp_path / "q.onnx"
    integers = {"MatMulInteger", "DynamicQuantizeLinear"}
    assert integers & {node.op_type for node in onnx.load(source).graph.node}
    artifact = convert(source, "tflite", tmp_path)
    types = element_types()
    kinds_held = {types[t.type] for t in load_file(artifact).subgraphs[0].tensors if t.quantization is not None}
    assert "INT8" in kinds_held
    feeds = {"x": np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)}
    exact, theirs, ours = (
        open_reference(tmp_path / "float.onnx").run(feeds)["y"],
        open_reference(source).run(feeds)["y"],
        load("tflite").open(artifact).run(feeds)["y"],
    )
    span = float(np.abs(exact).max())
    assert np.abs(theirs - ours).max() <= 0.02 * span  # both round activations to 8 bits, each for itself
    assert np.abs(ours - exact).max() <= 0.03 * span


def qcdq() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """As Brevitas exports: QuantizeLinear, Clip, DequantizeLinear; weights and bias stored as integers."""
    node = helper.make_node
    weights = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    constants = {
        "s": np.float32(0.02), "z": np.int8(0), "low": np.int8(-128), "high": np.int8(127),
        "w": weights, "ws": np.linspace(0.001, 0.003, 4).astype(np.float32), "wz": np.zeros(4, np.int8),
        "narrow": np.int8(-127), "b": np.arange(-2, 2, dtype=np.int32) * 1000,
        "bs": (np.float32(0.02) * np.linspace(0.001, 0.003, 4).astype(np.float32)), "bz": np.zeros(4, np.int32),
        "ys": np.float32(0.03), "uz": np.uint8(0), "ulow": np.uint8(0), "uhigh": np.uint8(255),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("Clip", ["xq", "low", "high"], ["xc"]),
        node("DequantizeLinear", ["xc", "s", "z"], ["xd"]),
        node("Clip", ["w", "narrow", "high"], ["wc"]),
        node("DequantizeLinear", ["wc", "ws", "wz"], ["wd"], axis=0),
        node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        node("Conv", ["xd", "wd", "bd"], ["c"], pads=[1] * 4),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "ys", "uz"], ["yq"]),
        node("Clip", ["yq", "ulow", "uhigh"], ["yc"]),
        node("DequantizeLinear", ["yc", "ys", "uz"], ["y"]),
    ]
    return _model(nodes, constants), SHAPE


def pt2e() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """As a torch PT2E export: weights dequantized, biases float, the product and its bias apart."""
    node = helper.make_node
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.02), "z": np.int8(5), "ys": np.float32(0.05), "yz": np.int8(-9),
        "w": rng.integers(-127, 128, (6, 4)).astype(np.int8), "ws": np.linspace(0.001, 0.003, 6).astype(np.float32),
        "wz": np.zeros(6, np.int8), "b": rng.normal(size=6).astype(np.float32),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        node("MatMul", ["xd", "wt"], ["m"]),
        node("Add", ["b", "m"], ["mb"]),
        node("Relu", ["mb"], ["r"]),
        node("QuantizeLinear", ["r", "ys", "yz"], ["yq"]),
        node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    return _model(nodes, constants, (1, 7, 4)), (1, 7, 4)


def from_tflite() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """As tf2onnx reads int8 TFLite: images NHWC, integers turned and reshaped, weights already in ONNX's order."""
    node = helper.make_node
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.02), "z": np.int8(5), "ys": np.float32(0.03), "yz": np.int8(-128),
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "ws": np.linspace(0.001, 0.003, 4).astype(np.float32),
        "wz": np.zeros(4, np.int8), "flat": np.array([1, -1], np.int64),
        "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("Transpose", ["xq"], ["xt"], perm=[0, 3, 1, 2]),
        node("DequantizeLinear", ["xt", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["c"], strides=[2, 2], pads=[0, 0, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "ys", "yz"], ["yq"]),
        node("Concat", ["yq", "yq"], ["two"], axis=1),
        node("Transpose", ["two"], ["back"], perm=[0, 2, 3, 1]),
        node("Reshape", ["back", "flat"], ["rows"]),
        node("DequantizeLinear", ["rows", "ys", "yz"], ["y"]),
    ]
    return _model(nodes, constants, (1, 12, 12, 3)), (1, 12, 12, 3)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("make", [qcdq, pt2e, from_tflite], ids=lambda make: make.__name__)
def test_what_other_tools_quantized_keeps_its_integers(tmp_path: Path, make: Any, name: str) -> None:
    model, shape = make()
    source = tmp_path / "model.onnx"
    onnx.save(model, source)
    artifact = convert(source, name, tmp_path)
    assert worst_steps(source, artifact, name, shape) <= 1.01
    in_float = name == "onnxruntime" and make is pt2e  # it has no integer product that adds a float bias
    assert load(name).integer_share(artifact).share == (0.0 if in_float else 1.0)


def test_weights_and_scales_are_stored_in_tflite_as_they_were(tmp_path: Path) -> None:
    model, _ = qcdq()
    onnx.save(model, tmp_path / "model.onnx")
    file = load_file(convert(tmp_path / "model.onnx", "tflite", tmp_path))
    weights = {initializer.name: numpy_helper.to_array(initializer) for initializer in model.graph.initializer}
    held = {
        file.buffers[tensor.buffer].data.tobytes(): tensor.quantization.scale
        for tensor in file.subgraphs[0].tensors
        if file.buffers[tensor.buffer].data is not None and tensor.quantization is not None
    }
    kernel = np.maximum(weights["w"], -127).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(held[kernel.tobytes()], weights["ws"])
    assert weights["b"].tobytes() in held
