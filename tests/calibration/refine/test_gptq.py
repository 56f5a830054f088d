"""Second-order rounding: the output's error shrinks, integers stay within their format and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import read_layer
from edgeship.calibration.graph.patches import kernel_rows
from edgeship.calibration.planning.pair_limit import can_overflow
from edgeship.calibration.refine import gptq
from edgeship.calibration.refine.gptq import Moments, feed_back, round_weights

GRAPHS = {
    "dense": ("Conv <pads = [1,1,1,1], strides = [2,1]> (x, w, b)", (8, 4, 3, 3), "[1,8,4,8]"),
    "grouped": ("Conv <group = 2, dilations = [2,2]> (x, w, b)", (6, 2, 3, 3), "[1,6,4,4]"),
    "depthwise": ("Conv <group = 4, pads = [1,1,1,1]> (x, w, b)", (4, 1, 3, 3), "[1,4,8,8]"),
    "matrix": ("Gemm(f, w, b)", (256, 8), "[1,8]"),
}


@pytest.fixture(params=GRAPHS)
def models(request: pytest.FixtureRequest, build: Callable[..., ir.Model]) -> list[ir.Model]:
    """One layer of each kind, with four draws of weights: how well a few of them round is a matter of luck."""
    layer, shape, output = GRAPHS[request.param]
    before = "f = Flatten(x) " if request.param == "matrix" else ""
    channels = shape[1] if request.param == "matrix" else shape[0]

    def drawn(seed: int) -> ir.Model:
        rng = np.random.default_rng(seed)
        weights = {"w": rng.normal(size=shape), "b": rng.normal(size=channels)}
        return build(f"(float[1,4,8,8] x) => (float{output} y) {{ {before}y = {layer} }}", **weights)

    return [drawn(seed) for seed in range(1, 5)]


@pytest.fixture
def model(models: list[ir.Model]) -> ir.Model:
    """One layer of each kind."""
    return models[0]


@pytest.fixture
def smooth(samples: Any) -> Callable[[ir.Model, int, int], list[Any]]:
    """Samples whose neighbours are alike and whose mean is not zero, as in photographs and behind a ReLU."""

    def make(model: ir.Model, count: int, seed: int) -> list[Any]:
        shots = samples(model, count, seed)
        for shot in shots:
            x = shot.feeds["x"]
            x[:] = 2 + 0.2 * x + x.mean(axis=(2, 3), keepdims=True) * 8 + x.mean(axis=1, keepdims=True)
        return list(shots)

    return make


def weight_error(model: ir.Model, plan: Any, shots: list[Any], run_exactly: Any) -> float:
    """The output's squared error that the weights alone make, in the float model with the rounded ones."""
    copy = model.clone()
    node = next(node for node in copy.graph if node.op_type in {"Conv", "Gemm"})
    for index, constant in ((1, plan.weights["w"]), (2, next(iter(plan.biases.values())))):
        value = node.inputs[index]
        assert value is not None
        value.const_value = ir.tensor(constant.params.dequantize(constant.integers), name=value.name)
    return float(sum(((run_exactly(copy, s.feeds)["y"] - run_exactly(model, s.feeds)["y"]) ** 2).sum() for s in shots))


@pytest.mark.parametrize("scheme", ["full", "pair_limited"])
def test_rounding_costs_the_output_less_on_samples_it_has_not_seen(
    models: list[ir.Model], scheme: Any, quantized: Any, smooth: Any, run_exactly: Any
) -> None:
    seen, others = smooth(models[0], 60, 0), smooth(models[0], 40, 7)

    def error(*refinements: str) -> float:
        plans = [quantized(each, shots=seen, weights=scheme, refinements=refinements)[0] for each in models]
        return sum(weight_error(each, plan, others, run_exactly) for each, plan in zip(models, plans, strict=True))

    assert error("gptq") < (0.9 if has_nine_weights(models[0]) else 0.5) * error("bias_correction")


def test_pairs_stay_within_their_limit(build: Callable[..., ir.Model], quantized: Any, smooth: Any) -> None:
    """Weights of one sign, where nearly every pair of a channel's largest ones would overflow."""
    weights = 1 + np.abs(np.random.default_rng(0).normal(size=(16, 4, 3, 3))) / 10
    model = build("(float[1,4,8,8] x) => (float[1,16,6,6] y) { y = Conv(x, w) }", w=weights)
    shots = smooth(model, 20, 0)
    full, _ = quantized(model, shots=shots, refinements=("gptq",))
    plan, _ = quantized(model, shots=shots, weights="pair_limited", refinements=("gptq",))
    node = next(iter(model.graph))
    assert can_overflow(kernel_rows(node, full.weights["w"].integers)).any()
    assert not can_overflow(kernel_rows(node, plan.weights["w"].integers)).any()


