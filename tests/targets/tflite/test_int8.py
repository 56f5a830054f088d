"""Every int8 kernel, fed the same integers, against the QDQ reference of ONNX Runtime: within one or two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeship.targets.tflite.flatfile import element_types, load
from edgeship.targets.tflite.ops import REGISTRY
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
IMAGE, VOLUME = (1, 8, 9, 10), (1, 6, 4, 5, 7)


@dataclass(frozen=True)
class Case:
    """One int8 node. `y`: the output's (scale, zero point); None: the input's. `steps`: what kernels may differ by."""

    op: str
    shape: tuple[int, ...] = IMAGE
    attributes: Mapping[str, Any] = field(default_factory=dict)
    second: tuple[int, ...] = ()
    weights: Mapping[str, tuple[tuple[int, ...], int | None]] = field(default_factory=dict)
    bias: int = 0
    constants: Mapping[str, Array] = field(default_factory=dict)
    x: tuple[float, int] = (0.05, 3)
    y: tuple[float, int] | None = None
    outputs: int = 1
    steps: float = 1.0


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _conv(weights: tuple[int, ...], **attributes: Any) -> Case:
    name = {"w": (weights, 0)}
    return Case("Conv", IMAGE, attributes, weights=name, bias=weights[0], y=(0.1, -20))


CASES = {
    "conv_same": _conv((16, 8, 3, 3), pads=[1, 1, 1, 1]),
    "conv_stride_2_onnx_pads": _conv((16, 8, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2]),
    "conv_dilated": _conv((16, 8, 3, 3), pads=[2, 2, 2, 2], dilations=[2, 2]),
    "conv_asymmetric_pads": _conv((16, 8, 3, 3), pads=[0, 2, 1, 0]),
    "conv_grouped": _conv((16, 4, 3, 3), group=2, pads=[1, 1, 1, 1]),
    "conv_depthwise": _conv((8, 1, 3, 3), group=8, pads=[1, 1, 1, 1]),
    "conv_depthwise_multiplier": _conv((16, 1, 3, 3), group=8, pads=[1, 1, 1, 1], strides=[2, 2]),
    "conv_1d": Case("Conv", (1, 8, 20), {"pads": [1, 1]}, weights={"w": ((6, 8, 3), 0)}, bias=6, y=(0.1, -20)),
    "conv_without_bias": Case("Conv", IMAGE, weights={"w": ((4, 8, 1, 1), 0)}, y=(0.1, 0)),
    "conv_one_weight_scale": Case("Conv", IMAGE, weights={"w": ((4, 8, 1, 1), None)}, y=(0.1, 0)),
    "conv_transpose": Case(
        "ConvTranspose",
        IMAGE,
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        weights={"w": ((8, 6, 4, 4), 1)},
        bias=6,
        y=(0.1, 5),
    ),
    "conv_transpose_two_groups": Case(
        "ConvTranspose",
        attributes={"strides": [2, 2], "group": 2, "output_padding": [1, 1]},
        weights={"w": ((8, 3, 3, 3), None)},
        bias=6,
        y=(0.1, -20),
    ),
    "conv_transpose_many_groups": Case(
        "ConvTranspose",
        (1, 12, 5, 6),
        {"strides": [2, 2], "group": 12, "pads": [1] * 4},
        weights={"w": ((12, 2, 4, 4), None)},
        bias=24,
        y=(0.1, -20),
    ),
    "conv_transpose_1d": Case(
        "ConvTranspose", (1, 8, 20), {"strides": [2]}, weights={"w": ((8, 6, 3), 1)}, bias=6, y=(0.1, -20)
    ),
    "conv_3d_plane": Case(
        "Conv", VOLUME, {"pads": [0, 1, 1, 0, 1, 1]}, weights={"w": ((4, 6, 1, 3, 3), 0)}, bias=4, y=(0.1, -20)
    ),
    "conv_3d_depth": Case(
        "Conv", VOLUME, {"pads": [1, 0, 0, 1, 0, 0]}, weights={"w": ((4, 6, 3, 1, 1), 0)}, bias=4, y=(0.1, -20)
    ),
    "gemm": Case("Gemm", (3, 20), {"transB": 1}, weights={"w": ((7, 20), 0)}, bias=7, y=(0.08, 10)),
    "gemm_columns": Case("Gemm", (3, 20), weights={"w": ((20, 7), 1)}, bias=7, y=(0.08, 10)),
    "matmul_constant": Case("MatMul", (2, 5, 20), weights={"w": ((20, 7), 1)}, y=(0.08, 10)),
    "matmul_computed": Case("MatMul", (2, 5, 20), second=(2, 20, 6), y=(0.3, 10)),
    "add": Case("Add", second=IMAGE, y=(0.09, -7)),
    "add_broadcast": Case("Add", second=(1, 8, 1, 1), y=(0.09, -7)),
    "sub": Case("Sub", second=IMAGE, y=(0.09, -7)),
    "mul": Case("Mul", second=IMAGE, y=(0.2, 30)),
    "max": Case("Max", second=IMAGE, x=(0.05, 0)),
    "relu": Case("Relu", y=(0.025, -128)),
    "leaky_relu": Case("LeakyRelu", attributes={"alpha": 0.1}, y=(0.04, -90)),
    "hard_swish": Case("HardSwish", y=(0.03, -110), steps=2),
    "gelu": Case("Gelu", y=(0.03, -110)),
    "elu": Case("Elu", y=(0.03, -90)),
    "exp": Case("Exp", x=(0.01, 3), y=(0.02, -128)),
    "abs": Case("Abs", y=(0.026, -128)),
    "log": Case("Log", x=(0.03, -128), y=(0.03, 60)),
    "prelu": Case("PRelu", weights={"slope": ((8, 1, 1), None)}, y=(0.05, -20)),
    "prelu_computed": Case("PRelu", second=IMAGE, y=(0.1, -7)),
    "sigmoid": Case("Sigmoid", y=(1 / 256, -128)),
    "tanh": Case("Tanh", x=(0.02, 3), y=(1 / 128, 0)),
    "softmax": Case("Softmax", (2, 30), {"axis": -1}, y=(1 / 256, -128)),
    "softmax_channels": Case("Softmax", attributes={"axis": 1}, y=(1 / 256, -128)),
    "log_softmax": Case("LogSoftmax", (2, 30), {"axis": -1}, y=(16 / 256, 127)),
    "l2_normalization": Case("LpNormalization", attributes={"axis": 1}, y=(1 / 128, 0)),
    "clip": Case("Clip", constants={"low": np.array(-1, np.float32), "high": np.array(2, np.float32)}, steps=0),
    "max_pool": Case("MaxPool", attributes={"kernel_shape": [2, 2], "strides": [2, 2]}, steps=0),
    "max_pool_pads": Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}, steps=0),
    "average_pool": Case("AveragePool", attributes={"kernel_shape": [3, 3], "strides": [2, 2]}),
    "average_pool_same": Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [1] * 4}),
    "max_pool_3d": Case("MaxPool", VOLUME, {"kernel_shape": [2, 3, 2], "pads": [1] * 6}, steps=0),
    "max_pool_dilated": Case("MaxPool", attributes={"kernel_shape": [3, 3], "dilations": [2, 2]}, steps=0),
    "average_pool_uneven": Case(
        "AveragePool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1}
    ),
    "average_pool_counted": Case(
        "AveragePool",
        attributes={"kernel_shape": [3, 4], "strides": [2, 3], "pads": [1] * 4, "ceil_mode": 1, "count_include_pad": 1},
    ),
    "global_average_pool": Case("GlobalAveragePool", y=(0.01, 5)),
    "global_max_pool": Case("GlobalMaxPool", steps=0),
    "reduce_mean": Case("ReduceMean", attributes={"keepdims": 0}, constants={"axes": _ints(2, 3)}, y=(0.01, 5)),
    "reduce_max": Case("ReduceMax", attributes={"keepdims": 0}, constants={"axes": _ints(1)}, steps=0),
    "concat": Case("Concat", second=(1, 4, 9, 10), attributes={"axis": 1}, steps=0),
    "reshape": Case("Reshape", constants={"to": _ints(1, 8, 90)}, steps=0),
    "flatten": Case("Flatten", steps=0),
    "squeeze": Case("Squeeze", (1, 8, 1, 10), constants={"axes": _ints(2)}, steps=0),
    "unsqueeze": Case("Unsqueeze", (8, 9), constants={"axes": _ints(0)}, steps=0),
    "transpose": Case("Transpose", attributes={"perm": [0, 2, 1, 3]}, steps=0),
    "slice": Case("Slice", constants={"s": _ints(2), "e": _ints(7), "a": _ints(1)}, steps=0),
    "slice_strided": Case(
        "Slice", constants={"s": _ints(0, 8), "e": _ints(99, -99), "a": _ints(3, 2), "t": _ints(2, -2)}, steps=0
    ),
    "slice_blocks": Case(
        "Slice", constants={"s": _ints(1, 2), "e": _ints(99, 7), "a": _ints(3, 2), "t": _ints(2, 3)}, steps=0
    ),
    "pad": Case("Pad", constants={"p": _ints(0, 2, 0, 1, 0, 3, 1, 0)}, steps=0),
    "pad_value": Case("Pad", constants={"p": _ints(0, 0, 1, 1, 0, 0, 1, 1), "v": np.array(1.5, np.float32)}, steps=0),
    "pad_edge": Case("Pad", attributes={"mode": "edge"}, constants={"p": _ints(0, 0, 1, 2, 0, 0, 1, 1)}, steps=0),
    "split": Case("Split", attributes={"axis": 1, "num_outputs": 2}, outputs=2, steps=0),
    "gather": Case("Gather", attributes={"axis": 1}, constants={"i": _ints(3, 0, -1)}, steps=0),
    "gather_elements": Case(
        "GatherElements", attributes={"axis": 1}, constants={"i": np.arange(180).reshape(1, 2, 9, 10) % 8}, steps=0
    ),
    "gather_nd": Case("GatherND", constants={"i": np.array([[0, 3], [0, -1]])}, steps=0),
    "depth_to_space": Case("DepthToSpace", attributes={"blocksize": 2}, steps=0),
    "depth_to_space_channel_first": Case("DepthToSpace", attributes={"blocksize": 2, "mode": "CRD"}, steps=0),
    "space_to_depth": Case("SpaceToDepth", (1, 3, 6, 8), {"blocksize": 2}, steps=0),
    "trilu": Case("Trilu", attributes={"upper": 0}, constants={"k": np.array(1)}, steps=0),
    "pad_reflect": Case("Pad", attributes={"mode": "reflect"}, constants={"p": _ints(0, 0, 1, 2, 0, 0, 1, 1)}, steps=0),
    "reduce_min": Case("ReduceMin", attributes={"keepdims": 0}, constants={"axes": _ints(2)}, steps=0),
    "split_uneven": Case("Split", attributes={"axis": 1}, constants={"s": _ints(3, 5)}, outputs=2, steps=0),
    "tile": Case("Tile", constants={"r": _ints(1, 1, 2, 1)}, steps=0),
    "expand": Case("Expand", (1, 8, 1, 10), constants={"r": _ints(1, 8, 4, 10)}, steps=0),
    "resize_nearest": Case(
        "Resize",
        attributes={"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        constants={"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
        steps=0,
    ),
    "resize_linear": Case(
        "Resize",
        attributes={"mode": "linear"},
        constants={"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
    ),
}
NO_REFERENCE_KERNEL = {"depth_to_space", "depth_to_space_channel_first", "elu", "tile"}
"""TFLite's reference kernels lack ELU, and DEPTH_TO_SPACE and TILE on int8."""
TESTED_OTHERWISE = {"ArgMax", "ArgMin", "Identity", "Min", "TopK", "Upsample", "Where"}
"""Identity disappears when the graph is read; ArgMax, ArgMin and TopK have outputs that are no real numbers
(test_index.py); the others share their code with a case above.
"""


