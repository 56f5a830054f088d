"""Pair-limited weights: no lane overflows, the error is no worse than plain enlargement, and only what must changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.calibration.graph.patches import from_kernel_rows, kernel_rows
from edgeship.calibration.planning.pair_limit import can_overflow, lane_pairs, limit_constant, limited_channels
from edgeship.calibration.types import QuantizedConstant, QuantParams, QuantRules, TensorSpec


def _node(op: str = "Conv", **attributes: Any) -> ir.Node:
    values = [ir.Value(name=name) for name in ("x", "w")]
    return ir.node(op, values, attributes, name="layer")


def _quantized(weights: np.ndarray, axis: int = 0) -> QuantizedConstant:
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = np.maximum(np.abs(weights).max(axis=others), 1e-6) / 127
    spec = TensorSpec(symmetric=True, axis=axis)
    params = QuantParams(scale, np.zeros(scale.shape), spec)
    return QuantizedConstant(params, params.quantize(weights))


def _error(weights: np.ndarray, constant: QuantizedConstant) -> np.ndarray:
    squares = (weights - constant.params.dequantize(constant.integers)) ** 2
    axis = constant.params.spec.axis
    return squares.sum(axis=tuple(i for i in range(weights.ndim) if i != axis))


def _enlarged(weights: np.ndarray, constant: QuantizedConstant) -> QuantizedConstant:
    """Plain enlargement, the known method: grow a channel's scale until rounding leaves no offending pair."""
    scale = constant.params.scale.astype(np.float64)
    while True:
        params = QuantParams(scale, np.zeros(scale.shape), constant.params.spec)
        integers = params.quantize(weights)
        bad = can_overflow(kernel_rows(_node(), integers)).any(axis=1)
        if not bad.any():
            return QuantizedConstant(params, integers)
        scale[bad] *= 1.002


shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(shapes, st.integers(0, 10_000), st.sampled_from(["normal", "uniform", "extreme"]))
def test_no_input_can_overflow_a_lane_of_limited_weights(shape: tuple[int, ...], seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=shape) if kind == "normal" else rng.uniform(-1, 1, shape)
    if kind == "extreme":
        weights = np.sign(weights) * np.where(rng.random(shape) < 0.8, 1.0, 0.9)
    weights = weights.astype(np.float32)
    limited = limit_constant(_node(), weights, _quantized(weights))
    pairs = lane_pairs(kernel_rows(_node(), limited.integers).astype(np.int64))
    for inputs in ((255, 255), (255, 0), (0, 255)):
        sums = pairs @ np.array(inputs)
        assert sums.max(initial=0) <= 32767
        assert sums.min(initial=0) >= -32768


@pytest.mark.parametrize("shape", [(16, 16, 1, 1), (16, 8, 3, 3), (32, 3, 3, 3), (24, 64, 1, 1)])
def test_the_error_is_at_most_that_of_plain_enlargement(shape: tuple[int, ...]) -> None:
    """Over many layers: in a single channel of few weights, rounding at one scale or the next is luck."""
    ours, plain = 0.0, 0.0
    for seed in range(12):
        weights = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        constant = _quantized(weights)
        ours += float(_error(weights, limit_constant(_node(), weights, constant)).sum())
        plain += float(_error(weights, _enlarged(weights, constant)).sum())
    assert ours <= plain


