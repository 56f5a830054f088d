"""int8 TFLite as TensorFlow writes it, and the QDQ ONNX that tf2onnx makes of it: back in TFLite, the same integers.

The network is written twice, by hand: once in TFLite's operators, once in tf2onnx's patterns (int8 in and out, integers
that are turned and reshaped between the pairs, activations in front of QuantizeLinear, per-channel weights and biases
behind DequantizeLinear). `benchmarks/official_int8.py` does the same with TensorFlow's and tf2onnx's own files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.targets.tflite.builder import Builder, Signature
from edgeship.targets.tflite.flatfile import load
from edgeship.targets.tflite.session import Kernels, TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(11)
X, STEM, DEEP, SUM, ROWS, LOGITS = (0.02, 3), (0.031, -128), (0.027, -128), (0.05, -128), (0.05, -128), (0.043, 12)
SHARES = (1 / 256, -128)
STEM_W, DEEP_W, DENSE_W = (
    RNG.integers(-127, 128, shape).astype(np.int8) for shape in ((8, 3, 3, 3), (8, 3, 3), (5, 128))
)
STEM_S, DEEP_S = (RNG.uniform(0.002, 0.006, 8).astype(np.float32) for _ in range(2))
DENSE_S = np.float32(0.0009)
STEM_B, DEEP_B, DENSE_B = (RNG.integers(-3000, 3000, count).astype(np.int32) for count in (8, 8, 5))


def tflite_file() -> bytes:
    """The network in TFLite's own operators."""
    b = Builder()

    def tensor(name: str, shape: tuple[int, ...], dtype: type, scale: Any, zero: int = 0, **given: Any) -> int:
        scales = np.atleast_1d(np.asarray(scale, np.float32))
        return b.tensor(name, shape, np.dtype(dtype), scale=scales, zero_point=np.full(scales.shape, zero), **given)

    def constant(name: str, data: Array, scale: Any, axis: int = 0) -> int:
        return tensor(name, data.shape, data.dtype.type, scale, data=data, axis=axis)

    x = tensor("x", (1, 16, 16, 3), np.int8, *X)
    plane = (1, 8, 8, 8)
    stem, deep, total = (
        tensor(name, plane, np.int8, *of) for name, of in (("stem", STEM), ("deep", DEEP), ("sum", SUM))
    )
    pooled = tensor("pool", (1, 4, 4, 8), np.int8, *SUM)
    rows, logits = tensor("rows", (1, 128), np.int8, *ROWS), tensor("logits", (1, 5), np.int8, *LOGITS)
    y = tensor("y", (1, 5), np.int8, *SHARES)
    window = {"padding": "SAME", "stride_w": 1, "stride_h": 1, "dilation_w_factor": 1, "dilation_h_factor": 1}
    kernel = constant("stem_w", STEM_W.transpose(0, 2, 3, 1), STEM_S)
    offset = constant("stem_b", STEM_B, STEM_S * np.float32(X[0]))
    strides = window | {"stride_w": 2, "stride_h": 2, "fused_activation_function": "RELU"}
    b.operator("CONV_2D", [x, kernel, offset], [stem], strides)
    kernel = constant("deep_w", DEEP_W.transpose(1, 2, 0)[None], DEEP_S, 3)
    offset = constant("deep_b", DEEP_B, DEEP_S * np.float32(STEM[0]))
    deepen = window | {"depth_multiplier": 1, "fused_activation_function": "RELU6"}
    b.operator("DEPTHWISE_CONV_2D", [stem, kernel, offset], [deep], deepen)
    b.operator("ADD", [stem, deep], [total], {})
    pool = {"padding": "VALID", "stride_w": 2, "stride_h": 2, "filter_width": 2, "filter_height": 2}
    b.operator("AVERAGE_POOL_2D", [total], [pooled], pool)
    shape = b.tensor("shape", (2,), np.dtype(np.int32), data=np.array([1, 128], np.int32))
    b.operator("RESHAPE", [pooled, shape], [rows], {})
    kernel, offset = constant("dense_w", DENSE_W, DENSE_S), constant("dense_b", DENSE_B, DENSE_S * np.float32(ROWS[0]))
    b.operator("FULLY_CONNECTED", [rows, kernel, offset], [logits], {})
    b.operator("SOFTMAX", [logits], [y], {"beta": 1.0})
    return b.finish(Signature({"x": x}, {"y": y}), {})


