"""Random images for ONNX Runtime's own quantizer, which makes the models of others that edgeship reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime.quantization as ortq

Array = np.ndarray[Any, Any]


class RandomImages(ortq.CalibrationDataReader):
    """Eight random images of a shape, for the input `name`; the same ones each time."""

    def __init__(self, shape: tuple[int, ...], name: str = "x") -> None:
        rng = np.random.default_rng(1)
        self._samples: Iterator[dict[str, Array]] = iter(
            [{name: rng.normal(size=shape).astype(np.float32)} for _ in range(8)]
        )

    def get_next(self) -> dict[str, Array] | None:
        """The next sample."""
        return next(self._samples, None)