@settings(deadline=None)
@given(shapes, st.integers(0, 10_000))
def test_channels_that_cannot_overflow_are_not_touched(shape: tuple[int, ...], seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    constant = _quantized(weights)
    limited = limit_constant(_node(), weights, constant)
    fine = ~can_overflow(kernel_rows(_node(), constant.integers)).any(axis=1)
    assert np.array_equal(limited.integers[fine], constant.integers[fine])
    assert np.array_equal(limited.params.scale[fine], constant.params.scale[fine])


def test_weights_that_cannot_overflow_are_returned_as_they_are() -> None:
    weights = np.zeros((2, 4, 1, 1), np.float32)
    weights[:, 0] = 1.0
    constant = _quantized(weights)
    assert limit_constant(_node(), weights, constant) is constant


@pytest.mark.parametrize(
    ("pair", "overflows"), [((64, 64), False), ((64, 65), True), ((-64, -65), True), ((127, -127), False)]
)
def test_a_pair_overflows_when_its_sum_leaves_128(pair: tuple[int, int], overflows: bool) -> None:
    assert can_overflow(np.array([pair], np.int8)).any() == overflows


def test_only_neighbours_from_an_even_place_meet() -> None:
    assert not can_overflow(np.array([[0, 127, 127, 0]], np.int8)).any()
    assert can_overflow(np.array([[127, 127, 0, 0]], np.int8)).any()


def test_channels_run_innermost_in_kernel_order() -> None:
    weights = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    rows = kernel_rows(_node(), weights)
    assert rows[0, :3].tolist() == weights[0, :, 0, 0].tolist()
    assert rows[0, 3:6].tolist() == weights[0, :, 0, 1].tolist()


@pytest.mark.parametrize(
    ("op", "attributes", "shape"),
    [("Conv", {}, (4, 3, 2, 5)), ("Gemm", {"transB": 1}, (4, 6)), ("Gemm", {}, (6, 4)), ("MatMul", {}, (2, 6, 4))],
)
def test_kernel_order_can_be_undone(op: str, attributes: dict[str, int], shape: tuple[int, ...]) -> None:
    weights = np.random.default_rng(0).normal(size=shape)
    node = _node(op, **attributes)
    rows = kernel_rows(node, weights)
    assert rows.shape[1] * rows.shape[0] == weights.size
    assert np.array_equal(from_kernel_rows(node, rows, weights), weights)


def test_gemm_rows_are_output_channels() -> None:
    weights = np.arange(24.0).reshape(6, 4)
    assert np.array_equal(kernel_rows(_node("Gemm"), weights)[1], weights[:, 1])
    assert np.array_equal(kernel_rows(_node("Gemm", transB=1), weights.T)[1], weights[:, 1])


def test_a_whole_model_is_limited_and_its_biases_follow(
    build: Callable[..., ir.Model], quantized: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(3)
    model = build(
        "(float[1,4,6,6] x) => (float[1,3] y) { c = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu(c)"
        " d = Conv <group = 8> (r, dw) p = GlobalAveragePool(d) f = Flatten(p) y = Gemm(f, g, h) }",
        w=rng.uniform(0.5, 1, (8, 4, 3, 3)),
        b=rng.normal(size=8),
        dw=rng.uniform(0.5, 1, (8, 1, 3, 3)),
        g=rng.uniform(0.5, 1, (8, 3)),
        h=rng.normal(size=3),
    )
    full, _ = quantized(model, refinements=())
    limited, _ = quantized(model, refinements=(), weights="pair_limited")
    assert set(limited_channels(full, limited)) == {"w", "g"}
    assert np.array_equal(limited.weights["dw"].integers, full.weights["dw"].integers)  # depthwise: another kernel
    for name, node in (("w", "Conv_c"), ("g", "Gemm_y")):
        assert (limited.weights[name].params.scale >= full.weights[name].params.scale).all()
        bias = limited.biases[node]
        source = limited.activations["x" if node == "Conv_c" else "f"].scale
        assert np.array_equal(bias.params.scale, source * limited.weights[name].params.scale)
    assert {name: p.scale for name, p in full.activations.items()} == {
        name: p.scale for name, p in limited.activations.items()
    }


def test_per_tensor_weights_are_limited_under_their_one_scale(
    tiny_model: ir.Model, quantized: Callable[..., Any], rules: QuantRules
) -> None:
    per_tensor = replace(rules, weight=replace(rules.weight, axis=None))
    plan, _ = quantized(tiny_model, rules=per_tensor, weights="pair_limited")
    for node in tiny_model.graph:
        if node.op_type in {"Conv", "Gemm"} and not node.attributes.get_int("group", 1) > 1:
            integers = plan.weights[str(node.inputs[1].name)].integers
            assert not can_overflow(kernel_rows(node, integers)).any()