def onnx_model() -> onnx.ModelProto:
    """The network in tf2onnx's patterns."""
    constants: dict[str, Array] = {"six": np.float32(6), "none": np.float32(0), "flat": np.array([1, 128])}
    nodes: list[onnx.NodeProto] = []

    def pair(op: str, source: str, made: str, of: tuple[float, int]) -> str:
        constants[f"{made}_s"], constants[f"{made}_z"] = np.float32(of[0]), np.int8(of[1])
        nodes.append(helper.make_node(op, [source, f"{made}_s", f"{made}_z"], [made]))
        return made

    def real(name: str, data: Array, scale: Any) -> str:
        scale = np.asarray(scale, np.float32)
        constants.update({name: data, f"{name}_s": scale, f"{name}_z": np.zeros(scale.shape, data.dtype)})
        axis = {"axis": 0} if scale.ndim else {}
        nodes.append(
            helper.make_node("DequantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_dequant"], **axis)
        )
        return f"{name}_dequant"

    def node(op: str, inputs: list[str], made: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [made], **attributes))
        return made

    image = pair("DequantizeLinear", node("Transpose", ["x"], "turned", perm=[0, 3, 1, 2]), "image", X)
    weights = [real("stem_w", STEM_W, STEM_S), real("stem_b", STEM_B, STEM_S * np.float32(X[0]))]
    conv = node("Conv", [image, *weights], "stem_prequant", strides=[2, 2], auto_pad="SAME_UPPER")
    stem = pair(
        "DequantizeLinear", pair("QuantizeLinear", node("Relu", [conv], "stem_relu"), "stem", STEM), "stem_d", STEM
    )
    weights = [real("deep_w", DEEP_W[:, None], DEEP_S), real("deep_b", DEEP_B, DEEP_S * np.float32(STEM[0]))]
    conv = node("Conv", [stem, *weights], "deep_prequant", group=8, auto_pad="SAME_UPPER")
    cut = node("Clip", [conv, "none", "six"], "deep_clip")
    deep = pair("DequantizeLinear", pair("QuantizeLinear", cut, "deep", DEEP), "deep_d", DEEP)
    total = pair("QuantizeLinear", node("Add", [stem, deep], "sum_prequant"), "sum", SUM)
    pooled = node(
        "AveragePool", [pair("DequantizeLinear", total, "sum_d", SUM)], "pool_r", kernel_shape=[2, 2], strides=[2, 2]
    )
    turned = node("Transpose", [pair("QuantizeLinear", pooled, "pool", SUM)], "pool_turned", perm=[0, 2, 3, 1])
    rows = pair("DequantizeLinear", node("Reshape", [turned, "flat"], "rows"), "rows_d", ROWS)
    dense = node("MatMul", [rows, real("dense_w", DENSE_W.T.copy(), DENSE_S)], "dense_prequant")
    dense = node("Add", [dense, real("dense_b", DENSE_B, DENSE_S * np.float32(ROWS[0]))], "dense")
    logits = pair("DequantizeLinear", pair("QuantizeLinear", dense, "logits", LOGITS), "logits_d", LOGITS)
    pair("QuantizeLinear", node("Softmax", [logits], "shares", axis=-1), "y", SHARES)
    graph = helper.make_graph(
        nodes,
        "tf2onnx",
        [helper.make_tensor_value_info("x", TensorProto.INT8, (1, 16, 16, 3))],
        [helper.make_tensor_value_info("y", TensorProto.INT8, (1, 5))],
        [numpy_helper.from_array(np.asarray(data), name) for name, data in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("kernels", ["default", "builtin", "reference"])
def test_a_tflite_file_by_way_of_onnx_gives_the_same_integers(
    kernels: Kernels, convert: Callable[..., Path], operators: Callable[[Path], Counter[str]], tmp_path: Path
) -> None:
    source, back = tmp_path / "source.tflite", convert(onnx_model(), io_layout="nchw")
    source.write_bytes(tflite_file())
    assert operators(back) == operators(source)
    before, after = TFLiteSession(source, kernels=kernels), TFLiteSession(back, kernels=kernels)
    seen = []
    for _ in range(20):
        feeds = {"x": RNG.integers(-128, 128, (1, 16, 16, 3)).astype(np.int8)}
        expected, result = before.run(feeds)["y"], after.run(feeds)["y"]
        assert result.dtype == np.int8
        np.testing.assert_array_equal(result, expected)
        seen.append(expected)
    assert np.unique(np.stack(seen)).size > 20


def test_it_has_the_same_constants(convert: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source.tflite"
    source.write_bytes(tflite_file())

    def constants(path: Path) -> Counter[tuple[bytes, bytes]]:
        model = load(path)
        tensors = [(model.buffers[t.buffer].data, t.quantization) for t in model.subgraphs[0].tensors]
        held = [(data, quant) for data, quant in tensors if data is not None and len(data) and quant is not None]
        return Counter(
            (bytes(data), np.float32(quant.scale).tobytes()) for data, quant in held if quant.scale is not None
        )

    assert constants(convert(onnx_model())) == constants(source)
