"""Models as people publish them (EDGESHIP_DATA): converted from what their authors exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeship.targets.tflite.session import TFLiteSession


def test_ultraface_of_2019_agrees_with_onnx_runtime_without_a_transpose(
    edgeship_data: Path,
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[..., dict[str, Any]],
) -> None:
    model = onnx.load(edgeship_data / "models" / "ultraface_rfb_320.onnx")
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 0
    feeds = {"input": np.random.default_rng(0).normal(size=(1, 3, 240, 320)).astype(np.float32)}
    seen = TFLiteSession(path).run(feeds)
    for name, expected in reference(model, feeds).items():
        np.testing.assert_allclose(seen[name], expected, rtol=1e-3, atol=1e-4)
