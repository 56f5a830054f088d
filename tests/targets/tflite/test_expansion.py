"""Operators that become others while the model is read: ONNX's functions, branches and loops."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import UnsupportedError
from edgeship.targets.tflite.flatfile import load, text
from edgeship.targets.tflite.ops import EXPANSIONS, REGISTRY
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Model = Callable[..., onnx.ModelProto]
Convert = Callable[..., Path]
Reference = Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]]
Operators = Callable[[Path], Counter[str]]
RNG = np.random.default_rng(8)


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def graph_of(
    nodes: list[onnx.NodeProto], inputs: Mapping[str, tuple[int, Any]], outputs: Mapping[str, int]
) -> onnx.GraphProto:
    """A body: inputs by element type and shape, outputs by element type."""
    return helper.make_graph(
        nodes,
        "body",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )


# ONNX's functions ----------------------------------------------------------------------------------------------------


def _vectors() -> Iterator[Any]:
    """The standard's vectors of operators that have no entry of their own but a definition by others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero on purpose
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    for case in cases:
        (first, *rest) = case.model.graph.node
        if rest or first.domain or first.op_type in REGISTRY or "expanded" in case.name:
            continue
        schema = onnx.defs.get_schema(first.op_type, case.model.opset_import[0].version)
        is_function = schema.has_function or schema.has_context_dependent_function
        kinds = {value.type.tensor_type.elem_type for value in (*case.model.graph.input, *case.model.graph.output)}
        plain = kinds <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
        if plain and (is_function or first.op_type in EXPANSIONS) and first.op_type not in OTHERWISE:
            yield pytest.param(case, id=case.name.removeprefix("test_"))


OTHERWISE = {
    *("Range", "Bernoulli", "Loop", "If", "SequenceMap", "CenterCropPad", "AffineGrid"),
    *("HannWindow", "HammingWindow", "BlackmanWindow"),
}
"""Their sizes or conditions are inputs of the vectors, or their outputs are random; tested below or elsewhere."""


@pytest.mark.parametrize("case", list(_vectors()))
def test_operator_without_an_entry_computes_what_its_definition_says(case: Any, convert: Convert) -> None:
    given, wanted = case.data_sets[0]
    names = [value.name for value in case.model.graph.input]
    outputs = TFLiteSession(convert(case.model)).run(dict(zip(names, map(array, given), strict=True)))
    for value, data in zip(case.model.graph.output, wanted, strict=True):
        np.testing.assert_allclose(outputs[value.name], array(data), rtol=1e-3, atol=1e-4)


def array(value: Any) -> Array:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def test_tensors_of_an_expanded_operator_carry_its_name(model_of: Model, convert: Convert) -> None:
    node = helper.make_node("MeanVarianceNormalization", ["x"], ["y"], name="centre")
    model = load(convert(model_of([node], {"x": (1, 3, 4, 5)}, ["y"])))
    names = [text(tensor.name) for tensor in model.subgraphs[0].tensors]
    assert any(name.startswith("centre/") for name in names)
    assert "y" in names


def test_refusal_inside_an_expanded_operator_names_both(model_of: Model, convert: Convert) -> None:
    body = graph_of(
        [helper.make_node("Magic", ["v"], ["w"], domain="elsewhere")],
        {"v": (TensorProto.FLOAT, (2,))},
        {"w": TensorProto.FLOAT},
    )
    node = helper.make_node("Scan", ["x"], ["y"], name="walk", num_scan_inputs=1, body=body)
    model = model_of([node], {"x": (3, 2)}, ["y"], domains=["elsewhere"])
    with pytest.raises(UnsupportedError, match=r"Scan 'walk'.*Magic in it.*'elsewhere'"):
        convert(model)


# Branches ------------------------------------------------------------------------------------------------------------


def branching(
    model_of: Model, condition: str, constants: Mapping[str, Array], then: tuple[str, dict[str, Any]] = ("Add", {})
) -> onnx.ModelProto:
    branches = {
        f"{name}_branch": graph_of(
            [helper.make_node(op, ["x", "two"], [f"{name}_out"], **attributes)], {}, {f"{name}_out": TensorProto.FLOAT}
        )
        for name, (op, attributes) in (("then", then), ("else", ("Mul", {})))
    }
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", [condition], ["y"], name="choice", **branches),
    ]
    numbers = {"two": np.array(2, np.float32), "zero": np.array(0, np.float32), **constants}
    return model_of(nodes, {"x": (2, 3)}, ["y"], numbers)


@pytest.mark.parametrize("value", [True, False])
def test_constant_condition_leaves_one_branch(
    value: bool, model_of: Model, convert: Convert, reference: Reference, operators: Operators
) -> None:
    model = branching(model_of, "known", {"known": np.array(value)})
    path, feeds = convert(model), {"x": normal(2, 3)}
    np.testing.assert_allclose(TFLiteSession(path).run(feeds)["y"], reference(model, feeds)["y"])
    assert set(operators(path)) == ({"ADD"} if value else {"MUL"})


def test_computed_condition_selects_between_the_branches(
    model_of: Model, convert: Convert, reference: Reference
) -> None:
    model = branching(model_of, "positive", {})
    session = TFLiteSession(convert(model))
    for sign in (1, -1):
        feeds = {"x": np.full((2, 3), sign, np.float32)}
        np.testing.assert_allclose(session.run(feeds)["y"], reference(model, feeds)["y"])


def test_branches_of_different_shapes_under_a_computed_condition_are_refused(model_of: Model, convert: Convert) -> None:
    model = branching(model_of, "positive", {"two": np.zeros((1, 3), np.float32)}, ("Concat", {"axis": 0}))
    with pytest.raises(UnsupportedError, match=r"If 'choice'.*\[3, 3\] and float32 \[2, 3\]"):
        convert(model)


