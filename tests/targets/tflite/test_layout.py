"""The layout decision: no data moves inside a convolutional network, and the algebra behind it is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from edgeship.calibration.types import QuantParams, TensorSpec
from edgeship.targets.tflite.graph import Tensor
from edgeship.targets.tflite.layout import Layout, channels_last, move, natural, reshaped, same_bytes
from edgeship.targets.tflite.layout_moves import moves
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Model = Callable[..., onnx.ModelProto]
Convert = Callable[..., Path]
Operators = Callable[[Path], Counter[str]]
Reference = Callable[..., dict[str, Array]]
RNG = np.random.default_rng(3)


def weights(*shape: int) -> Array:
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def conv(x: str, y: str, w: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, w], [y], name=f"conv_{y}", **attributes)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)


def check(model: onnx.ModelProto, path: Path, reference: Reference) -> None:
    feeds = {
        value.name: RNG.normal(size=[d.dim_value for d in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
    }
    seen = TFLiteSession(path).run(feeds)
    for name, expected in reference(model, feeds).items():
        np.testing.assert_allclose(seen[name], expected, rtol=1e-4, atol=1e-5)


def test_plain_network_with_flatten_and_gemm_has_no_transpose(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        conv("x", "a", "w1", pads=[1] * 4),
        node("Relu", ["a"], "b"),
        node("MaxPool", ["b"], "c", kernel_shape=[2, 2], strides=[2, 2]),
        conv("c", "d", "w2"),
        node("Flatten", ["d"], "e"),
        node("Relu", ["e"], "f"),
        node("Gemm", ["f", "w3", "b3"], "y", transB=1),
    ]
    constants = {"w1": weights(6, 3, 3, 3), "w2": weights(5, 6, 2, 2), "w3": weights(7, 5 * 3 * 3), "b3": weights(7)}
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], constants)
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 0
    assert operators(path)["RELU"] == 1  # the one after Flatten; the other is fused
    check(model, path, reference)


def test_global_pool_reshaped_to_a_vector_has_no_transpose(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        conv("x", "a", "w1"),
        node("GlobalAveragePool", ["a"], "b"),
        node("Reshape", ["b", "shape"], "c"),
        node("MatMul", ["c", "w2"], "y"),
    ]
    constants = {"w1": weights(6, 3, 3, 3), "shape": np.array([1, 6]), "w2": weights(6, 4)}
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], constants)
    path = convert(model)
    assert operators(path) == Counter(CONV_2D=1, MEAN=1, RESHAPE=1, FULLY_CONNECTED=1)
    check(model, path, reference)


def test_detector_heads_that_transpose_to_nhwc_themselves_cost_nothing(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [conv("x", "a", "w1", pads=[1] * 4)]
    for head in ("p", "q"):
        nodes += [
            conv("a", f"{head}1", f"w{head}"),
            node("Transpose", [f"{head}1"], f"{head}2", perm=[0, 2, 3, 1]),
            node("Reshape", [f"{head}2", "shape"], f"{head}3"),
        ]
    nodes += [node("Concat", ["p3", "q3"], "s", axis=1), node("Softmax", ["s"], "y", axis=2)]
    constants = {"w1": weights(6, 3, 3, 3), "wp": weights(4, 6, 1, 1), "wq": weights(8, 6, 1, 1)}
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], {**constants, "shape": np.array([1, -1, 2])})
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 0
    check(model, path, reference)


def test_elementwise_concat_slice_pad_softmax_over_channels_stay_channels_last(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        conv("x", "a", "w"),
        node("Slice", ["a", "starts", "ends", "axes", "steps"], "b"),
        node("Pad", ["b", "pads"], "c"),
        node("Add", ["c", "bias"], "d"),
        node("Concat", ["d", "c"], "e", axis=1),
        node("Softmax", ["e"], "f", axis=1),
        node("ReduceMean", ["f", "hw"], "g", keepdims=0),
        node("Mul", ["e", "e"], "y"),
    ]
    constants = {
        "w": weights(6, 3, 1, 1),
        "starts": np.array([0, 0]),
        "ends": np.array([100, 100]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
        "pads": np.array([0, 1, 0, 0, 0, 2, 0, 0]),
        "bias": weights(9, 1, 1),
        "hw": np.array([2, 3]),
    }
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y", "g"], constants)
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 0
    check(model, path, reference)


def test_model_whose_own_input_is_nhwc_keeps_it(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        node("Transpose", ["x"], "a", perm=[0, 3, 1, 2]),
        conv("a", "b", "w"),
        node("Transpose", ["b"], "y", perm=[0, 2, 3, 1]),
    ]
    model = model_of(nodes, {"x": (1, 8, 8, 3)}, ["y"], {"w": weights(4, 3, 3, 3)})
    path = convert(model)
    assert operators(path) == Counter(CONV_2D=1)
    check(model, path, reference)


def test_nchw_borders_cost_one_transpose_each(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [conv("x", "a", "w"), node("Relu", ["a"], "b"), conv("b", "y", "w2")]
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], {"w": weights(4, 3, 3, 3), "w2": weights(4, 4, 1, 1)})
    path = convert(model, io_layout="nchw")
    assert operators(path)["TRANSPOSE"] == 2
    check(model, path, reference)
    assert operators(convert(model))["TRANSPOSE"] == 0


def test_patch_embedding_reshape_and_transpose_cost_nothing(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        conv("x", "a", "w", strides=[4, 4]),
        node("Reshape", ["a", "tokens"], "b"),
        node("Transpose", ["b"], "c", perm=[0, 2, 1]),
        node("MatMul", ["c", "m"], "y"),
    ]
    constants = {"w": weights(6, 3, 4, 4), "tokens": np.array([1, 6, 16]), "m": weights(6, 5)}
    model = model_of(nodes, {"x": (1, 3, 16, 16)}, ["y"], constants)
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 0
    check(model, path, reference)


def test_reshape_that_mixes_channels_and_space_gets_the_moves_of_a_shuffle(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        conv("x", "a", "w"),
        node("Reshape", ["a", "groups"], "b"),
        node("Transpose", ["b"], "c", perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["c", "back"], "d"),
        conv("d", "y", "w2"),
    ]
    constants = {"w": weights(6, 3, 1, 1), "groups": np.array([1, 2, 3, 8, 8]), "back": np.array([1, 6, 8, 8])}
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], {**constants, "w2": weights(4, 6, 1, 1)})
    path = convert(model)
    check(model, path, reference)
    assert operators(path)["TRANSPOSE"] == 2


def test_same_computed_tensor_in_two_layouts_is_transposed_once(
    model_of: Model, convert: Convert, operators: Operators, reference: Reference
) -> None:
    nodes = [
        conv("x", "a", "w"),
        node("Reshape", ["a", "rows"], "b"),
        node("Reshape", ["a", "rows"], "c"),
        node("MatMul", ["b", "m1"], "y"),
        node("MatMul", ["c", "m2"], "z"),
    ]
    constants = {"w": weights(6, 3, 1, 1), "rows": np.array([6 * 8, 8]), "m1": weights(8, 3), "m2": weights(8, 4)}
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y", "z"], constants)
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 1
    check(model, path, reference)


def _in_memory(values: Array, layout: Layout) -> list[float]:
    return [float(v) for v in layout.lay(values).reshape(-1)]


@st.composite
def _grouped(draw: st.DrawFn, factors: list[int]) -> tuple[int, ...]:
    """A shape of which each size is a product of neighbouring factors."""
    shape, current = [], 1
    for factor in factors:
        current *= factor
        if draw(st.booleans()):
            shape.append(current)
            current = 1
    return (*shape, current)


@st.composite
def _reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    """Four shapes of the same number of elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=5))
    return tuple(draw(_grouped(factors)) for _ in range(4))


