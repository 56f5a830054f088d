"""What detectors' decoders do with tensors: rows gathered by position, tensors taken apart by slices, axes padded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.targets.tflite.layers import TFLiteLayers
from edgeship.targets.tflite.session import TFLiteSession

RNG = np.random.default_rng(0)


def typed(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model with inputs of another type."""
    for value in model.graph.input:
        value.type.tensor_type.elem_type = kind
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.CopyFrom(onnx.ValueInfoProto(name=value.name))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("repeat", ["Expand", "Tile"])
@pytest.mark.parametrize("batch", ["N", 2])
def test_rows_of_the_best_queries_are_one_gather(  # noqa: PLR0917 - a case and its fixtures
    repeat: str,
    batch: str | int,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x", "last"], ["scores"], keepdims=0),
        helper.make_node("TopK", ["scores", "count"], ["best", "places"], axis=1),
        helper.make_node("Unsqueeze", ["places", "last"], ["columns"]),
        helper.make_node("Shape", ["x"], ["whole"], start=0, end=1),
        helper.make_node("Concat", ["whole", "rest"], ["expanded"], axis=0),
        helper.make_node(repeat, ["columns", "expanded" if repeat == "Expand" else "repeats"], ["wide"]),
        helper.make_node("GatherElements", ["x", "wide"], ["y"], axis=1),
    ]
    numbers = {"last": [-1], "count": [4], "rest": [4, 6], "repeats": [1, 1, 6]}
    model = model_of(nodes, {"x": (batch, 9, 6)}, ["y"], {name: np.array(value) for name, value in numbers.items()})
    path = convert(model)
    found = operators(path)
    assert found["GATHER"] == 1
    assert not {"BROADCAST_TO", "TILE", "FLOOR_MOD", "MUL"} & set(found)
    for count in (2,) if batch == 2 else (1, 3):
        feeds = {"x": RNG.normal(size=(count, 9, 6)).astype(np.float32)}
        np.testing.assert_array_equal(TFLiteSession(path).run(feeds)["y"], reference(model, feeds)["y"])


def test_elements_are_gathered_along_an_inner_axis_of_a_dynamic_batch(
    model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], reference: Callable[..., dict[str, Any]]
) -> None:
    nodes = [
        helper.make_node("TopK", ["x", "count"], ["best", "places"], axis=1),
        helper.make_node("GatherElements", ["x", "places"], ["y"], axis=1),
    ]
    model = model_of(nodes, {"x": ("N", 9, 6)}, ["y"], {"count": np.array([4])})
    session = TFLiteSession(convert(model))
    for count in (1, 3):
        feeds = {"x": RNG.normal(size=(count, 9, 6)).astype(np.float32)}
        np.testing.assert_array_equal(session.run(feeds)["y"], reference(model, feeds)["y"])


@pytest.mark.parametrize("axis", [0, 1])
def test_constant_positions_that_are_one_for_each_row_are_told_from_others(
    axis: int,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Any]],
) -> None:
    rows = np.array([[2, -1, 0], [1, 1, 2]]).reshape(2, 3, 1) if axis else np.array([1, -2]).reshape(2, 1, 1)
    whole = np.broadcast_to(rows, (2, 3, 4)).copy()
    mixed = whole.copy()
    mixed[0, 0, 1] = 0
    nodes = [helper.make_node("GatherElements", ["x", name], [f"y_{name}"], axis=axis) for name in ("whole", "mixed")]
    model = model_of(nodes, {"x": (2, 3, 4)}, ["y_whole", "y_mixed"], {"whole": whole, "mixed": mixed})
    feeds = {"x": RNG.normal(size=(2, 3, 4)).astype(np.float32)}
    seen, expected = TFLiteSession(convert(model)).run(feeds), reference(model, feeds)
    for name in seen:
        np.testing.assert_array_equal(seen[name], expected[name])