@pytest.fixture
def qdq(
    model_of: Callable[..., onnx.ModelProto], quantize: Callable[..., onnx.ModelProto]
) -> Callable[[Case], onnx.ModelProto]:
    def build(case: Case, *, wide: bool = False) -> onnx.ModelProto:
        rng = np.random.default_rng(7)
        inputs = {"x": case.shape, **({"x2": case.second} if case.second else {})}
        constants = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in case.weights.items()}
        if case.bias:
            constants["bias"] = rng.normal(size=case.bias).astype(np.float32)
        constants |= case.constants
        outputs = [f"y{i}" for i in range(case.outputs)]
        names = list(constants)
        if "low" not in constants and case.op == "Pad" and "v" not in constants:
            names = [name for name in names if name != "v"]
        node = helper.make_node(case.op, [*inputs, *names], outputs, name="node", **case.attributes)
        model = model_of([node], inputs, outputs, constants, **({"opset": 21} if wide else {}))
        ranges = {"x": case.x}
        if case.second:
            ranges["x2"] = case.x if case.op in ("Concat", "Max") else (0.03, -11)
        ranges |= dict.fromkeys(outputs, case.y or case.x)
        axes = {name: axis for name, (_, axis) in case.weights.items()}
        if wide:
            return quantize(model, {name: widened(*pair) for name, pair in ranges.items()}, axes, np.int16)
        return quantize(model, ranges, axes)

    return build


