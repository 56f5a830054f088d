"""Weights alone made small: int8 with a DequantizeLinear, or float16 with a Cast; the layers stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.patches import kernel_rows
from edgeship.calibration.planning.pair_limit import can_overflow
from edgeship.calibration.types import QuantRules
from edgeship.calibration.writing.qdq import apply_plan
from edgeship.calibration.writing.weight_only import halve_weights, weight_only_plan

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[ir.Model, Mapping[str, Array]], dict[str, Array]]


def test_int8_weights_are_within_half_a_step_and_nothing_else_changes(tiny_model: ir.Model, rules: QuantRules) -> None:
    plan = weight_only_plan(tiny_model, rules)
    layers = [node for node in tiny_model.graph if node.op_type in {"Conv", "Gemm"}]
    assert plan.int8_nodes == tuple(node.name for node in layers)
    assert not plan.activations
    assert not plan.biases
    for name, constant in plan.weights.items():
        weights = tiny_model.graph.initializers[name].const_value
        assert weights is not None
        step = constant.params.dequantize(np.ones_like(constant.integers))
        error = np.abs(constant.params.dequantize(constant.integers) - weights.numpy())
        assert (error <= 0.5 * step * (1 + 1e-5)).all()
    model = apply_plan(tiny_model, plan)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {node.op_type for node in model.graph} - {node.op_type for node in tiny_model.graph} == {"DequantizeLinear"}


def test_pair_limited_int8_weights_cannot_clip(tiny_model: ir.Model, rules: QuantRules) -> None:
    plan = weight_only_plan(tiny_model, rules, "pair_limited")
    for node in tiny_model.graph:
        if node.op_type in {"Conv", "Gemm"} and "depthwise" not in node.name:
            constant = plan.weights[str(node.inputs[1].name)]  # type: ignore[union-attr]  # the tiny models have weights
            assert not can_overflow(kernel_rows(node, constant.integers)).any()


def test_a_transposed_convolution_has_a_scale_for_each_output_channel(
    build: Callable[..., ir.Model], rules: QuantRules
) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 2, 2, 2)).astype(np.float32)
    model = build("(float[1,3,4,4] x) => (float[1,2,5,5] y) { y = ConvTranspose(x, w) }", w=weights)
    constant = weight_only_plan(model, rules).weights["w"]
    assert constant.params.spec.axis == 1
    np.testing.assert_allclose(constant.params.scale, np.abs(weights).max(axis=(0, 2, 3)) / 127, rtol=1e-6)


def test_a_channel_of_zeros_stays_zero(build: Callable[..., ir.Model], rules: QuantRules) -> None:
    weights = np.zeros((2, 1, 1, 1), np.float32)
    weights[0] = 2.0
    model = build("(float[1,1,2,2] x) => (float[1,2,2,2] y) { y = Conv(x, w) }", w=weights)
    constant = weight_only_plan(model, rules).weights["w"]
    assert constant.params.dequantize(constant.integers).reshape(-1).tolist() == pytest.approx([2.0, 0.0], rel=1e-6)


def test_float16_weights_are_the_nearest_float16_numbers(
    tiny_model: ir.Model, run_exactly: Run, tiny_images: Array
) -> None:
    halved = halve_weights(tiny_model)
    onnx.checker.check_model(ir.to_proto(halved.model), full_check=True)
    for name in halved.weights:
        before, after = tiny_model.graph.initializers[name], halved.model.graph.initializers[f"{name}__half"]
        assert before.const_value is not None
        assert after.const_value is not None
        assert np.array_equal(after.const_value.numpy(), before.const_value.numpy().astype(np.float16))
        assert name not in halved.model.graph.initializers
    feeds = {"image": tiny_images[:1]}
    expected, seen = run_exactly(tiny_model, feeds)["logits"], run_exactly(halved.model, feeds)["logits"]
    assert np.abs(seen - expected).max() < 2e-3 * np.abs(expected).max()


def test_weights_beyond_float16_stay_float32_and_say_why(build: Callable[..., ir.Model]) -> None:
    model = build(
        "(float[1,2] x) => (float[1,2] z) { y = MatMul(x, w)\n z = MatMul(y, v) }",
        w=np.full((2, 2), 7e4, np.float32),
        v=np.eye(2, dtype=np.float32),
    )
    halved = halve_weights(model)
    assert halved.weights == ("v",)
    assert halved.stays_float == {
        "w": "MatMul_y (MatMul): its largest weight is 70000; accepted: at most 65504, float16's largest number"
    }


def test_a_model_without_weights_is_an_input_error(build: Callable[..., ir.Model], rules: QuantRules) -> None:
    model = build("(float[1,2] x) => (float[1,2] y) { y = Relu(x) }")
    with pytest.raises(InputError, match="no weights can be float16: the model has no layers"):
        halve_weights(model)
    with pytest.raises(InputError, match="no Conv, ConvTranspose, Gemm, MatMul whose weights can be int8"):
        weight_only_plan(model, rules)