@pytest.mark.parametrize(("cuts", "whole"), [((0, 2, 4, 6), True), ((0, 2, 4), False), ((0, 1, 3, 6), False)])
def test_slices_that_take_a_tensor_apart_in_equal_pieces_are_one_split(  # noqa: PLR0917 - a case and its fixtures
    cuts: Sequence[int],
    whole: bool,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    ends = {f"at{cut}": np.array([cut]) for cut in cuts}
    pieces = list(pairwise(cuts))[::-1]
    nodes = [helper.make_node("Slice", ["x", f"at{a}", f"at{b}", "axis"], [f"part{a}"]) for a, b in pieces]
    nodes += [helper.make_node("Relu", [f"part{a}"], [f"y{a}"]) for a, _ in pieces]
    names = [f"y{a}" for a, _ in pieces]
    model = model_of(nodes, {"x": (1, 6, 4, 4)}, names, {**ends, "axis": np.array([1])})
    path = convert(model)
    assert (operators(path)["SPLIT"], operators(path)["SLICE"]) == ((1, 0) if whole else (0, len(pieces)))
    feeds = {"x": RNG.normal(size=(1, 6, 4, 4)).astype(np.float32)}
    seen, expected = TFLiteSession(path).run(feeds), reference(model, feeds)
    for name in names:
        np.testing.assert_array_equal(seen[name], expected[name])


@pytest.mark.parametrize("pads", [(1, 0, 2, 1, 1, 2, 1), (0, 0, 1, 0, 0, 2, 0), (0, 1, 0, 1, 0, 1, 0)])
@pytest.mark.parametrize("value", [None, 1.5])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT32])
def test_a_pad_takes_more_axes_than_its_kernel(  # noqa: PLR0917 - a case and its fixtures
    pads: Sequence[int],
    value: float | None,
    kind: int,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Any]],
) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants: dict[str, Any] = {"pads": np.array([*pads, *pads[::-1]])}
    if value is not None:
        constants["value"] = np.array(value, dtype)
    nodes = [helper.make_node("Pad", ["x", "pads", *(["value"] if value is not None else [])], ["y"])]
    model = typed(model_of(nodes, {"x": (1, 2, 1, 2, 3, 1, 2)}, ["y"], constants), kind)
    feeds = {"x": RNG.integers(-9, 9, (1, 2, 1, 2, 3, 1, 2)).astype(dtype)}
    seen = TFLiteSession(convert(model, io_layout="nchw")).run(feeds)["y"]
    np.testing.assert_array_equal(seen, reference(model, feeds)["y"])


@pytest.mark.parametrize("operator", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_the_place_of_an_extremum_among_int64_is_exact(
    operator: str,
    last: int,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Any]],
) -> None:
    nodes = [helper.make_node(operator, ["x"], ["y"], axis=1, select_last_index=last)]
    model = typed(model_of(nodes, {"x": (2, 5, 3)}, ["y"]), TensorProto.INT64)
    feeds = {"x": RNG.integers(0, 3, (2, 5, 3)) + (1 << 60)}
    np.testing.assert_array_equal(TFLiteSession(convert(model)).run(feeds)["y"], reference(model, feeds)["y"])


