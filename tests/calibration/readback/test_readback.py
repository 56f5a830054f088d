"""Quantized models of others, read back into QDQ: every tensor holds the same integers as before, in ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as ortq
from random_calibration import RandomImages

from edgeship.calibration import readback
from edgeship.calibration.errors import UnsupportedError
from edgeship.calibration.readback import QOPERATORS, read_back
from edgeship.calibration.readback.quantized import find_quantized, form

Array = np.ndarray[Any, np.dtype[Any]]
SHAPE = (1, 3, 8, 8)
QDQ = Path(__file__).parents[2] / "golden" / "residual.qdq.onnx"


def _weights(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def float_model() -> onnx.ModelProto:
    """One of each operator that ONNX Runtime quantizes into an operator of its own."""
    node = helper.make_node
    constants = {
        "w0": _weights(4, 3, 3, 3),
        "b0": _weights(4),
        "w1": _weights(6, 5),
        "w2": _weights(20, 6),
        "shape": np.array([1, 4, 6], np.int64),
        "flat": np.array([1, 20], np.int64),
        "axes": np.array([2], np.int64),
    }
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["conv"], "conv", pads=[1] * 4, strides=[2, 2]),
        node("LeakyRelu", ["conv"], ["leaky"], "leaky", alpha=0.1),
        node("Sigmoid", ["conv"], ["gate"], "gate"),
        node("Mul", ["leaky", "gate"], ["gated"], "gated"),
        node("Add", ["gated", "conv"], ["sum"], "sum"),
        node("AveragePool", ["sum"], ["pooled"], "pooled", kernel_shape=[2, 2]),
        node("MaxPool", ["sum"], ["largest"], "largest", kernel_shape=[2, 2]),
        node("Concat", ["pooled", "largest"], ["joined"], "joined", axis=3),
        node("ReduceMean", ["joined", "axes"], ["mean"], "mean", keepdims=0),
        node("Reshape", ["mean", "shape"], ["rows"], "rows"),
        node("MatMul", ["rows", "w1"], ["product"], "product"),
        node("Reshape", ["product", "flat"], ["flattened"], "flattened"),
        node("Gemm", ["flattened", "w2"], ["logits"], "logits"),
        node("Softmax", ["logits"], ["y"], "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def quantized(folder: Path, source: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    """The model as onnxruntime's own quantizer writes it."""
    onnx.save(source, folder / "float.onnx")
    logging.disable(logging.WARNING)
    try:
        ortq.quantize_static(folder / "float.onnx", folder / "quantized.onnx", RandomImages(SHAPE), **options)
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(folder / "quantized.onnx")


