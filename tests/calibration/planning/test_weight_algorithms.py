"""The ranges of weights are chosen by the algorithm asked for, for all of them or by pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.planning.overrides import Override, weight_algorithms
from edgeship.calibration.quantize import calibrate
from edgeship.calibration.types import QuantPlan, QuantRules

Plan = Callable[..., QuantPlan]
TWO = "(float[1,4,2,2] x) => (float[1,256,2,2] y) { h = Conv(x, v)\n y = Conv(h, w) }"


@pytest.fixture
def model(build: Callable[..., ir.Model]) -> ir.Model:
    """Two layers with many weights and a long tail: `v`, then `w`."""
    rng = np.random.default_rng(1)
    return build(TWO, v=rng.laplace(size=(256, 4, 1, 1)), w=rng.laplace(size=(256, 256, 1, 1)))


@pytest.fixture
def plan(rules: QuantRules, samples: Callable[..., Any], open_float: Callable[[bytes], Any]) -> Plan:
    """The plan of a model without refinements; `per_tensor` and what `calibrate` takes."""

    def made(model: ir.Model, *, per_tensor: bool = False, **options: Any) -> QuantPlan:
        weight = replace(rules.weight, axis=None) if per_tensor else rules.weight
        used = replace(rules, weight=weight)
        return calibrate(model, samples(model), used, open_float, refinements=(), **options).plan()

    return made


def values(model: ir.Model, name: str) -> np.ndarray:
    return np.asarray(model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]  # it has one


def error(model: ir.Model, plan: QuantPlan, name: str) -> float:
    constant = plan.weights[name]
    return float(((values(model, name) - constant.params.dequantize(constant.integers)) ** 2).sum())


def test_weights_have_every_algorithm_but_those_that_average_over_samples() -> None:
    assert weight_algorithms() == ["entropy", "minmax", "mse", "percentile"]


@pytest.mark.parametrize(("per_tensor", "share"), [(True, 0.9), (False, 1.01)])
def test_mse_has_less_squared_error_than_the_largest_magnitude(
    model: ir.Model, plan: Plan, per_tensor: bool, share: float
) -> None:
    whole = plan(model, per_tensor=per_tensor)
    chosen = plan(model, per_tensor=per_tensor, weight_algorithm="mse")
    assert error(model, chosen, "w") < share * error(model, whole, "w")
    assert (chosen.weights["w"].params.scale <= whole.weights["w"].params.scale).all()
    assert not chosen.weights["w"].params.zero_point.any()


def test_percentile_cuts_off_next_to_nothing_of_one_scale_for_all(build: Callable[..., ir.Model], plan: Plan) -> None:
    weights = np.random.default_rng(2).normal(size=(128, 128, 1, 1))
    weights[5, 5] = 100.0
    model = build("(float[1,128,1,1] x) => (float[1,128,1,1] y) { y = Conv(x, w) }", w=weights)
    chosen = plan(model, per_tensor=True, weight_algorithm="percentile").weights["w"]
    represented = 127 * float(chosen.params.scale)
    assert represented < 6
    assert (np.abs(weights) > represented).mean() <= 2e-4


@pytest.mark.parametrize("algorithm", ["percentile", "mse", "entropy"])
def test_weights_of_one_size_are_represented_whole(build: Callable[..., ir.Model], plan: Plan, algorithm: str) -> None:
    signs = np.random.default_rng(3).choice([-0.5, 0.5], size=(8, 16, 1, 1))
    model = build("(float[1,16,1,1] x) => (float[1,8,1,1] y) { y = Conv(x, w) }", w=signs)
    np.testing.assert_allclose(plan(model, weight_algorithm=algorithm).weights["w"].params.scale, 0.5 / 127, rtol=2e-3)


@pytest.mark.parametrize("pattern", ["w", "Conv_y"])
def test_an_override_changes_the_layer_it_names_and_no_other(model: ir.Model, plan: Plan, pattern: str) -> None:
    whole = plan(model, per_tensor=True)
    chosen = plan(model, per_tensor=True, overrides=[Override(pattern, weight_algorithm="mse")])
    assert chosen.weights["v"].params.same_as(whole.weights["v"].params)
    assert not chosen.weights["w"].params.same_as(whole.weights["w"].params)
    assert all(chosen.activations[name].same_as(params) for name, params in whole.activations.items())


def test_the_last_override_wins_and_can_ask_for_the_usual(model: ir.Model, plan: Plan) -> None:
    wishes = [Override("*", weight_algorithm="minmax"), Override("w", weight_algorithm="mse")]
    chosen = plan(model, per_tensor=True, weight_algorithm="entropy", overrides=wishes)
    whole, finer = plan(model, per_tensor=True), plan(model, per_tensor=True, weight_algorithm="mse")
    assert chosen.weights["v"].params.same_as(whole.weights["v"].params)
    assert chosen.weights["w"].params.same_as(finer.weights["w"].params)
    assert not finer.weights["w"].params.same_as(whole.weights["w"].params)


def test_a_pattern_in_vain_and_an_average_of_weights_are_refused(model: ir.Model, plan: Plan) -> None:
    with pytest.raises(InputError, match=r"the pattern 'Conv_x' matches no layer or weights.*did you mean 'Conv_"):
        plan(model, overrides=[Override("Conv_x", weight_algorithm="mse")])
    with pytest.raises(InputError, match="averages over samples, and weights have none; accepted: entropy, minmax, ms"):
        plan(model, weight_algorithm="moving_average")
    with pytest.raises(
        InputError, match="unknown range algorithm of weights 'mmse'; there are: entropy, minmax, mse, perc"
    ):
        plan(model, weight_algorithm="mmse")
