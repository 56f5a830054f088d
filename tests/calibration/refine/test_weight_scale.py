from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.graph.operators import read_layer
from edgeship.calibration.graph.patches import kernel_rows
from edgeship.calibration.planning.pair_limit import can_overflow
from edgeship.calibration.types import QuantPlan, QuantRules

SHAPES = {"conv": (6, 4, 3, 3), "depthwise": (4, 1, 3, 3), "gemm": (16, 5)}
TEXTS = {
    "conv": "(float[1,4,4,4] x) => (float[1,6,4,4] y) { y = Conv <pads = [1,1,1,1]> (x, w, b) }",
    "depthwise": "(float[1,4,4,4] x) => (float[1,4,4,4] y) { y = Conv <pads = [1,1,1,1], group = 4> (x, w, b) }",
    "gemm": "(float[1,16] x) => (float[1,5] y) { y = Gemm(x, w, b) }",
}


@pytest.fixture(params=SHAPES)
def layer(request: pytest.FixtureRequest, build: Callable[..., ir.Model]) -> ir.Model:
    """One layer with long-tailed weights."""
    rng = np.random.default_rng(3)
    shape = SHAPES[request.param]
    channels = shape[1] if request.param == "gemm" else shape[0]
    return build(TEXTS[request.param], w=rng.standard_t(2, size=shape), b=rng.normal(size=channels))


def errors(model: ir.Model, plan: QuantPlan) -> np.ndarray:
    """The squared error of each channel's weights."""
    layer = read_layer(next(node for node in model.graph if node.op_type in {"Conv", "Gemm"}))
    constant = plan.weights["w"]
    wrong = layer.weights - constant.params.dequantize(constant.integers)
    return np.asarray((np.moveaxis(wrong.astype(np.float64), layer.axis, 0) ** 2).reshape(layer.channels, -1).sum(1))


@pytest.mark.parametrize("weights", ["full", "pair_limited"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_no_scale_has_a_larger_error_than_before(
    layer: ir.Model, quantized: Any, rules: QuantRules, weights: str, per_tensor: bool
) -> None:
    if per_tensor:
        rules = replace(rules, weight=replace(rules.weight, axis=None))
    before, _ = quantized(layer, rules=rules, weights=weights, refinements=())
    after, _ = quantized(layer, rules=rules, weights=weights, refinements=("weight_scale",))
    old, new = errors(layer, before), errors(layer, after)
    if per_tensor:
        old, new = old.sum(keepdims=True), new.sum(keepdims=True)
    assert (new <= old * (1 + 1e-9)).all()


@pytest.mark.parametrize(("weights", "share"), [("full", 0.87), ("pair_limited", 0.97)])
def test_long_tails_under_one_scale_lose_less(
    build: Callable[..., ir.Model], quantized: Any, rules: QuantRules, weights: str, share: float
) -> None:
    w = np.random.default_rng(0).laplace(size=(64, 64, 3, 3))
    model = build("(float[1,64,3,3] x) => (float[1,64,1,1] y) { y = Conv(x, w) }", w=w)
    per_tensor = replace(rules, weight=replace(rules.weight, axis=None))
    options = {"rules": per_tensor, "weights": weights}
    before, _ = quantized(model, refinements=(), **options)
    after, _ = quantized(model, refinements=("weight_scale",), **options)
    assert errors(model, after).sum() < share * errors(model, before).sum()


def test_pair_limited_weights_stay_pair_limited(layer: ir.Model, quantized: Any) -> None:
    plan, _ = quantized(layer, weights="pair_limited", refinements=("weight_scale",))
    node = next(node for node in layer.graph if node.op_type in {"Conv", "Gemm"})
    if node.name != "Conv_y" or read_layer(node).weights.shape[1] > 1:
        assert not can_overflow(kernel_rows(node, plan.weights["w"].integers)).any()


def test_biases_follow_the_new_scales_and_come_out_the_same(layer: ir.Model, quantized: Any) -> None:
    before, _ = quantized(layer, refinements=())
    after, _ = quantized(layer, refinements=("weight_scale",))
    node = next(node for node in layer.graph if node.op_type in {"Conv", "Gemm"}).name
    old, new = (plan.biases[node] for plan in (before, after))
    step = before.activations["x"].scale
    assert new.params.scale == pytest.approx(step * after.weights["w"].params.scale)
    assert new.params.dequantize(new.integers) == pytest.approx(
        old.params.dequantize(old.integers), abs=float(old.params.scale.max())
    )


def test_the_order_in_the_list_does_not_matter(layer: ir.Model, quantized: Any) -> None:
    names = ("weight_scale", "bias_correction")
    plans = [quantized(layer, refinements=order)[0].digest() for order in (names, names[::-1])]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("weights", "refinements"),
    [("full", ()), ("pair_limited", ()), ("full", ("weight_scale",)), ("pair_limited", ("weight_scale", "gptq"))],
)
def test_whatever_chose_the_scales_no_sum_lies_near_a_rounding_boundary(
    layer: ir.Model, quantized: Any, rules: QuantRules, weights: str, refinements: tuple[str, ...]
) -> None:
    for axis in (rules.weight.axis, None):
        kind = replace(rules, weight=replace(rules.weight, axis=axis))
        plan, _ = quantized(layer, rules=kind, weights=weights, refinements=refinements)
        scales = np.atleast_1d(plan.weights["w"].params.scale.astype(np.float64))
        multipliers = float(plan.activations["x"].scale) * scales / float(plan.activations["y"].scale)
        sums = np.arange(int(255 / multipliers.min()))[:, np.newaxis] * multipliers
        assert np.abs(sums % 1 - 0.5)[sums < 255].min() > 2e-4
