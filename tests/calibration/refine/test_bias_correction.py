from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import StageError
from edgeship.calibration.refine.bias_correction import Mean, correct_biases


def test_the_mean_is_that_of_all_samples_however_they_come() -> None:
    values = np.random.default_rng(0).normal(3, 1, (150, 2, 5)).astype(np.float32)
    one, first, second = Mean(), Mean(), Mean()
    for i, sample in enumerate(values):
        one.update(sample[np.newaxis])
        (first if i < 70 else second).update(sample[np.newaxis])
    first.merge(second)
    whole = Mean()
    whole.update(values)
    expected = values.mean(axis=0, dtype=np.float64)
    for mean in (one, first, whole):
        assert mean.mean() == pytest.approx(expected, abs=1e-6)
        assert mean.count == 150


def test_samples_of_different_shapes_are_refused() -> None:
    mean = Mean()
    mean.update(np.zeros((1, 3, 4)))
    with pytest.raises(ValueError, match=r"its shape is \[3, 5\], and was \[3, 4\] before"):
        mean.update(np.zeros((1, 3, 5)))


LAYERS = {
    "padded": "y = Conv <pads = [1,0,1,2], strides = [2,1], dilations = [1,2]> (r, w)",
    "grouped": "y = Conv <group = 2, pads = [1,1,1,1]> (r, w)",
    "depthwise": 'y = Conv <group = 4, auto_pad = "SAME_UPPER"> (r, w)',
    "gemm": "f = Flatten(r) y = Gemm(f, w)",
}
SHAPES = {"padded": (6, 4, 3, 3), "grouped": (6, 2, 3, 3), "depthwise": (4, 1, 3, 3), "gemm": (144, 5)}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_of_every_output_channel_is_kept(
    kind: str, build: Callable[..., ir.Model], quantized: Any, run_exactly: Any, samples: Any
) -> None:
    """Four-bit-like weights make large errors; the corrected layer is off by them in single values, not on average."""
    rng = np.random.default_rng(1)
    shape = SHAPES[kind]
    weights = rng.normal(size=shape)
    weights[..., 0] *= 40  # coarse scales, so that the other weights round badly
    output = {"padded": "[1,6,3,4]", "grouped": "[1,6,6,6]", "depthwise": "[1,4,6,6]", "gemm": "[1,5]"}[kind]
    model = build(f"(float[1,4,6,6] x) => (float{output} y) {{ r = Relu(x) {LAYERS[kind]} }}", w=weights)
    shots = samples(model, 50)
    for shot in shots:
        shot.feeds["x"][:] = np.abs(shot.feeds["x"]) + 1

    def shift(**options: Any) -> np.ndarray:
        _, qdq = quantized(model, shots=shots, **options)
        differences = [run_exactly(qdq, s.feeds)["y"] - run_exactly(model, s.feeds)["y"] for s in shots]
        mean = np.mean(differences, axis=0)
        return np.abs(mean.reshape(mean.shape[1], -1).mean(axis=1))

    plan, _ = quantized(model, shots=shots)
    step = float(plan.activations["y"].scale)
    corrected, plain = shift(), shift(refinements=())
    # a matrix product has one value of a channel for each sample: the rounding of its inputs averages out less
    assert corrected.max() < (0.2 if kind == "gemm" else 0.06) * step
    assert corrected.sum() < 0.5 * plain.sum()


def test_a_layer_without_bias_gets_one(tiny_model: ir.Model, quantized: Any, build: Callable[..., ir.Model]) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,3,4,4] y) { y = Conv(x, w) }",
        w=np.random.default_rng(0).normal(size=(3, 2, 1, 1)),
    )
    plan, qdq = quantized(model)
    assert set(plan.biases) == {"Conv_y"}
    conv = next(node for node in qdq.graph if node.op_type == "Conv")
    assert [value.name for value in conv.inputs] == ["x__dq", "w__dq", "Conv_y__bias__dq"]


def test_a_mean_that_was_not_collected_is_an_error(tiny_model: ir.Model, quantized: Any) -> None:
    plan, _ = quantized(tiny_model)
    with pytest.raises(StageError, match="no mean of tensor image was collected"):
        correct_biases(tiny_model, plan, {})
