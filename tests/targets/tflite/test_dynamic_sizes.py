"""Sizes known only at run time: what is repeated, expanded, filled and broadcast as often as a dynamic batch says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
BATCH = [
    helper.make_node("Shape", ["x"], ["whole"]),
    helper.make_node("Gather", ["whole", "first"], ["batch"]),
]
"""The batch as a vector of one, as exporters write it."""


def batch_and(rest: Sequence[int]) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """The nodes and constants that make `shape`: the batch, then `rest`."""
    nodes = [*BATCH, helper.make_node("Concat", ["batch", "rest"], ["shape"], axis=0)]
    return nodes, {"first": np.array([0]), "rest": np.array(rest)}


def assert_agrees_at_every_batch(
    model: onnx.ModelProto,
    path: Path,
    reference: Callable[..., dict[str, Any]],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    session = TFLiteSession(path)
    for batch in (1, 3, 2):
        feeds = {name: RNG.normal(size=(batch, *rest)).astype(np.float32) for name, rest in shapes.items()}
        np.testing.assert_allclose(session.run(feeds)["y"], reference(model, feeds)["y"], atol=1e-5)


@pytest.mark.parametrize("repeat", ["Expand", "Tile"])
def test_a_class_token_is_repeated_as_often_as_the_batch_says(
    repeat: str, model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], reference: Callable[..., Any]
) -> None:
    nodes, constants = batch_and([1, 4] if repeat == "Expand" else [1, 1])
    nodes += [
        helper.make_node(repeat, ["token", "shape"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "x"], ["y"], axis=1),
    ]
    constants["token"] = RNG.normal(size=(1, 1, 4)).astype(np.float32)
    model = model_of(nodes, {"x": ("N", 5, 4)}, ["y"], constants)
    assert_agrees_at_every_batch(model, convert(model), reference, {"x": (5, 4)})


def test_a_constant_is_filled_in_as_often_as_the_batch_says(
    model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], reference: Callable[..., Any]
) -> None:
    value = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
    nodes, constants = batch_and([2, 4])
    nodes += [
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=value),
        helper.make_node("Concat", ["x", "filled"], ["y"], axis=1),
    ]
    model = model_of(nodes, {"x": ("N", 3, 4)}, ["y"], constants)
    assert_agrees_at_every_batch(model, convert(model), reference, {"x": (3, 4)})


def test_what_is_computed_is_expanded_to_a_dynamic_shape(
    model_of: Callable[..., onnx.ModelProto], convert: Callable[..., Path], reference: Callable[..., Any]
) -> None:
    nodes, constants = batch_and([6, 4])
    nodes += [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"]),
        helper.make_node("Expand", ["mean", "shape"], ["wide"]),
        helper.make_node("Concat", ["x", "wide"], ["y"], axis=1),
    ]
    model = model_of(nodes, {"x": ("N", 3, 4)}, ["y"], {**constants, "axes": np.array([1])})
    assert_agrees_at_every_batch(model, convert(model), reference, {"x": (3, 4)})


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 1, 4, 1), (3, 2, 4, 5)),
        ((3, 4, 2, 5, 1), (3, 1, 2, 5, 6)),
        ((1, 4, 1, 5, 1, 2), (3, 1, 2, 1, 3, 2)),
    ],
)
@pytest.mark.parametrize("operator", ["Add", "Less", "Where"])
def test_operands_of_many_axes_broadcast_on_a_dynamic_batch(  # noqa: PLR0917 - a case and its fixtures
    left: Sequence[int],
    right: Sequence[int],
    operator: str,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[..., Any],
) -> None:
    if operator == "Where":
        nodes = [helper.make_node("Less", ["a", "b"], ["c"]), helper.make_node("Where", ["c", "a", "b"], ["y"])]
    else:
        nodes = [helper.make_node(operator, ["a", "b"], ["z"]), helper.make_node("Cast", ["z"], ["y"], to=1)]
    model = model_of(nodes, {"a": ("N", *left), "b": ("N", *right)}, ["y"])
    assert_agrees_at_every_batch(model, convert(model), reference, {"a": left, "b": right})


def test_initial_states_of_zeros_cost_nothing_on_a_dynamic_batch(
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., Any],
) -> None:
    weights = {name: RNG.normal(size=(1, 12, n)).astype(np.float32) for name, n in (("w", 4), ("r", 3))}
    constants = {"first": np.array([0]), "front": np.array([1]), "rest": np.array([3]), **weights}
    nodes = [
        *BATCH,
        helper.make_node("Concat", ["front", "batch", "rest"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Transpose", ["x"], ["sequence"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["sequence", "w", "r", "", "", "zeros", "zeros"], ["y"], hidden_size=3),
    ]
    model = model_of(nodes, {"x": ("N", 5, 4)}, ["y"], constants)
    path = convert(model)
    assert not {"FILL", "SHAPE", "GATHER"} & set(operators(path))
    assert_agrees_at_every_batch(model, path, reference, {"x": (5, 4)})


def test_a_size_that_either_of_two_inputs_may_have_is_refused_with_its_node(
    model_of: Callable[..., onnx.ModelProto],
) -> None:
    nodes, constants = batch_and([1, 4])
    nodes.append(helper.make_node("Expand", ["token", "shape"], ["y"], name="tokens"))
    constants["token"] = RNG.normal(size=(1, 1, 4)).astype(np.float32)
    model = model_of(nodes, {"x": ("N", 5, 4), "other": ("M", 5, 4)}, ["y"], constants)
    (finding,) = TARGET.check(ir.from_proto(model))
    assert finding.where == "Expand 'tokens'"
    assert "static" in finding.accepted
