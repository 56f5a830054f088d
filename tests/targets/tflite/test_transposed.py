"""Transposed convolutions whose sizes are known only at run time: TRANSPOSE_CONV is told them by a computed tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Model = Callable[..., onnx.ModelProto]
Convert = Callable[..., Path]
Reference = Callable[..., dict[str, Array]]
RNG = np.random.default_rng(4)

TRANSPOSED: dict[str, tuple[tuple[int | str, ...], tuple[int, ...], dict[str, Any]]] = {
    "batch": (("N", 3, 6, 7), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    "batch, cut": (("N", 3, 6, 7), (3, 4, 4, 4), {"strides": [3, 2], "pads": [1, 2, 0, 1]}),
    "batch, dilated": (("N", 3, 6, 7), (3, 4, 3, 3), {"dilations": [2, 2], "auto_pad": "SAME_UPPER"}),
    "batch, a few groups": (("N", 4, 6, 7), (4, 3, 2, 2), {"strides": [2, 2], "group": 2}),
    "batch, many groups": (("N", 12, 6, 7), (12, 1, 4, 4), {"strides": [2, 2], "pads": [1] * 4, "group": 12}),
    "batch of rows": (("N", 3, 9), (3, 4, 4), {"strides": [2], "pads": [1, 1]}),
    "batch in space": (("N", 3, 4, 5, 6), (3, 2, 2, 2, 2), {"strides": [2, 2, 2]}),
    "height and width": (("N", 3, "height", "width"), (3, 4, 2, 2), {"strides": [2, 2]}),
    "height and width, cut": (("N", 3, "height", "width"), (3, 4, 4, 3), {"strides": [2, 3], "pads": [2, 1, 1, 0]}),
}
"""Shape of the data, shape of the weights, attributes."""


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_convolution_follows_dynamic_sizes(
    case: str, model_of: Model, convert: Convert, reference: Reference, judge: Callable[[Path], TFLiteSession]
) -> None:
    shape, weights, attributes = TRANSPOSED[case]
    constants = {"w": RNG.normal(size=weights).astype(np.float32)}
    model = model_of(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)], {"x": shape}, ["y"], constants
    )
    session = judge(convert(model))
    for batch, height, width in ((1, 6, 7), (3, 9, 5), (2, 12, 12)):
        sizes = {"N": batch, "height": height, "width": width}
        feeds = {"x": RNG.normal(size=[sizes.get(str(size), size) for size in shape]).astype(np.float32)}
        np.testing.assert_allclose(session.run(feeds)["y"], reference(model, feeds)["y"], atol=1e-4)


def test_an_int8_one_follows_a_dynamic_batch(
    model_of: Model, quantize: Model, convert: Convert, reference: Reference, judge: Callable[[Path], TFLiteSession]
) -> None:
    constants = {"w": RNG.normal(size=(3, 4, 3, 3)).astype(np.float32), "bias": RNG.normal(size=4).astype(np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w", "bias"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    model = quantize(
        model_of([node], {"x": ("N", 3, 6, 7)}, ["y"], constants), {"x": (0.03, 5), "y": (0.2, -3)}, {"w": 1}
    )
    session = judge(convert(model))
    for batch in (1, 4):
        feeds = {"x": RNG.normal(size=(batch, 3, 6, 7)).astype(np.float32)}
        expected = reference(model, feeds)["y"]
        assert np.unique(expected).size > 50
        assert np.abs(session.run(feeds)["y"] - expected).max() <= 0.2 * 1.001
