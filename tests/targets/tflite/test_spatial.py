"""Convolution, pooling, resizing and sampling in the forms that ONNX's own vectors leave out, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgeship.calibration.graph.macs import count_macs
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
LINE, IMAGE, VOLUME = (2, 6, 11), (2, 6, 11, 9), (2, 6, 5, 7, 6)


@dataclass(frozen=True)
class Case:
    """One node. `others`: further computed inputs by shape; `constants`: inputs that are known."""

    op: str
    shape: tuple[int, ...] = IMAGE
    attributes: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 20
    inputs: tuple[str, ...] = ()


def _weights(*shape: int, bias: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(3)
    values = {"w": random.normal(0, 0.3, shape).astype(np.float32)}
    return values | ({"b": random.normal(0, 1, bias).astype(np.float32)} if bias else {})


def _conv(shape: tuple[int, ...], weights: tuple[int, ...], **attributes: Any) -> Case:
    return Case("Conv", shape, attributes, constants=_weights(*weights, bias=weights[0]))


def _transposed(shape: tuple[int, ...], weights: tuple[int, ...], **attributes: Any) -> Case:
    channels = weights[1] * attributes.get("group", 1)
    return Case("ConvTranspose", shape, attributes, constants=_weights(*weights, bias=channels))


def _pool(op: str, kernel: list[int], shape: tuple[int, ...] = IMAGE, **attributes: Any) -> Case:
    return Case(op, shape, {"kernel_shape": kernel, **attributes})


def _resize(sizes: list[int], shape: tuple[int, ...] = IMAGE, **attributes: Any) -> Case:
    return Case("Resize", shape, attributes, constants={"sizes": np.array(sizes)}, inputs=("x", "", "", "sizes"))


CONVOLUTIONS = {
    "1d_dilated": _conv(LINE, (8, 6, 3), dilations=[2], pads=[1, 2]),
    "1d_depthwise_multiplier_2": _conv(LINE, (12, 1, 3), group=6, strides=[2]),
    "1d_computed_weights": Case("Conv", LINE, {"pads": [1, 1]}, {"w": (4, 6, 3)}),
    "2d_depthwise_multiplier_3": _conv(IMAGE, (18, 1, 3, 3), group=6, pads=[1, 0, 2, 1], strides=[2, 1]),
    "2d_depthwise_dilated": _conv(IMAGE, (6, 1, 3, 3), group=6, pads=[2, 2, 2, 2], dilations=[2, 2]),
    "2d_grouped": _conv(IMAGE, (9, 2, 3, 2), group=3, auto_pad="SAME_LOWER", strides=[2, 2]),
    "2d_computed_depthwise_weights": Case("Conv", IMAGE, {"group": 6}, {"w": (6, 1, 3, 3)}),
    "2d_computed_bias": Case("Conv", IMAGE, {}, {"b": (4,)}, _weights(4, 6, 3, 3), inputs=("x", "w", "b")),
    "3d_same": _conv(VOLUME, (4, 6, 3, 3, 3), pads=[1] * 6),
    "3d_strided_asymmetric": _conv(VOLUME, (4, 6, 2, 3, 3), pads=[1, 0, 1, 0, 1, 2], strides=[2, 2, 1]),
    "3d_dilated": _conv(VOLUME, (4, 6, 2, 2, 2), dilations=[2, 1, 2]),
    "3d_plane_only": _conv(VOLUME, (4, 6, 1, 3, 3), pads=[0, 1, 1, 0, 1, 1], strides=[2, 2, 2]),
    "3d_depth_only": _conv(VOLUME, (4, 6, 3, 1, 1), pads=[1, 0, 0, 1, 0, 0], strides=[2, 1, 1]),
    "3d_pointwise": _conv(VOLUME, (4, 6, 1, 1, 1)),
    "3d_depthwise": _conv(VOLUME, (6, 1, 3, 3, 3), group=6, pads=[1] * 6, strides=[1, 2, 2]),
    "3d_grouped": _conv(VOLUME, (4, 3, 3, 2, 3), group=2, dilations=[2, 1, 1]),
    "3d_computed_weights": Case("Conv", VOLUME, {}, {"w": (4, 6, 2, 3, 3)}),
}
TRANSPOSED = {
    "1d": _transposed(LINE, (6, 4, 4), strides=[2], pads=[1, 1]),
    "1d_dilated_computed": Case("ConvTranspose", LINE, {"dilations": [2], "strides": [3]}, {"w": (6, 4, 3)}),
    "2d_twice_as_large": _transposed(IMAGE, (6, 4, 4, 4), strides=[2, 2], pads=[1, 1, 1, 1]),
    "2d_output_padding": _transposed(IMAGE, (6, 4, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    "2d_output_shape": _transposed(IMAGE, (6, 4, 3, 3), strides=[2, 2], output_shape=[22, 18]),
    "2d_same_upper": _transposed(IMAGE, (6, 4, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    "2d_dilated": _transposed(IMAGE, (6, 4, 3, 2), strides=[2, 1], dilations=[2, 3], pads=[1, 0, 0, 1]),
    "2d_two_groups": _transposed(IMAGE, (6, 4, 3, 3), group=2, strides=[2, 2]),
    "2d_two_groups_computed": Case("ConvTranspose", IMAGE, {"group": 2}, {"w": (6, 4, 3, 3)}),
    "2d_depthwise": _transposed((1, 12, 5, 6), (12, 1, 4, 4), group=12, strides=[2, 2], pads=[1, 1, 1, 1]),
    "2d_depthwise_output_padding": _transposed(
        (1, 12, 5, 6), (12, 2, 3, 3), group=12, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    "2d_many_groups": _transposed((1, 20, 5, 6), (20, 3, 3, 3), group=10, strides=[2, 1], dilations=[1, 2]),
    "2d_many_groups_cut": _transposed((1, 20, 5, 6), (20, 3, 1, 2), group=10, strides=[2, 1], pads=[1, 2, 0, 1]),
    "3d": _transposed(VOLUME, (6, 4, 3, 3, 3), strides=[2, 2, 2], pads=[1] * 6, output_padding=[1, 1, 1]),
    "3d_two_groups": _transposed(VOLUME, (6, 2, 2, 3, 2), group=2, strides=[2, 1, 2]),
    "3d_dilated": _transposed(VOLUME, (6, 4, 2, 2, 2), dilations=[2, 1, 2]),
}
POOLS = {
    "max_1d": _pool("MaxPool", [3], LINE, strides=[2], pads=[1, 1]),
    "max_1d_dilated": _pool("MaxPool", [3], LINE, dilations=[2], pads=[1, 1]),
    "max_dilated_ceil": _pool("MaxPool", [3, 2], dilations=[2, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 1, 0]),
    "max_3d": _pool("MaxPool", [2, 3, 3], VOLUME, strides=[1, 2, 2], pads=[1, 1, 1, 0, 1, 1], ceil_mode=1),
    "max_3d_dilated": _pool("MaxPool", [2, 2, 2], VOLUME, dilations=[2, 1, 3]),
    "max_ceil_window_beyond": _pool("MaxPool", [3, 1], strides=[2, 3], ceil_mode=1),
    "average_1d": _pool("AveragePool", [3], LINE, pads=[1, 1], strides=[2]),
    "average_ceil": _pool("AveragePool", [3, 3], strides=[2, 2], ceil_mode=1),
    "average_ceil_counted": _pool(
        "AveragePool", [3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 1, 1], count_include_pad=1
    ),
    "average_strided_uncounted": _pool("AveragePool", [3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average_3d": _pool("AveragePool", [2, 3, 3], VOLUME, strides=[2, 1, 2], pads=[1, 1, 1, 0, 1, 1]),
    "average_3d_counted": _pool("AveragePool", [3, 3, 3], VOLUME, pads=[1] * 6, count_include_pad=1),
    "average_dilated": _pool("AveragePool", [3, 3], dilations=[2, 2], pads=[1, 1, 1, 1]),
    "lp_3": _pool("LpPool", [3, 2], p=3, strides=[2, 2]),
    "lp_1": _pool("LpPool", [3, 2], p=1),
    "global_lp": Case("GlobalLpPool", IMAGE, {"p": 3}),
    "global_average_3d": Case("GlobalAveragePool", VOLUME),
    "global_max_1d": Case("GlobalMaxPool", LINE),
}
RESIZES = {
    "cubic": _resize([2, 6, 17, 20], mode="cubic"),
    "cubic_smaller_aligned": _resize(
        [2, 6, 5, 4], mode="cubic", coordinate_transformation_mode="align_corners", cubic_coeff_a=-0.5
    ),
    "linear_smaller": _resize([2, 6, 4, 5], mode="linear"),
    "linear_aligned_by_scales": Case(
        "Resize",
        IMAGE,
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        constants={"scales": np.array([1, 1, 1.3, 0.6], np.float32)},
        inputs=("x", "", "scales"),
    ),
    "linear_antialias": _resize([2, 6, 4, 5], mode="linear", antialias=1),
    "linear_1d": _resize([2, 6, 20], LINE, mode="linear"),
    "linear_3d": _resize([2, 6, 10, 14, 12], VOLUME, mode="linear"),
    "nearest_3d": _resize([2, 6, 10, 14, 12], VOLUME, mode="nearest", nearest_mode="ceil"),
    "nearest_channels": _resize([2, 12, 11, 9], mode="nearest"),
    "linear_channels": _resize([2, 4, 11, 9], mode="linear", coordinate_transformation_mode="align_corners"),
}
SAMPLES = {
    f"grid_{mode}_{padding}_{aligned}": Case(
        "GridSample",
        IMAGE,
        {"mode": mode, "padding_mode": padding, "align_corners": aligned},
        {"grid": (2, 5, 7, 2)},
    )
    for mode in ("nearest", "linear", "cubic")
    for padding in ("zeros", "border", "reflection")
    for aligned in (0, 1)
} | {
    "grid_3d": Case("GridSample", VOLUME, {"mode": "linear", "padding_mode": "border"}, {"grid": (2, 3, 4, 5, 3)}),
}
REGIONS = np.array([[0.5, 1, 6.2, 8.3], [-3, 2, 4, 30], [2, 2, 2.1, 2.2]], np.float32)


def _roi(**attributes: Any) -> Case:
    attributes = {"output_height": 3, "output_width": 2, "sampling_ratio": 2, "spatial_scale": 0.9, **attributes}
    constants = {"rois": REGIONS, "batch": np.array([0, 1, 1])}
    return Case("RoiAlign", IMAGE, attributes, constants=constants)


def _columns(shape: tuple[int, ...], image: list[int], window: list[int], **attributes: Any) -> Case:
    return Case("Col2Im", shape, attributes, constants={"image": np.array(image), "window": np.array(window)})


OTHERS = {
    "deformed": Case(
        "DeformConv",
        (2, 8, 6, 7),
        {"pads": [1, 0, 1, 1], "strides": [1, 2], "group": 2, "offset_group": 2},
        {"w": (6, 4, 3, 3), "offset": (2, 36, 6, 3), "b": (6,), "mask": (2, 18, 6, 3)},
    ),
    "roi_mean": _roi(),
    "roi_unaligned": _roi(coordinate_transformation_mode="output_half_pixel", sampling_ratio=3),
    "columns_overlapping": _columns((2, 18, 30), [6, 7], [3, 3], pads=[0, 1, 1, 0]),
    "columns_strided": _columns((2, 8, 6), [5, 8], [2, 2], strides=[2, 3]),
    "columns_dilated": _columns((1, 12, 8), [6, 5], [3, 2], dilations=[2, 1]),
    "columns_tiles": _columns((2, 12, 6), [4, 6], [2, 2], strides=[2, 2]),
    "fourier": Case("DFT", (2, 5, 9, 2), {}, constants={"length": np.array(12), "axis": np.array(1)}),
    "fourier_back": Case("DFT", (2, 9, 2), {"inverse": 1}),
    "fourier_of_frames": Case(
        "STFT", (2, 40, 1), {"onesided": 1}, constants={"step": np.array(5), "w": np.hanning(12).astype("f4")}
    ),
    "affine_grid": Case("AffineGrid", (2, 2, 3), {"align_corners": 1}, constants={"size": np.array([2, 3, 4, 5])}),
}
CASES = {
    f"{family}_{name}": case
    for family, cases in {
        "conv": CONVOLUTIONS,
        "transposed": TRANSPOSED,
        "pool": POOLS,
        "resize": RESIZES,
        "sample": SAMPLES,
        "other": OTHERS,
    }.items()
    for name, case in cases.items()
}


def _model(case: Case, make: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    names = case.inputs or ("x", *case.others, *case.constants)
    node = helper.make_node(case.op, names, ["y"], name="node", **case.attributes)
    constants = {name: np.asarray(values) for name, values in case.constants.items()}
    return make([node], {"x": case.shape, **case.others}, ["y"], constants, case.opset)


@pytest.mark.parametrize("judge", ["xnnpack", "tensorflow"], indirect=True)
@pytest.mark.parametrize("name", sorted(CASES))
def test_form_computes_what_onnx_runtime_does(
    name: str,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    judge: Callable[[Path], TFLiteSession],
) -> None:
    case = CASES[name]
    model = _model(case, model_of)
    random = np.random.default_rng(7)
    feeds = {"x": random.normal(0, 1, case.shape).astype(np.float32)}
    feeds |= {key: random.normal(0, 0.7, shape).astype(np.float32) for key, shape in case.others.items()}
    expected = reference(model, feeds)["y"]
    result = judge(convert(model)).run(feeds)["y"]
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in CASES
        if name.startswith(("conv_3d", "transposed_3d")) and name != "transposed_3d_dilated"  # gets a larger kernel
    ),
)
def test_the_work_of_convolutions_in_space_is_counted(
    name: str, model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path]
) -> None:
    model = _model(CASES[name], model_of)
    share = TARGET.integer_share(convert(model))
    assert share.total_macs > 0
    assert share.integer_macs == 0
    assert share.total_macs == sum(count_macs(ir.from_proto(model)).values())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 2, 4, 2, 6)], ids=["plane", "space"])
def test_maxima_say_where_they_lie_and_can_be_put_back(  # noqa: PLR0917 - fixtures
    order: int,
    shape: tuple[int, ...],
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    judge: Callable[[Path], TFLiteSession],
) -> None:
    rank = len(shape) - 2
    window = {"kernel_shape": [2] * rank, "strides": [2] * rank}
    nodes = [helper.make_node("MaxPool", ["x"], ["y", "i"], name="pool", storage_order=order, **window)]
    if order == 0:
        nodes.append(helper.make_node("MaxUnpool", ["y", "i"], ["z"], name="unpool", **window))
    model = model_of(nodes, {"x": shape}, ["y", "z"][: len(nodes)])
    model.graph.output.append(helper.make_tensor_value_info("i", onnx.TensorProto.INT64, None))
    model = onnx.shape_inference.infer_shapes(model)
    feeds = {"x": np.random.default_rng(5).integers(-3, 3, shape).astype(np.float32)}
    seen = judge(convert(model)).run(feeds)
    for name, values in reference(model, feeds).items():
        np.testing.assert_array_equal(seen[name], values)


def test_a_resize_on_a_dynamic_batch_keeps_it(
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Array]],
    judge: Callable[[Path], TFLiteSession],
) -> None:
    constants = {"scales": np.array([1, 1, 2, 1.5], np.float32)}
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="node", mode="cubic")
    model = model_of([node], {"x": ["N", 3, 5, 6]}, ["y"], constants)
    feeds = {"x": np.random.default_rng(5).normal(size=(3, 3, 5, 6)).astype(np.float32)}
    np.testing.assert_allclose(
        judge(convert(model)).run(feeds)["y"], reference(model, feeds)["y"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("window", [(2, 2, 1), (2, 3, 1), (3, 2, 1), (3, 4, 1), (2, 3, 2)])
def test_a_transposed_convolution_padded_as_same_has_the_size_of_the_standard(
    convert: Any, reference: Any, auto_pad: str, extra: int, window: tuple[int, int, int]
) -> None:
    """Input times stride, whatever `output_padding` is; ONNX's own inference adds it."""
    stride, kernel, dilation = window
    rng = np.random.default_rng(0)
    node = onnx.helper.make_node(
        "ConvTranspose", ["x", "w"], ["y"], "t", auto_pad=auto_pad, strides=[stride] * 2,
        dilations=[dilation] * 2, output_padding=[extra] * 2,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    weights = onnx.numpy_helper.from_array(rng.normal(size=(2, 3, kernel, kernel)).astype(np.float32), "w")
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1, 2, 4, 5])], [value("y", 1, [None] * 4)], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    feeds = {"x": rng.normal(size=(1, 2, 4, 5)).astype(np.float32)}
    expected, seen = reference(model, feeds)["y"], TFLiteSession(convert(model)).run(feeds)["y"]
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
