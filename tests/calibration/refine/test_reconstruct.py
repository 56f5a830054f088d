"""Layer reconstruction keeps its promise: on samples it has not seen, no layer is further from its float form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.diagnosis.saturation import can_clip
from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import read_layer
from edgeship.calibration.learned.moments import gather, grouped_rows
from edgeship.calibration.learned.reconstruct_options import ReconstructOptions
from edgeship.calibration.planning.weights import clear_of_boundaries, layer_steps
from edgeship.calibration.quantize import calibrate
from edgeship.calibration.refine.reconstruct import Kept
from edgeship.calibration.types import QuantPlan, QuantRules
from edgeship.calibration.writing.qdq import apply_plan

Build = Callable[..., ir.Model]
NETWORK = """(float[1,4,12,12] x) => (float[1,5] y) {
    a = Conv <pads=[1,1,1,1]> (x, w1, b1)
    r = Relu (a)
    d = Conv <pads=[1,1,1,1], group=16, strides=[2,2]> (r, w2)
    c = Clip (d, zero, six)
    e = Conv (c, w3, b3)
    s = Relu (e)
    g = GlobalAveragePool (s)
    f = Reshape (g, shape)
    m = MatMul (f, w4)
    h = Relu (m)
    y = Gemm <transB=1> (h, w5, b5)
}"""
LAYERS = {"a": "r", "d": "c", "e": "s", "m": "h", "y": "y"}
"""Each layer's output, and the tensor that it is compared at: behind its activation."""


@pytest.fixture(scope="module")
def model(build: Build) -> ir.Model:
    rng = np.random.default_rng(11)
    weights: dict[str, Any] = {
        "w1": rng.normal(size=(16, 4, 3, 3)) / 6,
        "b1": rng.normal(size=16) / 4,
        "w2": rng.normal(size=(16, 1, 3, 3)) / 2,
        "zero": np.float32(0),
        "six": np.float32(6),
        "w3": rng.normal(size=(24, 16, 1, 1)) / 4,
        "b3": rng.normal(size=24) / 4,
        "shape": np.array([1, 24]),
        "w4": rng.normal(size=(24, 12)) / 3,
        "w5": rng.normal(size=(5, 12)) / 3,
        "b5": rng.normal(size=5) / 4,
    }
    return build(NETWORK, **weights)


class Image:
    """A smooth random image, as photographs are: neighbours are alike."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        coarse = rng.normal(size=(1, 4, 4, 4))
        self.name = f"image {seed}"
        fine = np.kron(coarse, np.ones((1, 1, 3, 3))) + 0.1 * rng.normal(size=(1, 4, 12, 12))
        self.feeds = {"x": fine.astype(np.float32)}


def images(first: int, count: int) -> list[Image]:
    return [Image(first + i) for i in range(count)]


def refined(
    model: ir.Model,
    rules: QuantRules,
    open_float: Any,
    refinements: Sequence[str],
    weights: Any = "full",
    **options: Any,
) -> tuple[QuantPlan, ir.Model]:
    settings = {"reconstruct": ReconstructOptions(**options)}
    calibration = calibrate(model, images(0, 80), rules, open_float, refinements=refinements, options=settings)
    plan = calibration.plan(weights)
    return plan, calibration.quantized(plan, weights)


def errors(model: ir.Model, quantized: ir.Model, run_exactly: Any) -> dict[str, float]:
    """The squared error of each layer's output, as the quantized model computes it, over samples not yet seen."""
    inside = list(LAYERS.values())
    sums = dict.fromkeys(inside, 0.0)
    outputs = [(each, expose(each, inside)) for each in (model, quantized)]
    for image in images(1000, 30):
        exact, rounded = (run_exactly(exposed, image.feeds) for _, exposed in outputs)
        for name in inside:
            sums[name] += float(((exact[name] - rounded[name]) ** 2).mean())
    return sums


def expose(model: ir.Model, names: Sequence[str]) -> ir.Model:
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [values[name] for name in names]
    for value in copy.graph.outputs:
        value.dtype = ir.DataType.FLOAT
    return copy


@pytest.mark.parametrize("weights", ["full", "pair_limited"])
def test_on_new_samples_no_layer_is_worse_and_all_together_are_better(
    model: ir.Model, rules: QuantRules, open_float: Any, run_exactly: Any, weights: Any
) -> None:
    _, nearest = refined(model, rules, open_float, ["bias_correction"], weights)
    _, better = refined(model, rules, open_float, ["reconstruct"], weights)
    before, after = errors(model, nearest, run_exactly), errors(model, better, run_exactly)
    assert all(after[name] < before[name] for name in before)
    assert sum(after[name] / before[name] for name in before) < 0.95 * len(before)


def test_limited_pairs_stay_limited(model: ir.Model, rules: QuantRules, open_float: Any) -> None:
    _, quantized = refined(model, rules, open_float, ["reconstruct"], "pair_limited")
    assert not can_clip(quantized)


def test_sums_stay_off_rounding_boundaries_at_the_scales_it_chooses(
    model: ir.Model, rules: QuantRules, open_float: Any
) -> None:
    plan, _ = refined(model, rules, open_float, ["reconstruct"], "pair_limited")
    nearest, _ = refined(model, rules, open_float, [], "pair_limited")
    scales = [(plan.weights[name].params.scale, nearest.weights[name].params.scale) for name in plan.weights]
    assert any(not np.array_equal(chosen, before) for chosen, before in scales)
    for layer in (read_layer(node) for node in model.graph if node.op_type in {"Conv", "Gemm", "MatMul"}):
        scale = plan.weights[layer.weight_value.name or ""].params.scale
        below = scale * (1 - 1e-6)  # float32 may round a scale up, beyond the fraction
        np.testing.assert_allclose(clear_of_boundaries(below, *layer_steps(layer, plan)), scale, rtol=1e-6)


