"""The rules are what ONNX Runtime does: looked up in the graph it executes, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.samples.data import Sample
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET, open_float, open_reference
from edgeship.targets.onnxruntime.rules import BETWEEN, INTEGER, MOVED
from edgeship.targets.onnxruntime.share import optimised

Array = np.ndarray[Any, np.dtype[Any]]
SHAPE = [1, 4, 6, 6]
EXTRA: Mapping[str, list[Array]] = {
    "Clip": [np.float32(-1.5), np.float32(2.5)],
    "Expand": [np.array([2, 4, 6, 6])],
    "Gather": [np.array([2, 0])],
    "GatherElements": [np.ones((1, 4, 6, 6), np.int64)],
    "PRelu": [np.full((4, 1, 1), 0.2, np.float32)],
    "Pad": [np.array([0, 0, 1, 1, 0, 0, 1, 1])],
    "ReduceMax": [np.array([2, 3])],
    "ReduceMean": [np.array([2, 3])],
    "ReduceMin": [np.array([2, 3])],
    "Reshape": [np.array([1, -1])],
    "Resize": [np.array([], np.float32), np.array([1, 1, 2, 2], np.float32)],
    "Slice": [np.array([0, 0]), np.array([6, 6]), np.array([2, 3]), np.array([2, 2])],
    "Split": [np.array([1, 3])],
    "Squeeze": [np.array([0])],
    "Tile": [np.array([1, 1, 2, 1])],
    "Unsqueeze": [np.array([0])],
}
ATTRIBUTES: Mapping[str, dict[str, Any]] = {
    "AveragePool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "Concat": {"axis": 1},
    "DepthToSpace": {"blocksize": 2},
    "Gather": {"axis": 1},
    "GatherElements": {"axis": 1},
    "MaxPool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "SpaceToDepth": {"blocksize": 2},
    "Split": {"axis": 1},
    "Transpose": {"perm": [0, 2, 3, 1]},
}
BINARY = frozenset({"Add", "Concat", "Mul", "Sub"})


def _sandwich(operator: str, *, same_scale: bool) -> ir.Model:
    """QuantizeLinear, DequantizeLinear, the operator, QuantizeLinear, DequantizeLinear; all signed."""
    constants = {"s": np.float32(0.03), "z": np.int8(-7), "so": np.float32(0.03 if same_scale else 0.045)}
    constants["zo"] = np.int8(-7 if same_scale else 3)
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="in_q")]
    nodes.append(helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["a"], name="in_dq"))
    inputs = ["a"]
    if operator in BINARY:
        nodes.append(helper.make_node("QuantizeLinear", ["x2", "s", "z"], ["x2q"], name="in2_q"))
        nodes.append(helper.make_node("DequantizeLinear", ["x2q", "s", "z"], ["b"], name="in2_dq"))
        inputs.append("b")
    for place, value in enumerate(EXTRA.get(operator, [])):
        constants[f"c{place}"] = value
        inputs.append(f"c{place}")
    outputs = ["r0", "r1"] if operator == "Split" else ["r0"]
    nodes.append(helper.make_node(operator, inputs, outputs, name="middle", **ATTRIBUTES.get(operator, {})))
    for place, name in enumerate(outputs):
        nodes.append(helper.make_node("QuantizeLinear", [name, "so", "zo"], [f"q{place}"], name=f"out_q{place}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{place}", "so", "zo"], [f"y{place}"], name=f"dq{place}"))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, SHAPE)
            for n in (["", "2"] if operator in BINARY else [""])
        ],
        [helper.make_tensor_value_info(f"y{place}", TensorProto.FLOAT, None) for place in range(len(outputs))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def _feeds(model: ir.Model) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {str(value.name): rng.normal(scale=1.5, size=SHAPE).astype(np.float32) for value in model.graph.inputs}


def _executed(content: bytes) -> list[str]:
    return [node.op_type for node in optimised(content, "the model").graph]


@pytest.mark.parametrize("operator", INTEGER)
def test_an_operator_with_an_integer_kernel_is_fused(operator: str) -> None:
    artifact = TARGET.convert(_sandwich(operator, same_scale=False), ConvertOptions())
    assert f"QLinear{operator}" in _executed(artifact)


@pytest.mark.parametrize("operator", MOVED)
def test_a_moving_operator_moves_integers_when_both_sides_have_one_scale(operator: str) -> None:
    artifact = TARGET.convert(_sandwich(operator, same_scale=True), ConvertOptions())
    executed = _executed(artifact)
    assert executed.count("QuantizeLinear") == 1
    assert executed.count("DequantizeLinear") == (2 if operator == "Split" else 1)


@pytest.mark.parametrize("same_scale", [True, False])
@pytest.mark.parametrize("operator", sorted({*INTEGER, *MOVED, *BETWEEN} - {"Identity"}))
def test_the_artifact_agrees_with_the_signed_reference(operator: str, same_scale: bool) -> None:
    model = _sandwich(operator, same_scale=same_scale)
    feeds = _feeds(model)
    expected = open_reference(to_bytes(model)).run(feeds)
    seen = open_float(TARGET.convert(model, ConvertOptions())).run(feeds)
    scale = 0.03 if same_scale else 0.045
    allowed = 1.0 if operator in INTEGER else 0.0
    for name, values in expected.items():
        assert np.abs(seen[name] - values).max() / scale <= allowed + 1e-3, name


@pytest.mark.parametrize("columns", [3, 49, 400])
def test_a_softmax_of_small_probabilities_is_the_references(columns: int) -> None:
    """Rows that are nearly even: at 1 / 255 of the largest probability the kernel would be far off."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, columns]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], name="softmax")], "g", ports[:1], ports[1:])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    rng = np.random.default_rng(0)
    samples = [Sample(str(i), {"x": rng.normal(scale=0.03, size=(1, 8, columns)).astype(np.float32)}) for i in range(4)]
    plan, quantized = quantize_model(model, samples, TARGET.rules, open_float)
    artifact = open_float(TARGET.convert(quantized, ConvertOptions()))
    for sample in samples:
        expected = open_reference(to_bytes(quantized)).run(sample.feeds)["y"]
        assert np.abs(artifact.run(sample.feeds)["y"] - expected).max() <= 1.001 * plan.activations["y"].scale


def test_every_rule_is_tested_here() -> None:
    assert set(TARGET.rules.operators) == {*INTEGER, *MOVED, *BETWEEN, "Conv", "Gemm", "MatMul"}
    assert {name for name, rule in TARGET.rules.operators.items() if rule.shares_scale} == set(MOVED)


@pytest.mark.parametrize(("attribute", "value"), [("transA", 1), ("beta", 0.5), ("alpha", 2.0)])
def test_a_gemm_that_the_kernel_does_not_know_is_refused_with_the_value_seen(attribute: str, value: float) -> None:
    x, w, b = (ir.Value(name=name) for name in "xwb")
    check = TARGET.rules.operators["Gemm"].check
    assert check(ir.node("Gemm", [x, w, b], {"transB": 1})) is None
    reason = check(ir.node("Gemm", [x, w, b], {attribute: value}))
    assert reason is not None
    assert f"{attribute} = {value}" in reason
