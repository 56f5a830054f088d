"""The converter as a whole: names, signatures, fusion, borders, dynamic batch, refusals, reproducible bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.flatfile import description, load, text
from edgeship.targets.tflite.layers import packed
from edgeship.targets.tflite.packing import ALIGNMENT
from edgeship.targets.tflite.reader import schema_module
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Model = Callable[..., onnx.ModelProto]
Convert = Callable[..., Path]
Operators = Callable[[Path], Counter[str]]
Reference = Callable[..., dict[str, Array]]
RNG = np.random.default_rng(5)
FILTER = (RNG.normal(size=(4, 3, 3, 3)) / 5).astype(np.float32)
BIAS = RNG.normal(size=4).astype(np.float32)
IMAGE = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)


def conv(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", ["x", "w", "bias"], ["a"], name="conv", **attributes)


@pytest.fixture
def quantized_conv(model_of: Model, quantize: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w", "bias"], ["y"], name="conv", pads=[1] * 4)
    model = model_of([node], {"x": (1, 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS})
    return quantize(model, {"x": (0.03, 5), "y": (0.04, -8)}, {"w": 0})


def test_same_model_gives_the_same_bytes(tiny_models: dict[str, bytes]) -> None:
    for content in tiny_models.values():
        first, second = (
            TARGET.convert(
                ir.serde.deserialize_model(onnx.load_from_string(content)),
                ConvertOptions(metadata={"b": "1", "a": "2"}),
            )
            for _ in range(2)
        )
        assert first == second


def test_the_model_is_not_modified(tiny_model: ir.Model) -> None:
    before = ir.to_proto(tiny_model).SerializeToString(deterministic=True)
    TARGET.convert(tiny_model, ConvertOptions())
    assert ir.to_proto(tiny_model).SerializeToString(deterministic=True) == before


def test_tiny_models_agree_with_onnx_runtime_and_have_no_transpose(
    tiny_models: dict[str, bytes], tiny_images: Array, convert: Convert, operators: Operators, reference: Reference
) -> None:
    for content in tiny_models.values():
        model = onnx.load_from_string(content)
        path, feeds = convert(model), {"image": tiny_images[:1]}
        assert operators(path)["TRANSPOSE"] == 0
        np.testing.assert_allclose(
            TFLiteSession(path).run(feeds)["logits"], reference(model, feeds)["logits"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("activation", "constants", "fused"),
    [
        (helper.make_node("Relu", ["a"], ["y"]), {}, 1),
        (helper.make_node("Clip", ["a", "low", "high"], ["y"]), {"low": 0, "high": 6}, 3),
        (helper.make_node("Clip", ["a", "low", "high"], ["y"]), {"low": -1, "high": 1}, 2),
        (helper.make_node("Clip", ["a", "low"], ["y"]), {"low": 0}, 1),
    ],
)
def test_activation_is_fused_into_its_producer(  # noqa: PLR0917 - a case and its fixtures
    activation: onnx.NodeProto,
    constants: dict[str, float],
    fused: int,
    model_of: Model,
    convert: Convert,
    operators: Operators,
    reference: Reference,
) -> None:
    values = {name: np.array(value, np.float32) for name, value in constants.items()}
    model = model_of([conv(), activation], {"x": (1, 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS, **values})
    path = convert(model)
    assert operators(path) == Counter(CONV_2D=1)
    assert load(path).subgraphs[0].operators[0].builtinOptions.fusedActivationFunction == fused
    expected = reference(model, {"x": IMAGE})["y"]
    np.testing.assert_allclose(TFLiteSession(path).run({"x": IMAGE})["y"], expected, atol=1e-5)


def test_activation_whose_input_is_read_elsewhere_is_not_fused(
    model_of: Model, convert: Convert, operators: Operators
) -> None:
    nodes = [conv(), helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Add", ["a", "r"], ["y"])]
    path = convert(model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS}))
    assert operators(path) == Counter(CONV_2D=1, RELU=1, ADD=1)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"pads": [1, 1, 1, 1]}, {"CONV_2D": 1}),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"CONV_2D": 1}),
        ({"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"CONV_2D": 1, "PAD": 1}),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, {"CONV_2D": 1, "PAD": 1}),
        ({"pads": [0, 1, 2, 0]}, {"CONV_2D": 1, "PAD": 1}),
    ],
)
def test_explicit_pad_only_where_same_and_valid_do_not_say_it(  # noqa: PLR0917 - a case and its fixtures
    attributes: dict[str, Any],
    expected: dict[str, int],
    model_of: Model,
    convert: Convert,
    operators: Operators,
    reference: Reference,
) -> None:
    node = helper.make_node("Conv", ["x", "w", "bias"], ["y"], **attributes)
    model = model_of([node], {"x": (1, 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS})
    path = convert(model)
    assert operators(path) == expected
    wanted = reference(model, {"x": IMAGE})["y"]
    np.testing.assert_allclose(TFLiteSession(path).run({"x": IMAGE})["y"], wanted, atol=1e-5)


def test_every_unsupported_node_is_listed_at_once(model_of: Model, convert: Convert) -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="first"),
        helper.make_node("RandomNormalLike", ["x"], ["b"], name="second"),
        helper.make_node("RandomUniformLike", ["x"], ["c"], name="third"),
        helper.make_node("Relu", ["b"], ["d"], name="fine"),
    ]
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["a", "c", "d"])
    with pytest.raises(UnsupportedError) as caught:
        convert(model)
    assert [finding.where for finding in caught.value.findings] == [
        "Det 'first'",
        "RandomNormalLike 'second'",
        "RandomUniformLike 'third'",
    ]
    assert TARGET.check(ir.from_proto(model)) == list(caught.value.findings)


def test_an_opset_newer_than_any_is_refused(model_of: Model) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (2, 3)}, ["y"])
    model.opset_import[0].version = 99
    (finding,) = TARGET.check(ir.from_proto(model))
    assert "opset 99" in str(finding)


def test_a_fill_that_the_integers_do_not_have_is_not_rounded(
    model_of: Model, convert: Convert, reference: Reference
) -> None:
    pair = [helper.make_node(f"{kind}Linear", [value, "s", "z"], [out]) for kind, value, out in
            (("Quantize", "x", "q"), ("Dequantize", "q", "d"))]  # fmt: skip
    pad = helper.make_node("Pad", ["d", "pads", "fill"], ["y"])
    constants = {
        "s": np.array(1 / 256, np.float32),
        "z": np.array(-128, np.int8),
        "pads": np.array([0, 1, 0, 1], np.int64),
        "fill": np.array(1.5, np.float32),
    }
    model = model_of([*pair, pad], {"x": (2, 3)}, ["y"], constants)
    feeds = {"x": np.random.default_rng(0).uniform(0, 1, (2, 3)).astype(np.float32)}
    expected, seen = reference(model, feeds)["y"], TFLiteSession(convert(model)).run(feeds)["y"]
    np.testing.assert_array_equal(seen[:, 0], expected[:, 0])
    assert np.abs(seen - expected).max() <= 1 / 256 + 1e-6


def test_weights_that_do_not_fit_the_input_are_refused(model_of: Model) -> None:
    model = model_of([conv()], {"x": (1, 4, 8, 8)}, {"a": None}, {"w": FILTER, "bias": BIAS})
    with pytest.raises(UnsupportedError, match=r"weights \[4, 3, 3, 3\] in 1 groups do not fit an input of 4 channels"):
        TARGET.convert(ir.from_proto(model), ConvertOptions())


def test_custom_operator_and_what_follows_it_do_not_hide_later_findings(model_of: Model) -> None:
    nodes = [
        helper.make_node("Magic", ["x"], ["a"], name="first", domain="my.domain"),
        helper.make_node("Relu", ["a"], ["b"], name="after"),
        helper.make_node("Det", ["x"], ["c"], name="last"),
    ]
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["b", "c"], domains=["my.domain"])
    found = TARGET.check(ir.from_proto(model))
    assert {finding.where for finding in found} == {"Magic 'first'", "Det 'last'"}


@pytest.mark.parametrize(
    "attributes", [{"pads": [1] * 4}, {"pads": [1] * 4, "strides": [2, 2]}, {"auto_pad": "SAME_UPPER"}]
)
def test_dynamic_height_and_width_are_kept_and_resizable(
    attributes: dict[str, Any], model_of: Model, convert: Convert, reference: Reference
) -> None:
    nodes = [
        conv(**attributes),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Shape", ["b"], ["whole"]),
        helper.make_node("Slice", ["whole", "zero", "two"], ["kept"]),
        helper.make_node("Concat", ["kept", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("ReduceMax", ["c", "axes"], ["y"], keepdims=0),
    ]
    numbers = {"zero": [0], "two": [2], "rest": [-1], "axes": [2]}
    constants = {"w": FILTER, "bias": BIAS, **{name: np.array(value) for name, value in numbers.items()}}
    model = model_of(nodes, {"x": ("N", 3, "height", "width")}, ["y"], constants)
    session = TFLiteSession(convert(model))
    assert session.inputs[0].shape == (-1, 3, -1, -1)
    for batch, height, width in ((1, 32, 32), (2, 33, 47), (1, 16, 9)):
        feeds = {"x": RNG.normal(size=(batch, 3, height, width)).astype(np.float32)}
        np.testing.assert_allclose(session.run(feeds)["y"], reference(model, feeds)["y"], atol=1e-5)


def test_dynamic_size_that_would_become_a_constant_is_refused_with_its_node(model_of: Model) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=2, end=3),
        helper.make_node("Cast", ["shape"], ["height"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["x", "height"], ["y"], name="by the height"),
    ]
    (finding,) = TARGET.check(ir.from_proto(model_of(nodes, {"x": (1, 3, "height", 8)}, ["y"])))
    assert finding.where == "Div 'by the height'"
    assert "static" in str(finding)


def test_signature_and_tensors_carry_the_onnx_names_in_order(model_of: Model, convert: Convert) -> None:
    nodes = [helper.make_node("Sub", ["second", "first"], ["z"]), helper.make_node("Relu", ["z"], ["a"])]
    path = convert(model_of(nodes, {"second": (2, 3), "first": (2, 3)}, ["z", "a"]))
    model = load(path)
    (signature,) = model.signatureDefs
    names = [[text(entry.name) for entry in entries] for entries in (signature.inputs, signature.outputs)]
    assert names == [["second", "first"], ["z", "a"]]
    assert text(signature.signatureKey) == "serving_default"
    assert {"second", "first", "z", "a"} <= {text(tensor.name) for tensor in model.subgraphs[0].tensors}


def test_metadata_says_layout_dtype_and_minimum_runtime(quantized_conv: onnx.ModelProto, convert: Convert) -> None:
    path = convert(quantized_conv, io_dtype="uint8", metadata={"edgeship.mean": "[0]"})
    model = load(path)
    described = description(model)
    assert described is not None
    assert described["metadata"] == {"edgeship.mean": "[0]"}
    assert described["inputs"] == [
        {"name": "x", "axes": [0, 2, 3, 1], "dtype": "uint8", "scale": pytest.approx(0.03), "zero_point": 133}
    ]
    (entry,) = [entry for entry in model.metadata if text(entry.name) == "min_runtime_version"]
    assert bytes(model.buffers[entry.buffer].data).rstrip(b"\0") == b"1.14.0"
    assert json.dumps(described)


def test_the_runtime_takes_no_bias_with_one_scale_for_all_channels(
    quantized_conv: onnx.ModelProto, convert: Convert, tmp_path: Path
) -> None:
    model = load(convert(quantized_conv))
    (bias,) = [
        tensor
        for tensor in model.subgraphs[0].tensors
        if tensor.type == schema_module().TensorType.INT32 and tensor.quantization is not None
    ]
    assert len(bias.quantization.scale) > 1
    bias.quantization.scale, bias.quantization.zeroPoint = bias.quantization.scale[:1], bias.quantization.zeroPoint[:1]
    path = tmp_path / "smaller.tflite"
    path.write_bytes(packed(model))
    with pytest.raises(InputError, match="delegate"):
        TFLiteSession(path)


@pytest.mark.parametrize(("dtype", "operator_count"), [("float32", 3), ("int8", 1), ("uint8", 3)])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_io_options_change_the_border_and_not_the_numbers(  # noqa: PLR0917 - a case and its fixtures
    dtype: str,
    operator_count: int,
    layout: str,
    quantized_conv: onnx.ModelProto,
    convert: Convert,
    reference: Reference,
) -> None:
    path = convert(quantized_conv, io_dtype=dtype, io_layout=layout)
    graph = load(path).subgraphs[0]
    assert list(graph.tensors[graph.inputs[0]].shape) == ([1, 8, 8, 3] if layout == "nhwc" else [1, 3, 8, 8])
    assert len(graph.operators) == operator_count + (2 if layout == "nchw" else 0)
    expected = reference(quantized_conv, {"x": IMAGE})["y"]
    assert np.abs(TFLiteSession(path).run({"x": IMAGE})["y"] - expected).max() <= 0.04 * 1.001


def test_integer_io_of_a_float_model_is_refused(model_of: Model, convert: Convert) -> None:
    model = model_of([conv()], {"x": (1, 3, 8, 8)}, ["a"], {"w": FILTER, "bias": BIAS})
    with pytest.raises(InputError, match="input 'x'"):
        convert(model, io_dtype="int8")


def test_dynamic_batch_is_kept_and_resizable(model_of: Model, convert: Convert, reference: Reference) -> None:
    nodes = [
        conv(pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["y"]),
    ]
    model = model_of(nodes, {"x": ("N", 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS})
    session = TFLiteSession(convert(model))
    assert session.inputs[0].shape == (-1, 3, 8, 8)
    for batch in (1, 5, 2):
        feeds = {"x": RNG.normal(size=(batch, 3, 8, 8)).astype(np.float32)}
        np.testing.assert_allclose(session.run(feeds)["y"], reference(model, feeds)["y"], atol=1e-5)


def test_reshape_that_fixes_a_dynamic_batch_is_refused_with_its_node(model_of: Model) -> None:
    nodes = [conv(), helper.make_node("Reshape", ["a", "shape"], ["y"], name="fixing")]
    constants = {"w": FILTER, "bias": BIAS, "shape": np.array([1, 4, 36])}
    findings = TARGET.check(ir.from_proto(model_of(nodes, {"x": ("N", 3, 8, 8)}, ["y"], constants)))
    assert findings
    assert all("static batch" in str(finding) for finding in findings)


def test_operators_left_float_by_the_quantizer_get_explicit_borders(
    model_of: Model,
    quantize: Callable[..., onnx.ModelProto],
    convert: Convert,
    operators: Operators,
    reference: Reference,
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["a"], name="conv"),
        helper.make_node("Sin", ["a"], ["y"], name="float_only"),
    ]
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS})
    qdq = quantize(model, {"x": (0.03, 5), "a": (0.04, -8)}, {"w": 0})
    path = convert(qdq)
    assert operators(path) == Counter(QUANTIZE=1, CONV_2D=1, DEQUANTIZE=1, SIN=1)
    np.testing.assert_allclose(
        TFLiteSession(path).run({"x": IMAGE})["y"], reference(qdq, {"x": IMAGE})["y"], atol=0.041
    )


def test_missing_pair_around_a_reshape_is_bridged(
    model_of: Model, quantize: Callable[..., onnx.ModelProto], convert: Convert, operators: Operators
) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["a"], name="conv"),
        helper.make_node("Flatten", ["a"], ["y"], name="flat"),
    ]
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], {"w": FILTER, "bias": BIAS})
    path = convert(quantize(model, {"x": (0.03, 5), "y": (0.04, -8)}, {"w": 0}))
    assert operators(path)["DEQUANTIZE"] == 1


def test_concat_of_different_scales_is_requantized_explicitly(
    model_of: Model,
    quantize: Callable[..., onnx.ModelProto],
    convert: Convert,
    operators: Operators,
    reference: Reference,
) -> None:
    node = helper.make_node("Concat", ["p", "q"], ["y"], name="join", axis=1)
    qdq = quantize(
        model_of([node], {"p": (1, 3, 8, 8), "q": (1, 3, 8, 8)}, ["y"]),
        {"p": (0.03, 5), "q": (0.05, 0), "y": (0.05, 0)},
    )
    path = convert(qdq)
    assert operators(path)["QUANTIZE"] == 3
    feeds = {"p": IMAGE, "q": IMAGE * 2}
    assert np.abs(TFLiteSession(path).run(feeds)["y"] - reference(qdq, feeds)["y"]).max() <= 0.0501


def test_unsigned_model_of_others_becomes_signed(
    quantized_conv: onnx.ModelProto, convert: Convert, operators: Operators, reference: Reference
) -> None:
    for tensor in quantized_conv.graph.initializer:
        if tensor.name in ("x_zero", "y_zero"):
            value = int(onnx.numpy_helper.to_array(tensor)) + 128
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(value, np.uint8), tensor.name))
    del quantized_conv.graph.value_info[:]
    path = convert(quantized_conv)
    assert operators(path) == Counter(QUANTIZE=1, CONV_2D=1, DEQUANTIZE=1)
    expected = reference(quantized_conv, {"x": IMAGE})["y"]
    assert np.abs(TFLiteSession(path).run({"x": IMAGE})["y"] - expected).max() <= 0.04 * 1.001


def test_initializers_among_the_inputs_are_not_inputs(model_of: Model, convert: Convert) -> None:
    model = model_of([conv()], {"x": (1, 3, 8, 8)}, ["a"], {"w": FILTER, "bias": BIAS})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, FILTER.shape))
    assert [info.name for info in TFLiteSession(convert(model)).inputs] == ["x"]


def test_output_that_is_an_input_or_given_twice_is_copied(model_of: Model, convert: Convert) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    seen = TFLiteSession(convert(model_of(nodes, {"x": (1, 3, 8, 8)}, ["same", "y", "z"]))).run({"x": IMAGE})
    np.testing.assert_array_equal(seen["same"], IMAGE)
    np.testing.assert_array_equal(seen["y"], seen["z"])


def test_equal_weights_are_stored_once_and_aligned(model_of: Model, convert: Convert) -> None:
    square = RNG.normal(size=(64, 64, 1, 1)).astype(np.float32)
    nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(4)]
    constants = {f"w{i}": square.copy() for i in range(4)}
    path = convert(model_of(nodes, {"x0": (1, 64, 4, 4)}, ["x4"], constants))
    content = path.read_bytes()
    assert len(content) < 1.5 * square.nbytes
    for buffer in load(path).buffers:
        if buffer.data is not None and len(buffer.data) > 1000:
            assert content.index(bytes(buffer.data)) % ALIGNMENT == 0