def _permutation(draw: Callable[[Any], Any], rank: int) -> Layout:
    return Layout(tuple(draw(st.permutations(range(rank)))))


@given(_reshapes(), st.data())
def test_reshaped_layout_leaves_memory_as_it_is(shapes: tuple[tuple[int, ...], ...], data: st.DataObject) -> None:
    first, second, third, _ = shapes
    values = np.arange(np.prod(first))
    source = _permutation(data.draw, len(first))
    torn = reshaped(source, first, second)
    assert torn is not None
    assert torn.fits(second)
    assert _in_memory(values.reshape(second), torn) == _in_memory(values.reshape(first), source)
    again = reshaped(torn, second, third)
    assert again is not None
    assert _in_memory(values.reshape(third), again) == _in_memory(values.reshape(first), source)
    assert reshaped(natural(len(first)), first, second) == natural(len(second))


@given(_reshapes(), st.data())
def test_move_between_any_two_layouts_is_one_transpose(
    shapes: tuple[tuple[int, ...], ...], data: st.DataObject
) -> None:
    shape = shapes[0]
    values = np.arange(np.prod(shape)).reshape(shape)
    have, want = (
        reshaped(_permutation(data.draw, len(other)), other, shape) or natural(len(shape)) for other in shapes[1:3]
    )
    way = move(have, want, shape)
    assert way is not None
    source, target = have.shape(shape), want.shape(shape)
    memory = have.lay(values).reshape(-1)
    for step in (way, way.between(source, target)):
        assert [int(v) for v in memory.reshape(step.shape).transpose(step.permutation).reshape(-1)] == _in_memory(
            values, want
        )
    assert same_bytes(have, want, shape) == (len(way.shape) <= 1)


