"""Scales whose reciprocal is as exact as a neighbouring float32 number's can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.planning.reciprocal import NEIGHBOURS, nearly_exact


def _error(scale: float) -> float:
    """By how much scale times its float32 reciprocal misses 1, in units of 2^-24."""
    return float(abs(np.float64(scale) * np.float64(np.float32(1) / np.float32(scale)) - 1) * 2**24)


@given(st.floats(2**-26, 2**14, width=32))
def test_a_neighbour_is_found_whose_reciprocal_is_no_less_exact(scale: float) -> None:
    found = nearly_exact(scale)
    assert found == np.float32(found)
    assert abs(found / scale - 1) <= NEIGHBOURS * 2**-23
    assert _error(found) <= _error(scale)


def test_most_reciprocals_become_ten_times_as_exact() -> None:
    scales = np.random.default_rng(5).uniform(0.001, 2, 1000).astype(np.float32)
    before, after = (np.median([_error(float(f(s))) for s in scales]) for f in (float, nearly_exact))
    assert after < before / 10


@pytest.mark.parametrize("exponent", [-12, -7, 0, 3])
def test_a_power_of_two_stays(exponent: int) -> None:
    assert nearly_exact(2.0**exponent) == 2.0**exponent


def test_multiplying_and_dividing_give_one_number_nearly_always() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000).astype(np.float32) * 40
    scales = rng.uniform(0.01, 0.1, 20).astype(np.float32)

    def differing(chosen: Callable[[float], float]) -> float:
        found = [np.float32(chosen(float(scale))) for scale in scales]
        return float(np.mean([(values / each != values * (np.float32(1) / each)).mean() for each in found]))

    assert differing(nearly_exact) < 0.03
    assert differing(float) > 0.15


def test_what_a_float_operator_makes_has_such_a_scale_and_what_others_make_has_not(
    build: Callable[..., ir.Model], quantized: Callable[..., Any]
) -> None:
    text = """(float[4, 16] x) => (float[4, 16] y) {
        h = MatMul(x, w)
        e = Exp(h)
        y = MatMul(e, w)
    }"""
    rng = np.random.default_rng(1)
    plans = [quantized(build(text, w=rng.normal(size=(16, 16)) / 8))[0] for _ in range(8)]
    made, other = (max(_error(float(plan.activations[name].scale)) for plan in plans) for name in ("e", "h"))
    assert made <= 0.25 < other
