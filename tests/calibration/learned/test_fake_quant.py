"""The module with fake quantization and the QDQ graph are the same quantized model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.calibration.diagnosis.saturation import can_clip
from edgeship.calibration.learned.fake_quant import FakeQuantGraph
from edgeship.calibration.learned.operators.quantization import quantize_dequantize
from edgeship.calibration.learned.pairs import repaired
from edgeship.calibration.planning.pair_limit import can_overflow, repair
from edgeship.calibration.types import QuantPlan, QuantRules
from edgeship.calibration.writing.qdq import apply_plan, output_steps

Build = Callable[..., ir.Model]
Run = Callable[[ir.Model, Mapping[str, Any]], dict[str, Any]]
Quantized = Callable[..., tuple[QuantPlan, ir.Model]]
NETWORK = """(float[1,4,8,8] x) => (float[1,5] y, float[1,5] z) {
    a = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (a)
    d = Conv <pads=[1,1,1,1], group=8, strides=[2,2]> (r, w2, b2)
    c = Clip (d, zero, six)
    e = Conv (c, w3)
    p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (e)
    k = Concat <axis=1> (p, p)
    g = GlobalAveragePool (k)
    f = Reshape (g, shape)
    y = Gemm <transB=1> (f, w4, b4)
    z = Softmax <axis=-1> (y)
}"""


@pytest.fixture(scope="module")
def model(build: Build) -> ir.Model:
    rng = np.random.default_rng(3)
    weights: dict[str, Any] = {
        "w1": rng.normal(size=(8, 4, 3, 3)),
        "b1": rng.normal(size=8),
        "w2": rng.normal(size=(8, 1, 3, 3)),
        "b2": rng.normal(size=8),
        "zero": np.float32(0),
        "six": np.float32(6),
        "w3": rng.normal(size=(6, 8, 1, 1)),
        "shape": np.array([1, 12]),
        "w4": rng.normal(size=(5, 12)),
        "b4": rng.normal(size=5),
    }
    return build(NETWORK, **weights)


def inputs(count: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=(count, 4, 8, 8)).astype(np.float32)


def steps_apart(graph: FakeQuantGraph, model: ir.Model, run_exactly: Run, x: Any) -> float:
    """The largest difference between the module and the QDQ model of its plan, in steps of the outputs."""
    reference = apply_plan(model, graph.plan())
    steps = output_steps(reference)
    with torch.no_grad():
        learnt = graph({"x": torch.from_numpy(x)})
    worst = 0.0
    for i, sample in enumerate(x):
        exact = run_exactly(reference, {"x": sample[np.newaxis]})
        for name, step in steps.items():
            worst = max(worst, float(np.abs(learnt[name][i].numpy() - exact[name][0]).max()) / step)
    return worst


@pytest.mark.parametrize("weights", ["full", "pair_limited"])
@pytest.mark.parametrize("learn_scales", [False, True])
def test_it_computes_what_the_qdq_model_does(
    model: ir.Model, quantized: Quantized, run_exactly: Run, weights: Any, learn_scales: bool
) -> None:
    plan, _ = quantized(model, weights=weights)
    graph = FakeQuantGraph(model, plan, weights, learn_scales=learn_scales, fixed=["x", "z"])
    assert steps_apart(graph, model, run_exactly, inputs(6)) <= 1.001


@pytest.mark.parametrize("weights", ["full", "pair_limited"])
@pytest.mark.parametrize("learn_scales", [False, True])
def test_it_still_does_after_training(
    model: ir.Model, quantized: Quantized, run_exactly: Run, weights: Any, learn_scales: bool
) -> None:
    torch.manual_seed(0)
    plan, _ = quantized(model, weights=weights)
    graph = FakeQuantGraph(model, plan, weights, learn_scales=learn_scales, fixed=["x", "z"])
    optimizer = torch.optim.Adam(graph.parameters(), lr=1.0)
    x, wanted = torch.from_numpy(inputs(8)), torch.randn(8, 5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (graph({"x": x})["y"] - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert steps_apart(graph, model, run_exactly, inputs(6)) <= 1.001
    trained = graph.plan()
    assert trained.digest() != plan.digest()
    assert trained.activations.keys() == plan.activations.keys()
    np.testing.assert_array_equal(trained.activations["x"].scale, plan.activations["x"].scale)
    if weights == "pair_limited":
        assert not can_clip(apply_plan(model, trained))


@pytest.mark.parametrize("learn_scales", [False, True])
def test_biases_ship_as_the_integers_that_were_trained(
    model: ir.Model, quantized: Quantized, learn_scales: bool
) -> None:
    plan, _ = quantized(model)
    graph = FakeQuantGraph(model, plan, learn_scales=learn_scales, fixed=["x", "z"])
    parameters = dict(graph.named_parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for name in [each for each in parameters if each.endswith("_factor") or each.startswith("factor_")]:
            parameters[name].uniform_(-1, 1)
    for _ in range(100):  # between two integers so large that float32 rounds them as it likes
        with torch.no_grad():
            for name in [each for each in parameters if each.startswith("bias_") and not each.endswith("_factor")]:
                parameters[name].uniform_(-1000, 1000)
            trained, written = graph.given(), graph.plan().biases
        for key, constant in written.items():
            ran = trained[f"{key}__bias__dq"].numpy().astype(np.float64) / constant.params.scale
            np.testing.assert_array_equal(np.rint(ran), constant.integers)


@pytest.mark.parametrize("weights", ["full", "pair_limited"])
@pytest.mark.parametrize("start", ["float", "plan"])
def test_pruned_weights_stay_zero(build: Build, quantized: Quantized, weights: Any, start: Any) -> None:
    rng = np.random.default_rng(3)
    dense = {"w": (8, 4, 3, 3), "v": (5, 8)}
    sparse = {name: rng.normal(size=size) * (rng.random(size) < 0.3) for name, size in dense.items()}
    layers = "a = Conv (x, w) p = GlobalAveragePool (a) f = Flatten (p) y = Gemm <transB=1> (f, v)"
    model = build(f"(float[1,4,8,8] x) => (float[1,5] y) {{ {layers} }}", **sparse)
    plan, _ = quantized(model, weights=weights)
    graph = FakeQuantGraph(model, plan, weights, start=start)
    optimizer = torch.optim.Adam(graph.parameters(), lr=2.0)
    for _ in range(5):
        optimizer.zero_grad()
        (graph({"x": torch.from_numpy(inputs(8))})["y"] - 1).square().mean().backward()
        optimizer.step()
    trained = graph.plan()
    assert trained.digest() != plan.digest()
    for name, values in sparse.items():
        assert (trained.weights[name].integers[values == 0] == 0).all()


@pytest.mark.parametrize("learn_scales", [False, True])
def test_one_weight_scale_per_tensor_is_trained_like_many(
    model: ir.Model, quantized: Quantized, rules: QuantRules, run_exactly: Run, learn_scales: bool
) -> None:
    plan, _ = quantized(model, rules=replace(rules, weight=replace(rules.weight, axis=None)))
    graph = FakeQuantGraph(model, plan, learn_scales=learn_scales, fixed=["x", "z"], start="plan")
    assert graph.plan().digest() == plan.digest()
    optimizer = torch.optim.Adam(graph.parameters(), lr=1.0)
    graph({"x": torch.from_numpy(inputs(8))})["y"].square().mean().backward()
    optimizer.step()
    assert graph.plan().digest() != plan.digest()
    assert steps_apart(graph, model, run_exactly, inputs(6)) <= 1.001


def test_tensors_that_share_a_scale_still_do_after_learning_it(model: ir.Model, quantized: Quantized) -> None:
    plan, _ = quantized(model)
    graph = FakeQuantGraph(model, plan, learn_scales=True, fixed=["x", "z"])
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if "factor" in name:
                parameter.add_(2.0)  # a twentieth of it, as an exponent
    learnt = graph.plan().activations
    assert learnt["k"].same_as(learnt["e"])
    assert float(learnt["k"].scale) == pytest.approx(float(plan.activations["k"].scale) * np.exp(0.1))
    assert learnt["z"].same_as(plan.activations["z"])


def test_untouched_it_gives_back_the_plan_it_was_made_from(model: ir.Model, quantized: Quantized) -> None:
    plan, _ = quantized(model, refinements=())
    assert FakeQuantGraph(model, plan).plan().digest() == plan.digest()
    corrected, _ = quantized(model)
    assert FakeQuantGraph(model, corrected, start="plan").plan().digest() == corrected.digest()


def test_gradients_pass_straight_through_rounding_and_stop_where_values_saturate() -> None:
    x = torch.tensor([-3.0, -0.26, 0.25, 0.75, 3.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = quantize_dequantize(x, scale, -2.0, 2.0)
    torch.testing.assert_close(y, torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.0]))  # ties go to the even integer
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    slopes = -2 + (-1 + 0.52) + (0 - 0.5) + (2 - 1.5) + 2
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(slopes / np.sqrt(5 * 2), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_the_projection_onto_the_pair_limit_is_that_of_the_refinement(seed: int, width: int) -> None:
    places = np.random.default_rng(seed).normal(scale=90, size=(6, width)).astype(np.float32)
    mine = repaired(torch.from_numpy(places), 127).numpy()
    np.testing.assert_array_equal(mine, repair(places, 127))
    assert not can_overflow(mine).any()