def widened(scale: float, zero_point: int) -> tuple[float, int]:
    """16-bit parameters for what the 8-bit ones cover; 1/32768 for the outputs that kernels fix."""
    if (scale, zero_point) in ((1 / 256, -128), (1 / 128, 0)):
        return 1 / 32768, 0
    return scale * (128 + abs(zero_point)) / 32767, 0


def _feeds(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(11)
    scale, zero = case.x
    span = [(-128 - zero) * scale, (127 - zero) * scale]
    feeds = {"x": rng.uniform(*span, size=case.shape).astype(np.float32)}
    if case.second:
        feeds["x2"] = rng.uniform(-3, 3, size=case.second).astype(np.float32)
    # On the quantizer's grid, so that the border's own rounding of ties does not count as the kernel's.
    return {
        name: (np.rint(values / np.float32(scale)) * np.float32(scale)).astype(np.float32)
        for name, values in feeds.items()
    }


@pytest.mark.parametrize("name", sorted(CASES))
def test_int8_kernel_is_within_its_steps_of_the_qdq_reference(  # noqa: PLR0917 - fixtures
    name: str,
    qdq: Callable[[Case], onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    judge: Callable[[Path], TFLiteSession],
    request: pytest.FixtureRequest,
) -> None:
    if name in NO_REFERENCE_KERNEL and request.node.callspec.params["judge"] in ("reference", "tensorflow"):
        pytest.skip("TFLite has no reference kernel for this operator in int8")
    case = CASES[name]
    model, feeds = qdq(case), _feeds(case)
    path = convert(model, integer_only=True)
    expected, seen = reference(model, feeds), judge(path).run(feeds)
    scale = (case.y or case.x)[0]
    for output, values in expected.items():
        steps = np.abs(values - seen[output]) / scale
        assert steps.max() <= case.steps + 1e-3, f"{output}: {steps.max():.2f} steps, mean {steps.mean():.3f}"


SLOW = sorted(name for name, case in CASES.items() if (rule := REGISTRY[case.op].int8) and rule.real_is_faster is True)


@pytest.mark.parametrize("name", SLOW)
def test_what_has_no_fast_kernel_is_computed_in_real_numbers_between_the_integers(
    name: str,
    qdq: Callable[[Case], onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    operators: Callable[[Path], Any],
) -> None:
    case = CASES[name]
    model, feeds = qdq(case), _feeds(case)
    path = convert(model, io_dtype="int8", integer_only=False)
    counts = operators(path)
    assert (counts["DEQUANTIZE"], counts["QUANTIZE"]) == (1, 1)
    path, scale = convert(model), (case.y or case.x)[0]
    for output, values in reference(model, feeds).items():
        steps = np.abs(TFLiteSession(path).run(feeds)[output] - values) / scale
        assert steps.max() < 1.001
        assert np.mean(steps > 1e-3) < 0.02  # products of numbers on the grid may lie between two integers


def test_a_model_of_integers_keeps_to_integer_kernels(
    qdq: Callable[[Case], onnx.ModelProto], convert: Callable[..., Path], operators: Callable[[Path], Any]
) -> None:
    model = qdq(CASES["hard_swish"])
    real = operators(convert(model))
    assert (real["DEQUANTIZE"], real["QUANTIZE"]) == (2, 2)
    integers = operators(convert(model, integer_only=True))
    assert (integers["DEQUANTIZE"], integers["QUANTIZE"]) == (1, 1)
    model.producer_name = "tf2onnx"  # its integers are those of a TFLite file
    assert operators(convert(model)) == integers
    assert operators(convert(model, integer_only=False)) == real
    helper.set_model_props(model, {"edgeship.plan": "0"})  # a float model that tf2onnx made, quantized here
    assert operators(convert(model)) == real


RELU = helper.make_node("Relu", ["x"], ["y"], name="node")
RELU6 = helper.make_node("Clip", ["x", "low", "high"], ["y"], name="node")


@pytest.mark.parametrize(
    ("node", "y", "kernels"),
    [
        (RELU, (0.05, -20), {"MAXIMUM": 1}),
        (RELU6, (0.05, -20), {"MAXIMUM": 1, "MINIMUM": 1}),
        (RELU, (0.03, -128), {"DEQUANTIZE": 1, "RELU": 1, "QUANTIZE": 1}),
    ],
)
def test_a_relu_keeps_integers_that_keep_their_scale(  # noqa: PLR0917 - a case and its fixtures
    node: onnx.NodeProto,
    y: tuple[float, int],
    kernels: dict[str, int],
    model_of: Callable[..., onnx.ModelProto],
    quantize: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Any],
    reference: Callable[..., dict[str, Array]],
) -> None:
    bounds = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)} if node is RELU6 else {}
    model = quantize(model_of([node], {"x": (2, 40)}, ["y"], bounds), {"x": (0.05, -20), "y": y})
    assert dict(operators(convert(model, io_dtype="int8", integer_only=False))) == kernels
    feeds = {"x": np.linspace(-9, 9, 80, dtype=np.float32).reshape(2, 40)}
    seen = TFLiteSession(convert(model)).run(feeds)["y"]
    np.testing.assert_allclose(seen, reference(model, feeds)["y"], rtol=0, atol=1e-6)