def test_the_same_samples_give_the_same_integers(model: ir.Model, rules: QuantRules, open_float: Any) -> None:
    first, _ = refined(model, rules, open_float, ["reconstruct"])
    second, _ = refined(model, rules, open_float, ["reconstruct"])
    assert first.digest() == second.digest()
    other, _ = refined(model, rules, open_float, ["reconstruct"], positions=16, seed=1)
    assert other.digest() != first.digest()


def test_it_composes_with_what_comes_before_and_after(
    model: ir.Model, rules: QuantRules, open_float: Any, run_exactly: Any
) -> None:
    chain = ["equalize", "reconstruct", "bias_correction"]
    plan, quantized = refined(model, rules, open_float, chain)
    alone, _ = refined(model, rules, open_float, ["reconstruct"])
    assert plan.digest() != alone.digest()
    beside, _ = refined(model, rules, open_float, ["reconstruct", "bias_correction"])
    assert beside.digest() == alone.digest()  # its biases make good more than the correction knows of
    _, nearest = refined(model, rules, open_float, ["equalize", "bias_correction"])
    assert errors(model, quantized, run_exactly)["y"] <= 1.05 * errors(model, nearest, run_exactly)["y"]


def test_the_report_names_every_layer_with_its_errors(model: ir.Model, rules: QuantRules, open_float: Any) -> None:
    calibration = calibrate(model, images(0, 10), rules, open_float, refinements=["reconstruct"])
    calibration.plan("full")
    report = calibration.refinements["reconstruct"].report()["full"]
    assert [layer["node"] for layer in report] == ["Conv_a", "Conv_d", "Conv_e", "MatMul_m", "Gemm_y"]
    assert all(layer["after"] <= layer["before"] for layer in report)
    assert any(layer["changed"] for layer in report)


def test_little_memory_means_fewer_samples_not_a_failure(model: ir.Model, rules: QuantRules, open_float: Any) -> None:
    plan, _ = refined(model, rules, open_float, ["reconstruct"], memory_mb=1)
    assert plan.weights


def test_kept_samples_are_bounded_and_evenly_spread() -> None:
    kept = Kept(10)
    for i in range(100):
        kept.update(np.full((1, 2), i, np.float32))
    numbers = [int(batch[0, 0]) for batch in kept.batches]
    assert len(numbers) <= 10
    assert numbers[0] == 0
    assert len({b - a for a, b in pairwise(numbers)}) == 1
    assert numbers[-1] >= 80


@pytest.mark.parametrize(
    ("attributes", "shape", "size"),
    [
        ("<strides=[2,1], pads=[1,0,2,1]>", (6, 4, 3, 2), "[1,4,9,7]"),
        ("<group=4, dilations=[2,2], pads=[2,2,2,2]>", (8, 1, 3, 3), "[1,4,8,8]"),
        ('<group=2, auto_pad="SAME_UPPER", strides=[2,2]>', (6, 2, 3, 3), "[1,4,8,8]"),
        ("<pads=[1,1]>", (5, 4, 3), "[1,4,11]"),
    ],
)
def test_gathered_rows_times_the_weights_are_the_convolution(
    build: Build, run_exactly: Any, attributes: str, shape: tuple[int, ...], size: str
) -> None:
    import torch

    rng = np.random.default_rng(2)
    text = f"(float{size} x) => (float[N,C{',S' * (len(shape) - 2)}] y) {{ y = Conv {attributes} (x, w) }}"
    model = build(text, w=rng.normal(size=shape))
    x = rng.normal(size=[int(side) for side in size.strip("[]").split(",")]).astype(np.float32)
    layer = read_layer(model.graph.node(0))
    rows = grouped_rows(layer, torch.from_numpy(layer.weights.copy()))
    product = torch.einsum("pgk,gmk->pgm", gather(layer, torch.from_numpy(x)), rows).flatten(1)
    expected = run_exactly(model, {"x": x})["y"]
    np.testing.assert_allclose(product.numpy(), expected.reshape(expected.shape[1], -1).T, rtol=1e-4, atol=1e-5)


def test_without_torch_the_error_says_how_to_get_it(
    model: ir.Model, rules: QuantRules, open_float: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"reconstruct.*edgeship\[torch\]"):
        calibrate(model, images(0, 2), rules, open_float, refinements=["reconstruct"])


def test_a_plan_is_all_that_changes(model: ir.Model, rules: QuantRules, open_float: Any) -> None:
    nearest, _ = refined(model, rules, open_float, [])
    plan, _ = refined(model, rules, open_float, ["reconstruct"])
    assert plan.activations.keys() == nearest.activations.keys()
    assert all(plan.activations[name].same_as(nearest.activations[name]) for name in plan.activations)
    assert {n: c.integers.shape for n, c in plan.weights.items()} == {
        n: c.integers.shape for n, c in nearest.weights.items()
    }
    assert apply_plan(model, plan).metadata_props["edgeship.plan"] == plan.digest()