@pytest.mark.parametrize(
    ("tables", "rows", "columns", "dtype", "count"),
    [
        (49, 2, 116, "int8", 2),
        (49, 116, 2, "int8", 2),
        (49, 6, 24, "int8", 2),
        (49, 8, 24, "int8", 1),  # wide enough
        (4, 2, 116, "int8", 1),  # a few tables
        (49, 2, 116, "float32", 2),
        (49, 4, 116, "float32", 1),
        (49, 2, 116, "int16", 1),  # not a type of XNNPACK's
    ],
)
def test_many_narrow_tables_are_transposed_in_two_moves(
    tables: int, rows: int, columns: int, dtype: str, count: int
) -> None:
    shape = (tables, rows, columns)
    quant = QuantParams(np.float32(1), np.int32(0), TensorSpec(8 if dtype == "int8" else 16))
    tensor = Tensor("x", shape, np.dtype(np.float32), None if dtype == "float32" else quant)
    assert tensor.storage == dtype
    values = np.arange(np.prod(shape)).reshape(shape)
    steps = moves(tensor, natural(3), Layout((0, 2, 1)), shape)
    memory = values
    for step in steps:
        memory = memory.reshape(step.shape).transpose(step.permutation)
    np.testing.assert_array_equal(memory, values.transpose(0, 2, 1))
    assert len(steps) == count
    assert count == 1 or all(step.permutation[0] != 0 for step in steps)  # no loop over the tables


@given(st.permutations(range(4)), st.tuples(*[st.sampled_from([1, 2, 3])] * 4))
def test_same_bytes_agrees_with_memory(perm: list[int], shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    equal = _in_memory(values, Layout(tuple(perm))) == _in_memory(values, channels_last(4))
    assert same_bytes(Layout(tuple(perm)), channels_last(4), shape) == equal


def test_windows_of_a_picture_are_its_axes_torn_into_parts() -> None:
    picture, windows = (1, 4, 3, 2, 3, 5), (4 * 2, 3 * 3, 5)
    layout = reshaped(Layout((0, 1, 3, 2, 4, 5)), (1, 4, 2, 3, 3, 5), windows)
    assert layout == Layout((0, 1, 0, 1, 2), ((4, 2), (3, 3), (2, 1), (3, 1), None))
    assert layout.shape(windows) == picture[1:]
    assert layout.holds_whole([2])
    assert not layout.holds_whole([0])


def test_flattened_features_keep_the_order_they_lie_in() -> None:
    layout = reshaped(channels_last(4), (2, 3, 4, 5), (2, 60))
    assert layout is not None
    assert layout.shape((2, 60)) == (2, 20, 3)
    assert layout.before(1) == natural(1)
    assert [int(v) for v in layout.only(1).lay(np.arange(60)).reshape(-1)[:4]] == [0, 20, 40, 1]
