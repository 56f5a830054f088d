"""Normalizations computed from integers: the same function, in single operations, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.readback import read_back
from edgeship.calibration.types import EXACT_ROW, QuantPlan
from edgeship.calibration.writing.exact import exact
from edgeship.calibration.writing.qdq import apply_plan

Array = np.ndarray[Any, np.dtype[Any]]
Quantized = Callable[..., tuple[QuantPlan, ir.Model]]
BLOCK = """(float[2, 5, 24] x) => (float[2, 5, 24] y) {
    h = MatMul(x, w)
    n = LayerNormalization<epsilon = 0.001>(h, scale, shift)
    y = MatMul(n, w)
}"""
UNITS = """(float[2, 5, 24] x) => (float[2, 5, 24] y) {
    h = MatMul(x, w)
    n = LpNormalization(h)
    y = MatMul(n, w)
}"""


def _constants(size: int = 24) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return {
        "w": rng.normal(size=(size, size)) / 5,
        "scale": rng.uniform(0.5, 1.5, size),
        "shift": rng.normal(size=size),
    }


def _plain(model: ir.Model, plan: QuantPlan) -> ir.Model:
    return apply_plan(model, plan)


def _counts(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_a_normalization_of_integers_is_the_operator_within_float_rounding(
    build: Callable[..., ir.Model], quantized: Quantized, samples: Callable[..., Any], run_exactly: Any
) -> None:
    model = build(BLOCK, **_constants())
    plan, written = quantized(model)
    onnx.checker.check_model(ir.to_proto(written), full_check=True)
    assert not _counts(written)["LayerNormalization"]
    assert _counts(_plain(model, plan))["LayerNormalization"] == 1
    step = float(plan.activations["y"].scale)
    for shot in samples(model, seed=9):
        got, want = (run_exactly(each, shot.feeds)["y"] for each in (written, _plain(model, plan)))
        assert np.abs(got - want).max() <= 1.01 * step
        assert np.abs(got - want).mean() < 0.01 * step


def test_a_row_that_does_not_vary_gives_the_shift(build: Callable[..., ir.Model], run_exactly: Any) -> None:
    """The variance is the difference of two large numbers there, and must not fall below 0."""
    text = """(int8[1, 24] q) => (float[1, 24] y) {
        r = DequantizeLinear(q, step, zero)
        f = QuantizeLinear(r, step, zero)
        h = DequantizeLinear(f, step, zero)
        y = LayerNormalization<epsilon = 0.00000001>(h, scale, shift)
    }"""
    constants = {name: _constants()[name] for name in ("scale", "shift")}
    model = exact(build(text, step=np.float32(3.7), zero=np.int8(5), **constants))
    assert _counts(model)["ReduceSum"] == 2
    for value in (-128, -77, 0, 127):
        feeds = {"q": np.full((1, 24), value, np.int8)}
        np.testing.assert_array_equal(run_exactly(model, feeds)["y"][0], constants["shift"].astype(np.float32))
        feeds["q"][0, 7] += 1 if value < 127 else -1
        assert np.isfinite(run_exactly(model, feeds)["y"]).all()


@pytest.mark.parametrize("text", [BLOCK, UNITS])
def test_reading_back_gives_the_operators_again(
    text: str, build: Callable[..., ir.Model], quantized: Quantized, samples: Callable[..., Any], run_exactly: Any
) -> None:
    model = build(text, **{name: values for name, values in _constants().items() if name in text})
    plan, written = quantized(model)
    plain, back = _plain(model, plan), read_back(written)
    assert _counts(back) == _counts(plain) != _counts(written)
    (node,) = (node for node in back.graph if node.op_type.endswith("Normalization"))
    (other,) = (node for node in plain.graph if node.op_type == node.op_type and node.op_type.endswith("Normalization"))
    assert node.name == other.name
    assert [value.name for value in node.inputs] == [value.name for value in other.inputs]
    if "epsilon" in node.attributes:
        assert node.attributes["epsilon"].as_float() == pytest.approx(0.001, rel=1e-6)
    for shot in samples(model, seed=4):
        got, want = (run_exactly(each, shot.feeds)["y"] for each in (back, plain))
        assert np.abs(got - want).max() <= 1.01 * float(plan.activations["y"].scale)


def test_rows_too_long_to_be_summed_exactly_stay(build: Callable[..., ir.Model], quantized: Quantized) -> None:
    size = EXACT_ROW + 8
    text = f"""(float[1, {size}] x) => (float[1, {size}] y) {{
        h = Mul(x, x)
        y = LayerNormalization(h, scale, shift)
    }}"""
    _, written = quantized(build(text, scale=np.ones(size), shift=np.zeros(size)))
    assert _counts(written)["LayerNormalization"] == 1


def test_unit_vectors_that_leave_the_model_stay(build: Callable[..., ir.Model], quantized: Quantized) -> None:
    text = "(float[2, 24] x) => (float[2, 24] y) { h = MatMul(x, w)\n y = LpNormalization(h) }"
    _, written = quantized(build(text, w=_constants()["w"]))
    (norm,) = (node for node in written.graph if node.op_type == "LpNormalization")
    maker = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    assert maker is not None
    assert maker.name == "h__dequantize"
