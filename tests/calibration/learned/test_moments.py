"""Moments of a layer's inputs are those of NumPy, however large the inputs are, and merge to the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeship.calibration.graph.operators import read_layer
from edgeship.calibration.learned.moments import Moments, gather


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (10.0, 1e-3), (3000.0, 1.0)])
def test_moments_are_those_of_numpy_and_merge_to_the_same(
    mean: float, deviation: float, build: Callable[..., ir.Model]
) -> None:
    rng = np.random.default_rng(0)
    model = build("(float[1,16,8,8] x) => (float[1,4,8,8] y) { y = Conv(x, w) }", w=rng.normal(size=(4, 16, 1, 1)))
    layer = read_layer(next(iter(model.graph)))
    whole, first, second = Moments(layer), Moments(layer), Moments(layer)
    rows: list[list[np.ndarray]] = [[], []]
    for place in range(8):
        exact = torch.from_numpy((mean + deviation * rng.normal(size=(1, 16, 8, 8))).astype(np.float32))
        both = [gather(layer, values) for values in (exact, exact + 0.3 * deviation)]
        whole.update(both[0], both[1])
        (first if place < 3 else second).update(both[0], both[1])
        for kept, each in zip(rows, both, strict=True):
            kept.append(each[:, 0].double().numpy())
    first.merge(second)
    x, rounded = (np.concatenate(each) for each in rows)
    wanted = [(rounded - rounded.mean(0)).T @ (each - each.mean(0)) / len(x) for each in (rounded, x)]
    for moments in (whole, first):
        for found, expected in zip(moments.covariances(centred=True), wanted, strict=True):
            assert found[0].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4 * expected.max())
        for found, each in zip(moments.covariances(centred=False), (rounded, x), strict=True):
            assert found[0].numpy() == pytest.approx(rounded.T @ each / len(x), rel=1e-6, abs=1e-4 * deviation**2)
        for found, each in zip(moments.means(), (x, rounded), strict=True):
            assert found[0].numpy() == pytest.approx(each.mean(0), rel=1e-6, abs=1e-6)
