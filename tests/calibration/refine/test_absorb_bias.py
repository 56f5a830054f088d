"""High-bias absorption: the same function on the samples, shorter ranges of the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.quantize import Calibration, calibrate
from edgeship.calibration.refine.absorb_bias import ChannelRanges
from edgeship.calibration.types import QuantRules

GRAPHS = {
    "dense": "a = Conv(x, w1, b1) h = Relu(a) y = Conv(h, w2, b2)",
    "grouped": "a = Conv(x, w1, b1) h = Relu(a) y = Conv <group = 2> (h, wg, b2)",
    "depthwise": "a = Conv(x, w1, b1) h = Relu(a) y = Conv <group = 4> (h, wd, bd)",
    "pooled": "a = Conv(x, w1, b1) r = Relu(a) h = AveragePool <kernel_shape = [2,2]> (r) y = Conv(h, w2, b2)",
    "gemm": "a = Conv(x, w1, b1) h = Relu(a) p = GlobalAveragePool(h) f = Flatten(p) y = Gemm(f, wf, bf)",
    "clip": "a = Conv(x, w1, b1) h = Clip(a, low, high) y = Conv(h, w2, b2)",
}
PADDED = "a = Conv(x, w1, b1) h = Relu(a) y = Conv <pads = [1,1,1,1], group = 4> (h, wd, bd)"
SHAPES = {"depthwise": "[1,4,6,6]", "pooled": "[1,6,7,7]", "gemm": "[1,5]", "padded": "[1,4,8,8]"}
HIGH = np.array([30.0, 20.0, 0.1, 1e6])
"""Biases: two of channels that are always positive, one that is not, and one beyond every bound."""


def make(build: Callable[..., ir.Model], which: str, text: str) -> ir.Model:
    rng = np.random.default_rng(7)
    constants = {
        "w1": rng.normal(size=(4, 3, 1, 1)),
        "b1": HIGH if which == "clip" else HIGH[[0, 1, 2, 2]],
        "w2": rng.normal(size=(6, 4, 1, 1)),
        "b2": rng.normal(size=6),
        "wg": rng.normal(size=(6, 2, 1, 1)),
        "wd": rng.normal(size=(4, 1, 3, 3)),
        "bd": rng.normal(size=4),
        "wf": rng.normal(size=(4, 5)),
        "bf": rng.normal(size=5),
        "low": np.float32(0),
        "high": np.float32(60),
    }
    used = {name: array for name, array in constants.items() if f" {name}" in text}
    return build(f"(float[1,3,8,8] x) => (float{SHAPES.get(which, '[1,6,8,8]')} y) {{ {text} }}", **used)


@pytest.fixture
def absorbed(rules: QuantRules, open_float: Any, samples: Any) -> Callable[[ir.Model], Calibration]:
    """What calibration sees of a model whose biases were absorbed."""
    return lambda model: calibrate(model, samples(model), rules, open_float, refinements=("absorb_bias",))


@pytest.mark.parametrize("which", GRAPHS)
def test_the_function_stays_and_the_range_shrinks(  # noqa: PLR0917 - fixtures
    build: Callable[..., ir.Model],
    absorbed: Callable[[ir.Model], Calibration],
    rules: QuantRules,
    open_float: Any,
    samples: Any,
    run_exactly: Any,
    which: str,
) -> None:
    model = make(build, which, GRAPHS[which])
    seen = absorbed(model)
    for shot in samples(model):
        exact = run_exactly(model, shot.feeds)["y"]
        close = pytest.approx(exact, rel=1e-4, abs=1e-4 * float(np.abs(exact).max()))
        assert run_exactly(seen.model, shot.feeds)["y"] == close
    (told,) = seen.refinements["absorb_bias"].report().values()
    assert told["channels"] == 2
    if which != "clip":  # there the channel beyond the bound sets the range
        name = "r" if which == "pooled" else "h"
        before = calibrate(model, samples(model), rules, open_float, refinements=()).observers[name].range()[1]
        assert seen.observers[name].range()[1] < 0.5 * before


def test_integers_come_closer_to_the_float_model(
    build: Callable[..., ir.Model], rules: QuantRules, open_float: Any, samples: Any, run_exactly: Any
) -> None:
    model = make(build, "dense", GRAPHS["dense"])
    errors = []
    for refinements in ((), ("absorb_bias",)):
        seen = calibrate(model, samples(model), rules, open_float, refinements=refinements)
        quantized = seen.quantized(seen.plan())
        pairs = [(run_exactly(model, s.feeds)["y"], run_exactly(quantized, s.feeds)["y"]) for s in samples(model)]
        errors.append(sum(float(((x - y) ** 2).sum()) for x, y in pairs))
    assert errors[1] < 0.5 * errors[0]


def test_before_padding_nothing_moves(
    build: Callable[..., ir.Model], absorbed: Callable[[ir.Model], Calibration]
) -> None:
    model = make(build, "padded", PADDED)
    seen = absorbed(model)
    assert seen.model is model
    assert seen.refinements["absorb_bias"].report() == {}


def test_ranges_of_parts_merge_to_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(size=(6, 4, 3, 3)).astype(np.float32) + 5
    whole, first, second = ChannelRanges(), ChannelRanges(), ChannelRanges()
    whole.update(values)
    first.update(values[:2])
    second.update(values[2:])
    first.merge(second)
    np.testing.assert_array_equal(first.absorbed(np.inf), whole.absorbed(np.inf))
    with pytest.raises(ValueError, match="NaN or infinite"):
        whole.update(np.full((1, 4, 1, 1), np.nan, np.float32))
