"""Loops whose length is known only at run time, in TFLite's WHILE, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import StageError, UnsupportedError
from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import Kernels, TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
SHAPE = (1, 4, 5, 5)


def looped(
    body: Sequence[onnx.NodeProto],
    *,
    trips: bool,
    until: bool,
    outputs: Sequence[str] = ("cond_out", "x_out"),
    scans: int = 0,
) -> onnx.ModelProto:
    """x carried through a loop, `n` times, or until a condition that the body computes, or both."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["cond_in"], ["cond_out"]), *body] if not until else list(body),
        "body",
        [value("i", TensorProto.INT64, []), value("cond_in", TensorProto.BOOL, []), value("x_in", 1, SHAPE)],
        [value("cond_out", TensorProto.BOOL, []), *(value(name, 1, SHAPE) for name in outputs[1:])],
    )
    loop = helper.make_node(
        "Loop", ["n" if trips else "", "", "x"], ["y", *(f"s{k}" for k in range(scans))], "loop", body=graph
    )
    inputs = [value("x", TensorProto.FLOAT, SHAPE), *([value("n", TensorProto.INT64, [])] if trips else [])]
    constants = {
        "w": (np.random.default_rng(0).normal(size=(4, 4, 3, 3)) / 6).astype(np.float32),
        "limit": np.array(40, np.float32),
        "two": np.array(2, np.float32),
    }
    main = helper.make_graph(
        [loop, helper.make_node("Add", ["y", "x"], ["z"])],
        "main",
        inputs,
        [value("z", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convolved() -> list[onnx.NodeProto]:
    """A convolution and a residual that reads the loop's outside."""
    return [
        helper.make_node("Conv", ["x_in", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Add", ["r", "x"], ["x_out"]),
    ]


def doubled_until_large() -> list[onnx.NodeProto]:
    """Twice x until its largest value reaches 40."""
    return [
        helper.make_node("Mul", ["x_in", "two"], ["x_out"]),
        helper.make_node("ReduceMax", ["x_out"], ["m"], keepdims=0),
        helper.make_node("Less", ["m", "limit"], ["cond_out"]),
    ]


@pytest.mark.parametrize("kernels", ["default", "builtin"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_computed_number_of_passes_is_run(convert: Any, reference: Any, count: int, kernels: Kernels) -> None:
    model = looped(convolved(), trips=True, until=False)
    feeds: dict[str, Array] = {
        "x": np.random.default_rng(1).normal(size=SHAPE).astype(np.float32),
        "n": np.array(count, np.int64),
    }
    expected = reference(model, feeds)["z"]
    seen = TFLiteSession(convert(model), 1, kernels).run(feeds)["z"]
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trips", [False, True])
def test_a_condition_that_the_body_computes_ends_the_loop(convert: Any, reference: Any, trips: bool) -> None:
    model = looped(doubled_until_large(), trips=trips, until=True)
    path = convert(model)
    for scale, count in ((1.0, 100), (0.01, 100), (0.01, 3), (100.0, 9)):
        feeds: dict[str, Array] = {"x": np.full(SHAPE, scale, np.float32) * np.linspace(0.5, 1, 5, dtype=np.float32)}
        if trips:
            feeds["n"] = np.array(count, np.int64)
        np.testing.assert_allclose(TFLiteSession(path).run(feeds)["z"], reference(model, feeds)["z"], rtol=1e-5)


def test_what_a_loop_cannot_do_is_refused_by_name(model_of: Callable[..., onnx.ModelProto]) -> None:
    del model_of
    collected = looped(
        [*convolved(), helper.make_node("Identity", ["r"], ["scan"])],
        trips=True,
        until=False,
        outputs=("cond_out", "x_out", "scan"),
        scans=1,
    )
    with pytest.raises(UnsupportedError) as caught:
        TARGET.convert(ir.from_proto(collected), ConvertOptions())
    assert "collects a value of each pass" in str(caught.value.findings[0])
    assert "a constant trip count" in caught.value.findings[0].accepted


def _recurrence(passes: int, ends: str = "cond_in") -> onnx.ModelProto:
    """x decays from pass to pass; the row of all its values, and one of the passes' numbers."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Mul", ["x_in", "decay"], ["x_out"]),
        helper.make_node("Identity", [ends], ["cond_out"]),
        helper.make_node("Sin", ["x_out"], ["wave"]),
        helper.make_node("Identity", ["i"], ["number"]),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [value("i", TensorProto.INT64, []), value("cond_in", TensorProto.BOOL, []), value("x_in", 1, [2, 3])],
        [
            value("cond_out", TensorProto.BOOL, []),
            value("x_out", 1, [2, 3]),
            value("wave", 1, [2, 3]),
            value("number", TensorProto.INT64, []),
        ],
    )
    loop = helper.make_node("Loop", ["n", "", "x"], ["y", "waves", "numbers"], "loop", body=body)
    main = helper.make_graph(
        [loop],
        "main",
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", 1, [2, 3]), value("waves", 1, [passes, 2, 3]), value("numbers", TensorProto.INT64, [passes])],
        [
            numpy_helper.from_array(np.array(passes, np.int64), "n"),
            numpy_helper.from_array(np.array(0.998, np.float32), "decay"),
        ],
    )
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("ends", ["count", "condition"])
def test_as_many_values_are_collected_as_the_model_says_and_any_other_number_fails(
    convert: Any, reference: Any, ends: str
) -> None:
    """The trip count, or what the body computes of x, shows at run time; the outputs' shapes say 5 passes."""
    model = _recurrence(5, "goes_on" if ends == "condition" else "cond_in")
    loop = model.graph.node[0]
    if ends == "condition":
        body = loop.attribute[0].g
        body.node.insert(1, helper.make_node("ReduceMax", ["x_out"], ["largest"], keepdims=0))
        body.node.insert(2, helper.make_node("Less", ["limit", "largest"], ["goes_on"]))
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.99, np.float32), "limit"))
        next(tensor for tensor in model.graph.initializer if tensor.name == "n").CopyFrom(
            numpy_helper.from_array(np.array(50, np.int64), "n")
        )
    else:
        del model.graph.initializer[0]
        model.graph.input.append(helper.make_tensor_value_info("n", TensorProto.INT64, []))
    path = convert(model)
    for count in (5, 3, 9):
        feeds: dict[str, Array] = {"x": np.full((2, 3), 0.99 / 0.998 ** (count - 0.5), np.float32)}
        if ends == "count":
            feeds["n"] = np.array(count, np.int64)
        expected = reference(model, feeds)
        assert len(expected["waves"]) == count
        if count != 5:
            with pytest.raises(StageError):
                TFLiteSession(path).run(feeds)
            continue
        seen = TFLiteSession(path).run(feeds)
        for name, values in expected.items():
            np.testing.assert_allclose(seen[name], values, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["default", "builtin"])
@pytest.mark.parametrize("passes", [1, 3, 1500])
def test_rows_that_the_passes_of_a_long_loop_fill_are_whole(
    convert: Any, operators: Any, reference: Any, passes: int, kernels: Kernels
) -> None:
    model, feeds = _recurrence(passes), {"x": np.linspace(-2, 3, 6, dtype=np.float32).reshape(2, 3)}
    path = convert(model)
    assert operators(path)["WHILE"] == (passes > 1024)  # shorter ones are unrolled
    seen = TFLiteSession(path, 1, kernels).run(feeds)
    for name, values in reference(model, feeds).items():
        np.testing.assert_allclose(seen[name], values, rtol=1e-4, atol=1e-5)