def every_tensor(model: onnx.ModelProto, names: list[str], feeds: dict[str, Array]) -> dict[str, Array]:
    """The values of `names`, computed without graph optimisations."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, feeds), strict=True))


def assert_same_integers(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, Array], most: int) -> None:
    """Every integer tensor that both models name is the same, within `most` steps."""
    made = {name for node in after.graph.node for name in node.output}
    names = [name for node in before.graph.node for name in node.output if name in made]
    expected, seen = every_tensor(before, names, feeds), every_tensor(after, names, feeds)
    compared = 0
    for name in names:
        if expected[name].dtype.itemsize == 1:
            compared += 1
            assert seen[name].dtype == expected[name].dtype, name
            worst = np.abs(seen[name].astype(int) - expected[name].astype(int)).max()
            assert worst <= most, f"{name}: {worst} steps"
    assert compared >= 1


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("kind", ["QUInt8", "QInt8"])
def test_qoperator_models_hold_the_same_integers_as_qdq(tmp_path: Path, kind: str, per_channel: bool) -> None:
    types = {"activation_type": ortq.QuantType[kind], "weight_type": ortq.QuantType[kind]}
    before = quantized(
        tmp_path, float_model(), quant_format=ortq.QuantFormat.QOperator, per_channel=per_channel, **types
    )
    assert set(QOPERATORS) - {"QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearWhere"} <= {
        n.op_type for n in before.graph.node
    }
    after = ir.to_proto(read_back(ir.from_proto(before)))
    assert not {node.op_type for node in after.graph.node} & set(QOPERATORS)
    feeds = {"x": np.random.default_rng(7).normal(size=SHAPE).astype(np.float32)}
    assert_same_integers(
        before, after, feeds, most=1
    )  # ONNX Runtime's own operators round sums of theirs in another way


def _qdq(nodes: list[onnx.NodeProto], constants: dict[str, Array], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, [1, 4, 4, 2])],
        [helper.make_empty_tensor_value_info("y")],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 9
    return onnx.shape_inference.infer_shapes(model)


PARAMETERS = {"s": np.float32(0.1), "z": np.int8(3)}


def test_an_operator_that_moves_integers_moves_the_numbers_behind_them() -> None:
    node = helper.make_node
    before = _qdq(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("Transpose", ["q"], ["turned"], perm=[0, 3, 1, 2]),
            node("Pad", ["turned", "pads"], ["padded"]),
            node("Concat", ["padded", "padded"], ["joined"], axis=1),
            node("Clip", ["joined", "low", "high"], ["clipped"]),
            node("DequantizeLinear", ["clipped", "s", "z"], ["y"]),
        ],
        {
            **PARAMETERS,
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
            "low": np.int8(-100),
            "high": np.int8(90),
        },
    )
    after = ir.to_proto(read_back(ir.from_proto(before)))
    for each in after.graph.node:
        if each.op_type in ("Transpose", "Pad", "Concat", "Clip"):
            makers = {name: n.op_type for n in after.graph.node for name in n.output}
            assert makers[each.input[0]] == "DequantizeLinear", each.op_type
    feeds = {"x": (10 * np.random.default_rng(7).normal(size=(1, 4, 4, 2))).astype(np.float32)}
    assert_same_integers(before, after, feeds, most=0)


def test_an_integer_input_means_what_its_reader_says() -> None:
    node = helper.make_node
    before = _qdq(
        [
            node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2]),
            node("Reshape", ["turned", "shape"], ["flat"]),
            node("DequantizeLinear", ["flat", "s", "z"], ["real"]),
            node("Relu", ["real"], ["relu"]),
            node("QuantizeLinear", ["relu", "s", "z"], ["y"]),
        ],
        {**PARAMETERS, "shape": np.array([1, -1], np.int64)},
        TensorProto.INT8,
    )
    after = ir.to_proto(read_back(ir.from_proto(before)))
    assert [each.op_type for each in after.graph.node][:3] == ["DequantizeLinear", "Transpose", "QuantizeLinear"]
    feeds = {"x": np.random.default_rng(7).integers(-128, 128, (1, 4, 4, 2)).astype(np.int8)}
    assert_same_integers(before, after, feeds, most=0)


def test_a_choice_between_integers_is_one_between_numbers() -> None:
    node = helper.make_node
    before = _qdq(
        [
            node(
                "QLinearWhere", ["yes", "x", "s", "z", "x", "t", "z", "t", "z"], ["y"], "where", domain="com.microsoft"
            ),
            node("DequantizeLinear", ["y", "t", "z"], ["real"]),
        ],
        {**PARAMETERS, "t": np.float32(0.2), "yes": np.array([True, False])},
        TensorProto.INT8,
    )
    after = ir.to_proto(read_back(ir.from_proto(before)))
    feeds = {"x": np.random.default_rng(7).integers(-128, 128, (1, 4, 4, 2)).astype(np.int8)}
    assert_same_integers(before, after, feeds, most=1)


def test_numbers_that_are_moved_between_the_pair_and_a_layer_are_quantized_once_more() -> None:
    """As Brevitas writes a MaxPool: nothing is said of what it makes, which is what integers stand for all the same."""
    text = """g (float[1,4,8,8] x) => (float[1,3] y)
        <float scale = {0.1}, uint8 zero = {100}, float steps = {0.02}, int8 none = {0}>
        { a = QuantizeLinear(x, scale, zero) b = DequantizeLinear(a, scale, zero)
          c = MaxPool <kernel_shape=[2,2], strides=[2,2]> (b) d = Flatten(c)
          v = DequantizeLinear(w, steps, none) y = MatMul(d, v) }"""
    graph = onnx.parser.parse_graph(text)
    graph.initializer.append(
        numpy_helper.from_array(np.random.default_rng(0).integers(-127, 128, (64, 3), np.int8), "w")
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = read_back(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    written = [node.op_type for node in model.graph if node.name != "v"]
    pair = ["QuantizeLinear", "DequantizeLinear"]
    assert [op for op in written if op != "MatMul"] == [*pair, "MaxPool", *pair, "Flatten", *pair, "DequantizeLinear"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32) * 5}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    before, after = (
        onnxruntime.InferenceSession(each.SerializeToString(), options).run(None, feeds)[0]
        for each in (proto, ir.to_proto(model))
    )
    assert np.array_equal(before, after)
    assert read_back(model) is model


def test_a_clip_to_the_bounds_of_the_type_is_no_clip() -> None:
    node = helper.make_node
    before = _qdq(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("Clip", ["q", "low", "high"], ["clipped"]),
            node("DequantizeLinear", ["clipped", "s", "z"], ["y"]),
        ],
        {**PARAMETERS, "low": np.int8(-128), "high": np.int8(127)},
    )
    after = read_back(ir.from_proto(before))
    assert [each.op_type for each in after.graph] == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize("turned_first", [False, True], ids=["dequantized first", "turned first"])
def test_a_weight_that_the_graph_quantizes_clips_and_turns_is_a_constant(turned_first: bool) -> None:
    node = helper.make_node
    weights = _weights(3, 3, 2, 5)
    scales = (np.abs(weights).max((0, 1, 2)) / 127).astype(np.float32)
    chain = [
        node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=3),
        node("Clip", ["wq", "low", "high"], ["wc"]),
        *(
            [
                node("Transpose", ["wc"], ["wt"], perm=[3, 2, 0, 1]),
                node("DequantizeLinear", ["wt", "ws", "wz"], ["wd"], axis=0),
            ]
            if turned_first
            else [
                node("DequantizeLinear", ["wc", "ws", "wz"], ["wr"], axis=3),
                node("Transpose", ["wr"], ["wd"], perm=[3, 2, 0, 1]),
            ]
        ),
        node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2]),
        node("Conv", ["turned", "wd"], ["y"]),
    ]
    constants = {
        "w": weights, "ws": scales, "wz": np.zeros(5, np.int8), "low": np.int8(-127), "high": np.int8(127),
    }  # fmt: skip
    before = _qdq(chain, constants)
    after = ir.to_proto(read_back(ir.from_proto(before)))
    assert sorted(each.op_type for each in after.graph.node) == ["Conv", "DequantizeLinear", "Transpose"]
    feeds = {"x": np.random.default_rng(7).normal(size=(1, 4, 4, 2)).astype(np.float32)}
    expected, seen = (every_tensor(model, ["y"], feeds)["y"] for model in (before, after))
    np.testing.assert_array_equal(seen, expected)


def test_a_float_model_is_left_alone_and_says_that_it_is_one() -> None:
    model = ir.from_proto(float_model())
    assert read_back(model) is model
    assert not find_quantized(model)
    assert not form(model)


def test_a_model_that_says_it_as_qdq_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.load(QDQ)
    assert read_back(model) is model
    monkeypatch.setattr(readback, "is_plain", lambda graph: False)
    rewritten = read_back(model)
    assert rewritten is not model
    assert ir.to_proto(rewritten) == ir.to_proto(model)


@pytest.mark.parametrize("seen", ["integers that are moved", "a weight that is turned", "a constant that is unused"])
def test_a_model_that_needs_a_rewrite_is_copied(seen: str) -> None:
    node = helper.make_node
    middle = {
        "integers that are moved": [node("Transpose", ["q"], ["t"]), node("DequantizeLinear", ["t", "s", "z"], ["y"])],
        "a weight that is turned": [
            node("DequantizeLinear", ["w", "s", "z"], ["real"]),
            node("Transpose", ["real"], ["turned"], perm=[3, 2, 1, 0]),
            node("DequantizeLinear", ["q", "s", "z"], ["x_real"]),
            node("Mul", ["x_real", "turned"], ["y"]),
        ],
        "a constant that is unused": [node("DequantizeLinear", ["q", "s", "z"], ["y"])],
    }
    weight = {} if seen == "integers that are moved" else {"w": np.ones((2, 4, 4, 1), np.int8)}
    constants = {**PARAMETERS, **weight}
    before = ir.from_proto(_qdq([node("QuantizeLinear", ["x", "s", "z"], ["q"]), *middle[seen]], constants))
    after = read_back(before)
    assert after is not before
    assert ir.to_proto(after) != ir.to_proto(before)


def test_the_form_of_a_quantized_model_is_told_in_words(tmp_path: Path) -> None:
    source, only = float_model(), {"op_types_to_quantize": ["Conv", "MatMul"]}
    assert form(ir.from_proto(quantized(tmp_path, source, quant_format=ortq.QuantFormat.QDQ, **only))) == "QDQ"
    other = ir.from_proto(quantized(tmp_path, source, quant_format=ortq.QuantFormat.QOperator, **only))
    assert form(other).startswith("quantized operators (QOperator)")


def test_channels_last_is_refused_by_the_nodes_name() -> None:
    node = helper.make_node("QLinearAveragePool", ["x", "s", "z", "s", "z"], ["y"], "pool", domain="com.microsoft")
    node.attribute.extend([helper.make_attribute("kernel_shape", [2, 2]), helper.make_attribute("channels_last", 1)])
    model = ir.from_proto(_qdq([node], PARAMETERS, TensorProto.INT8))
    with pytest.raises(UnsupportedError, match="cannot be read") as caught:
        read_back(model)
    assert "pool" in str(caught.value.findings[0])