def test_product_with_a_second_matrix_of_zero_point_0_is_exact(
    model_of: Callable[..., onnx.ModelProto],
    quantize: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
) -> None:
    """As attention's keys and values are planned: one rounding, of the exact sum."""
    shapes = {"x": (6, 40, 32), "x2": (6, 32, 40)}
    model = model_of([helper.make_node("MatMul", ["x", "x2"], ["y"], name="node")], shapes, ["y"])
    ranges = {"x": (0.0517, 3), "x2": (0.0291, 0), "y": (0.2983, 10)}
    rng = np.random.default_rng(2)
    integers = {name: rng.integers(-128, 128, shape) for name, shape in shapes.items()}
    (sx, zx), (sw, zw), (sy, zy) = ranges.values()
    exact = np.matmul(integers["x"] - zx, integers["x2"] - zw) * (np.float64(np.float32(sx)) * np.float32(sw))
    expected = np.clip(np.rint(exact / np.float32(sy)) + zy, -128, 127)
    path = convert(quantize(model, ranges), io_dtype="int8")
    feeds = {n: ((q - ranges[n][1]) * np.float32(ranges[n][0])).astype(np.float32) for n, q in integers.items()}
    seen = np.rint(TFLiteSession(path).run(feeds)["y"] / np.float32(sy)) + zy
    np.testing.assert_array_equal(seen, expected)