def test_moments_are_those_of_numpy_and_merge_to_the_same(model: ir.Model, smooth: Any) -> None:
    layer = read_layer(next(node for node in model.graph if node.op_type in {"Conv", "Gemm"}))
    values = [
        shot.feeds["x"].reshape(1, -1) if layer.node.op_type == "Gemm" else shot.feeds["x"]
        for shot in smooth(model, 12, 3)
    ]
    whole, first, second = Moments(layer), Moments(layer), Moments(layer)
    for place, each in enumerate(values):
        whole.update(each)
        (first if place < 5 else second).update(each)
    first.merge(second)
    assert first.means() == pytest.approx(whole.means(), rel=1e-6, abs=1e-6)
    assert first.covariance(0) == pytest.approx(whole.covariance(0), rel=1e-5, abs=1e-5)
    if layer.node.op_type == "Gemm":
        columns = np.concatenate(values).astype(np.float64)
        assert whole.means()[0] == pytest.approx(columns.mean(axis=0), abs=1e-5)
        assert whole.covariance(0)[0] == pytest.approx(np.cov(columns.T, bias=True), abs=1e-3)


@pytest.mark.parametrize(("mean", "deviation"), [(10.0, 1e-3), (3000.0, 1.0), (1000.0, 0.0)])
def test_inputs_that_hardly_vary_for_their_size_are_seen_as_they_are(
    mean: float, deviation: float, build: Callable[..., ir.Model], quantized: Any, samples: Any
) -> None:
    text = "(float[1,64,8,8] x) => (float[1,8,8,8] y) { y = Conv(x, w) }"
    model = build(text, w=np.random.default_rng(0).normal(size=(8, 64, 1, 1)))
    shots = samples(model, 40, 0)
    for shot in shots:
        shot.feeds["x"][:] = mean + deviation * shot.feeds["x"] / shot.feeds["x"].std()
    moments = Moments(read_layer(next(iter(model.graph))))
    for shot in shots:
        moments.update(shot.feeds["x"])
    exact = np.concatenate([shot.feeds["x"].astype(np.float64).reshape(64, -1) for shot in shots], axis=1)
    expected = np.cov(exact, bias=True)
    assert moments.covariance(0)[0] == pytest.approx(expected, rel=1e-3, abs=1e-4 * expected.max() + 1e-12)
    plan, _ = quantized(model, shots=shots, refinements=("gptq",))
    assert np.isfinite(plan.weights["w"].params.scale).all()


def test_long_rows_are_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch, models: list[ir.Model], quantized: Any, smooth: Any, run_exactly: Any
) -> None:
    monkeypatch.setattr(gptq, "BLOCK", 8)
    shots, others = smooth(models[0], 60, 0), smooth(models[0], 40, 7)

    def error(name: str) -> float:
        plans = [quantized(each, shots=shots, refinements=(name,))[0] for each in models]
        return sum(weight_error(each, plan, others, run_exactly) for each, plan in zip(models, plans, strict=True))

    plain, rounded = error("bias_correction"), error("gptq")
    assert rounded < (0.9 if has_nine_weights(models[0]) else 0.6) * plain


def has_nine_weights(model: ir.Model) -> bool:
    """Whether each output has so few weights that rounding them together gains little."""
    return model.graph[0].op_type == "Conv" and read_layer(model.graph[0]).weights.shape[1] == 1


def test_inputs_that_do_not_correlate_leave_plain_rounding() -> None:
    wanted = np.random.default_rng(0).uniform(-100, 100, (1, 5, 6))
    assert np.array_equal(feed_back(wanted, np.eye(6)[np.newaxis], 0.01, 127, pairs=False), np.rint(wanted))


def test_inputs_that_never_vary_leave_plain_rounding() -> None:
    wanted = np.random.default_rng(0).uniform(-100, 100, (2, 5, 7))
    assert np.array_equal(feed_back(wanted, np.zeros((2, 7, 7)), 0.01, 127, pairs=False), np.rint(wanted))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_pruned_weight_stays_zero(pairs: bool) -> None:
    rng = np.random.default_rng(0)
    wanted = rng.uniform(-60, 60, (2, 5, 65)) * (rng.random((2, 5, 65)) < 0.4)
    x = rng.normal(size=(2, 50, 3)) @ rng.normal(size=(2, 3, 65))
    found = feed_back(wanted, x.transpose(0, 2, 1) @ x / 50, 1e-4, 127, pairs=pairs)
    assert (found[wanted == 0] == 0).all()
    assert not np.array_equal(found, np.rint(wanted))


def test_moments_that_were_not_collected_are_a_defect_that_is_named(model: ir.Model, quantized: Any) -> None:
    plan, _ = quantized(model)
    with pytest.raises(StageError, match="no moments of tensor"):
        round_weights(model, plan, {})