# Loops ---------------------------------------------------------------------------------------------------------------


def looping(
    model_of: Model, condition: onnx.NodeProto, inputs: list[str], constants: Mapping[str, Array]
) -> onnx.ModelProto:
    """v = v * (pass + 1), and every v."""
    body = graph_of(
        [
            condition,
            helper.make_node("Cast", ["pass"], ["step"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["step", "one"], ["factor"]),
            helper.make_node("Mul", ["v", "factor"], ["w"]),
            helper.make_node("Identity", ["w"], ["seen"]),
        ],
        {"pass": (TensorProto.INT64, ()), "going": (TensorProto.BOOL, ()), "v": (TensorProto.FLOAT, (2,))},
        {"still": TensorProto.BOOL, "w": TensorProto.FLOAT, "seen": TensorProto.FLOAT},
    )
    node = helper.make_node("Loop", [*inputs, "x"], ["last", "all"], name="turns", body=body)
    return model_of([node], {"x": (2,)}, ["last", "all"], {"one": np.array(1, np.float32), **constants})


ALWAYS = helper.make_node("Identity", ["going"], ["still"])
TRIPS = {"trips": np.array(4, np.int64), "limit": np.array(2, np.int64), "many": np.array(2000, np.int64)}


def test_loop_with_a_known_trip_count_is_unrolled(
    model_of: Model, convert: Convert, reference: Reference, operators: Operators
) -> None:
    model = looping(model_of, ALWAYS, ["trips", ""], TRIPS)
    path, feeds = convert(model), {"x": normal(2)}
    for name, expected in reference(model, feeds).items():
        np.testing.assert_allclose(TFLiteSession(path).run(feeds)[name], expected, rtol=1e-6)
    assert operators(path)["MUL"] == 4


def test_loop_ends_when_its_condition_is_known_to_fail(
    model_of: Model, convert: Convert, reference: Reference, operators: Operators
) -> None:
    model = looping(model_of, helper.make_node("Less", ["pass", "limit"], ["still"]), ["", ""], TRIPS)
    path, feeds = convert(model), {"x": normal(2)}
    for name, expected in reference(model, feeds).items():
        np.testing.assert_allclose(TFLiteSession(path).run(feeds)[name], expected, rtol=1e-6)
    assert operators(path)["MUL"] == 3


@pytest.mark.parametrize(
    ("condition", "inputs", "message"),
    [
        (ALWAYS, ["computed", ""], "collects a value of each pass"),
        (ALWAYS, ["", ""], "never ends"),
        (helper.make_node("Less", ["short", "one"], ["still"]), ["many", ""], "collects a value of each pass"),
        (helper.make_node("Less", ["short", "one"], ["still"]), ["trips", ""], "collects a value of each pass"),
    ],
)
def test_loop_of_unknown_length_that_collects_values_is_refused(
    condition: onnx.NodeProto, inputs: list[str], message: str, model_of: Model, convert: Convert
) -> None:
    model = looping(model_of, condition, inputs, TRIPS)
    before = [
        helper.make_node("ReduceMax", ["x"], ["short"], keepdims=0),
        helper.make_node("Cast", ["short"], ["computed"], to=TensorProto.INT64),
    ]
    loop = model.graph.node[0]
    del model.graph.node[:]
    model.graph.node.extend([*before, loop])
    with pytest.raises(UnsupportedError, match=f"Loop 'turns'.*{message}"):
        convert(model)


def test_scan_walks_in_every_direction(model_of: Model, convert: Convert, reference: Reference) -> None:
    body = graph_of(
        [
            helper.make_node("Sub", ["state", "a"], ["difference"]),
            helper.make_node("Mul", ["difference", "b"], ["next"]),
            helper.make_node("Neg", ["next"], ["seen"]),
        ],
        {"state": (TensorProto.FLOAT, (2,)), "a": (TensorProto.FLOAT, (2,)), "b": (TensorProto.FLOAT, (2,))},
        {"next": TensorProto.FLOAT, "seen": TensorProto.FLOAT, "difference": TensorProto.FLOAT},
    )
    node = helper.make_node(
        "Scan",
        ["start", "rows", "columns"],
        ["last", "all", "differences"],
        body=body,
        num_scan_inputs=2,
        scan_input_axes=[0, -1],
        scan_input_directions=[0, 1],
        scan_output_axes=[-1, 0],
        scan_output_directions=[1, 0],
    )
    shapes = {"start": (2,), "rows": (3, 2), "columns": (2, 3)}
    model = model_of([node], shapes, ["last", "all", "differences"])
    feeds = {name: normal(*shape) for name, shape in shapes.items()}
    seen = TFLiteSession(convert(model)).run(feeds)
    for name, expected in reference(model, feeds).items():
        np.testing.assert_allclose(seen[name], expected, rtol=1e-5)


# What has no tensors to work on ---------------------------------------------------------------------------------------


def test_optional_tensor_is_the_tensor_itself(model_of: Model, convert: Convert, operators: Operators) -> None:
    nodes = [
        helper.make_node("Optional", ["x"], ["maybe"]),
        helper.make_node("OptionalGetElement", ["maybe"], ["a"]),
        helper.make_node("Neg", ["a"], ["y"]),
    ]
    assert operators(convert(model_of(nodes, {"x": (2, 3)}, ["y"]))) == {"NEG": 1}


def test_sequences_are_refused_by_name(model_of: Model, convert: Convert) -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["all"], name="pair"),
        helper.make_node("SequenceAt", ["all", "zero"], ["y"]),
    ]
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"zero": np.array(0)})
    with pytest.raises(UnsupportedError, match="SequenceConstruct 'pair': TFLite has no sequences of tensors"):
        convert(model)