WIDE = sorted(name for name, case in CASES.items() if (rule := REGISTRY[case.op].int8) and rule.wide)
WIDE_STEPS = {"softmax": 6, "softmax_channels": 6, "sigmoid": 2, "tanh": 3}
"""Of 1/32768: TFLite interpolates these functions in tables."""


@pytest.mark.parametrize("name", WIDE)
def test_kernel_with_16_bit_activations_is_within_its_steps_of_the_qdq_reference(  # noqa: PLR0917 - fixtures
    name: str,
    qdq: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    judge: Callable[[Path], TFLiteSession],
    request: pytest.FixtureRequest,
) -> None:
    if name in NO_REFERENCE_KERNEL and request.node.callspec.params["judge"] in ("reference", "tensorflow"):
        pytest.skip("TFLite has no reference kernel for this operator on integers")
    case = CASES[name]
    model, feeds = qdq(case, wide=True), _feeds(case)
    path = convert(model)
    expected, seen = reference(model, feeds), judge(path).run(feeds)
    scale = widened(*(case.y or case.x))[0]
    for output, values in expected.items():
        steps = np.abs(values - seen[output]) / scale
        most = WIDE_STEPS.get(name, case.steps)
        assert steps.max() <= most + 2e-2, f"{output}: {steps.max():.2f} steps, mean {steps.mean():.3f}"


@pytest.mark.parametrize("name", WIDE)
def test_node_with_16_bit_activations_computes_nothing_in_float(
    name: str, qdq: Callable[..., onnx.ModelProto], convert: Callable[..., Path], operators: Callable[[Path], Any]
) -> None:
    case = CASES[name]
    counts = operators(convert(qdq(case, wide=True)))
    assert counts["DEQUANTIZE"] == case.outputs
    assert counts["QUANTIZE"] == 1 + bool(case.second)


@pytest.mark.parametrize("name", sorted(CASES))
def test_int8_node_has_no_float_tensor_inside(
    name: str, qdq: Callable[[Case], onnx.ModelProto], convert: Callable[..., Path], operators: Callable[[Path], Any]
) -> None:
    path = convert(qdq(CASES[name]), io_dtype="int8")
    model, types = load(path), element_types()
    assert {types[t.type] for t in model.subgraphs[0].tensors} <= {"BOOL", "INT8", "INT32"}
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(operators(path))


def test_every_int8_entry_of_the_registry_has_a_case() -> None:
    covered = {case.op for case in CASES.values()} | TESTED_OTHERWISE
    assert covered == {name for name, op in REGISTRY.items() if op.int8 is not None}