def test_truth_values_are_split(
    model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], reference: Callable[..., dict[str, Any]]
) -> None:
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["mask"]),
        helper.make_node("Split", ["mask"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("And", ["a", "b"], ["both"]),
        helper.make_node("Cast", ["both"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"x": (2, 4)}, ["y"], {"zero": np.zeros((), np.float32)})
    feeds = {"x": RNG.normal(size=(2, 4)).astype(np.float32)}
    np.testing.assert_array_equal(TFLiteSession(convert(model)).run(feeds)["y"], reference(model, feeds)["y"])


def test_what_has_no_elements_is_not_computed(
    model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], operators: Callable[[Path], Counter[str]]
) -> None:
    constants = {"end": np.array([9]), "axis": np.array([1])}
    nodes = [
        helper.make_node("Slice", ["x", "end", "end", "axis"], ["nothing"]),
        helper.make_node("Sigmoid", ["nothing"], ["still"]),
        helper.make_node("Concat", ["x", "still"], ["z"], axis=1),
        helper.make_node("Relu", ["z"], ["y"]),
    ]
    path = convert(model_of(nodes, {"x": (2, 4)}, ["y"], constants))
    assert operators(path) == {"RELU": 1}


def test_a_constant_of_one_axis_takes_part_in_a_gather_of_rows_of_integers(
    model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], reference: Callable[..., dict[str, Any]]
) -> None:
    table = numpy_helper.from_array(RNG.integers(0, 9, (1, 6, 2)), "table")
    nodes = [
        helper.make_node("Constant", [], ["numbers"], value=table),
        helper.make_node("ArgMax", ["x"], ["place"], axis=1, keepdims=1),
        helper.make_node("Tile", ["place", "repeats"], ["wide"]),
        helper.make_node("GatherElements", ["numbers", "wide"], ["rows"], axis=1),
        helper.make_node("Cast", ["rows"], ["y"], to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {"x": (1, 6, 1)}, ["y"], {"repeats": np.array([1, 1, 2])})
    feeds = {"x": RNG.normal(size=(1, 6, 1)).astype(np.float32)}
    np.testing.assert_array_equal(TFLiteSession(convert(model)).run(feeds)["y"], reference(model, feeds)["y"])


@pytest.mark.parametrize(("wide", "dropped"), [((2, 6, 4), True), ((2, 1, 4), True), ((2, 1, 1), False)])
def test_an_expand_before_an_operator_that_broadcasts_is_dropped(  # noqa: PLR0917 - a case and its fixtures
    wide: Sequence[int],
    dropped: bool,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    nodes = [
        helper.make_node("Expand", ["gate", "shape"], ["gates"]),
        helper.make_node("Div", ["x", "gates"], ["y"]),
    ]
    model = model_of(nodes, {"x": wide, "gate": (2, 6, 1)}, ["y"], {"shape": np.array([2, 6, 4])})
    path = convert(model)
    assert operators(path)["BROADCAST_TO"] == (0 if dropped else 1)
    feeds = {"x": RNG.normal(size=wide), "gate": RNG.uniform(1, 2, (2, 6, 1))}
    feeds = {name: values.astype(np.float32) for name, values in feeds.items()}
    np.testing.assert_allclose(TFLiteSession(path).run(feeds)["y"], reference(model, feeds)["y"], rtol=1e-6)


@pytest.mark.parametrize("rows", [(2, 3, 4), (2, 12)])
@pytest.mark.parametrize("behind", [(2, 3, 4, 6), (2, 12, 3, 2)])
@pytest.mark.parametrize("turned", [0, 1])
def test_a_product_between_reshapes_takes_its_rows_under_the_shape_they_have(  # noqa: PLR0917 - a case and its fixtures
    rows: Sequence[int],
    behind: Sequence[int],
    turned: int,
    model_of: Callable[..., onnx.ModelProto],
    quantize: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    weights = RNG.normal(0, 0.3, (6, 5) if turned else (5, 6)).astype(np.float32)
    constants = {"w": weights, "bias": RNG.normal(size=6).astype(np.float32)}
    constants |= {"flat": np.array([24, 5]), "behind": np.array(behind)}
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Reshape", ["s", "flat"], ["rows"]),
        helper.make_node("Gemm", ["rows", "w", "bias"], ["product"], transB=turned),
        helper.make_node("Relu", ["product"], ["positive"]),
        helper.make_node("Reshape", ["positive", "behind"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["y"]),
    ]
    model = model_of(nodes, {"x": (*rows, 5)}, ["y"], constants)
    feeds = {"x": RNG.normal(size=(*rows, 5)).astype(np.float32)}
    path = convert(model)
    assert operators(path)["RESHAPE"] == (0 if (*rows, 6) == behind else 1)
    np.testing.assert_allclose(TFLiteSession(path).run(feeds)["y"], reference(model, feeds)["y"], atol=1e-5)
    layers = TFLiteLayers(path).run(feeds)
    assert "positive" not in layers or layers["positive"].shape == (24, 6)
    assert ("positive" in layers) == ((*rows, 6) != behind)
    unit, product = (1 / 256, -128), (0.02, -128)
    ranges = {"x": (0.05, 0), **dict.fromkeys(("s", "rows", "y"), unit)}
    ranges |= dict.fromkeys(("product", "positive", "z"), product)
    quantized = quantize(model, ranges, {"w": 0 if turned else 1})
    path = convert(quantized)
    assert operators(path)["FULLY_CONNECTED"] == 1
    assert operators(path)["RESHAPE"] == (0 if (*rows, 6) == behind else 1)
    seen, expected = TFLiteSession(path).run(feeds)["y"], reference(quantized, feeds)["y"]
    assert np.abs(seen - expected).max() <= 2.001 / 256


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("wide", [(2, 3, 2, 2, 3, 2), (1, 3, 2, 1, 3, 1)])
def test_integers_of_six_axes_keep_the_scale_of_their_result(  # noqa: PLR0917 - a case and its fixtures
    operator: str,
    wide: Sequence[int],
    model_of: Callable[..., onnx.ModelProto],
    quantize: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., dict[str, Any]],
) -> None:
    other = (2, 1, 2, 2, 1, 2)
    model = model_of([helper.make_node(operator, ["x", "z"], ["y"])], {"x": wide, "z": other}, ["y"])
    quantized = quantize(model, {"x": (0.02, 3), "z": (0.03, -5), "y": (0.07, 11)})
    feeds = {"x": RNG.normal(size=wide), "z": RNG.normal(size=other)}
    feeds = {name: values.astype(np.float32) for name, values in feeds.items()}
    seen, expected = TFLiteSession(convert(quantized)).run(feeds)["y"], reference(quantized, feeds)["y"]
    assert np.abs(seen - expected).max() <= 0.07 * 1.001


@pytest.mark.parametrize("equation", ["bhwc,hkc->bhwk", "bhwc,ck->bhwk", "bhwc,bkc->bhwk"])
def test_a_contraction_of_the_last_axis_moves_no_data(
    equation: str,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    sizes = {"b": 2, "h": 3, "w": 4, "c": 5, "k": 6}
    weights = RNG.normal(size=[sizes[label] for label in equation[5:].partition("-")[0]]).astype(np.float32)
    nodes = [helper.make_node("Einsum", ["x", "weights"], ["y"], equation=equation)]
    model = model_of(nodes, {"x": (2, 3, 4, 5)}, ["y"], {"weights": weights})
    path = convert(model, io_layout="nchw")
    assert operators(path)["TRANSPOSE"] == 0
    feeds = {"x": RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)}
    np.testing.assert_allclose(TFLiteSession(path).run(feeds)["y"], reference(model, feeds)["y"], atol=1e-5)
