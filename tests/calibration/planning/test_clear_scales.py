"""Scales of a plan: fractions of the output's with an odd denominator, grown by next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.planning.fractions import BASE
from edgeship.calibration.types import QuantPlan

ODD = BASE
"""The denominator where operands are added."""


def scale(plan: QuantPlan, name: str) -> float:
    """A tensor's scale."""
    constant = plan.weights.get(name)
    return float((plan.activations[name] if constant is None else constant.params).scale)


def is_clear(multiplier: float) -> bool:
    """Whether the multiplier is a fraction with a small odd denominator, to within float32."""
    near = Fraction(multiplier).limit_denominator(max(2 * BASE, round(1 / multiplier) + 1))
    return near.denominator % 2 == 1 and abs(float(near) / multiplier - 1) < 4e-7


def planned(build: Callable[..., ir.Model], quantized: Any, text: str, **weights: Any) -> QuantPlan:
    """The plan of a graph on (1, 4, 6, 6)."""
    plan, _ = quantized(build(f"(float[1,4,6,6] x) => (float[1,4,6,6] y) {{ {text} }}", **weights), refinements=())
    return plan  # type: ignore[no-any-return]  # the fixture is not typed


def test_a_layers_multipliers(build: Callable[..., ir.Model], quantized: Any) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 4, 1, 1))
    plan = planned(build, quantized, "y = Conv(x, w)", w=weights)
    chosen = plan.weights["w"].params.scale
    for each in chosen * plan.activations["x"].scale.astype(np.float64) / plan.activations["y"].scale:
        assert is_clear(float(each))
    growth = chosen / (np.abs(weights).max(axis=(1, 2, 3)) / 127)
    assert (growth >= 1 - 1e-6).all()
    assert (growth <= 1.0025).all()


def test_both_operands_of_a_chain_of_sums(build: Callable[..., ir.Model], quantized: Any) -> None:
    text = "a = HardSwish(x) b = Add(x, a) c = HardSwish(b) y = Add(b, c)"
    plan = planned(build, quantized, text)
    for left, right, total in (("x", "a", "b"), ("b", "c", "y")):
        places = [scale(plan, name) / scale(plan, total) * ODD for name in (left, right)]
        inner = places if left != "x" else places[1:]  # an input's scale stays
        assert inner == pytest.approx(np.rint(inner), abs=1e-3)


@pytest.mark.parametrize(
    ("text", "small", "grows"),
    [
        ("h = HardSwish(x) b = Mul(h, k) y = Add(h, b)", "b", True),
        ("h = HardSwish(x) n = Mul(h, k) b = Conv(n, w) y = Add(b, n)", "n", False),
    ],
)
def test_what_is_small_beside_a_sum_stays_fine_for_its_other_readers(
    text: str, small: str, grows: bool, build: Callable[..., ir.Model], quantized: Any
) -> None:
    weights = {"w": np.full((4, 4, 1, 1), 300.0)} if "w)" in text else {}
    plan = planned(build, quantized, text, k=np.array([1e-3]), **weights)
    place = scale(plan, small) / scale(plan, "y") * ODD
    assert place < 10
    assert (place == pytest.approx(round(place), abs=1e-3)) == grows


def test_a_constant_that_is_added(build: Callable[..., ir.Model], quantized: Any) -> None:
    plan = planned(build, quantized, "h = HardSwish(x) y = Add(h, k)", k=np.linspace(-1, 1, 4).reshape(1, 4, 1, 1))
    place = scale(plan, "k") / scale(plan, "y") * ODD
    assert place == pytest.approx(round(place), abs=1e-3)
    assert 1 / 127.5 * (1 - 1e-6) <= scale(plan, "k") < 1.02 / 127.5


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", ("x", "s")),
        ("h = HardSwish(x) y = Mul(h, h)", ("h", "h")),
        ("h = HardSwish(x) y = Mul(h, k)", ("h", "k")),
    ],
)
def test_products(text: str, others: tuple[str, str], build: Callable[..., ir.Model], quantized: Any) -> None:
    weights = {"k": np.array([0.7])} if "k)" in text else {}
    plan = planned(build, quantized, text, **weights)
    assert is_clear(scale(plan, others[0]) * scale(plan, others[1]) / scale(plan, "y"))


def test_means(build: Callable[..., ir.Model], quantized: Any) -> None:
    model = build("(float[1,4,6,6] x) => (float[1,4,1,1] y) { y = GlobalAveragePool(x) }")
    plan, _ = quantized(model, refinements=())
    assert is_clear(scale(plan, "x") / scale(plan, "y") / 36)
