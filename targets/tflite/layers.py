"""Every layer of a TFLite artifact, as its runtime computes it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.flatfile import description, in_onnx_order, load, text
from edgeship.targets.tflite.reader import schema_module
from edgeship.targets.tflite.session import TFLiteSession


class TFLiteLayers:
    """An artifact with every computed tensor among its outputs.

    Delegates run it as they run the artifact itself: an output more does not change which kernel computes it.
    """

    def __init__(self, path: Path) -> None:
        """Loads `path`. Raises InputError as TFLiteSession does."""
        model = load(path)
        graph = model.subgraphs[0]
        computed = [int(index) for operator in graph.operators for index in operator.outputs]
        kept = set(graph.outputs)
        graph.outputs = [*graph.outputs, *(i for i in dict.fromkeys(computed) if i not in kept)]
        self._steps = {text(graph.tensors[i].name): _step(graph.tensors[i]) for i in graph.outputs}
        self._ranges = {
            text(graph.tensors[i].name): ends for i in graph.outputs if (ends := _range(graph.tensors[i])) is not None
        }
        model.signatureDefs = []
        self._described = description(model)
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / path.name
            probe.write_bytes(packed(model))
            self._session = TFLiteSession(probe)
        self.inputs = self._session.inputs

    @property
    def steps(self) -> Mapping[str, float]:
        """The scale of each quantized tensor by name."""
        return {name: scale for name, (scale, _) in self._steps.items() if scale}

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """What each quantized tensor can represent, by name."""
        return self._ranges

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every computed tensor by name, as real numbers (float32), in the artifact's order of axes, none torn."""
        seen = in_onnx_order(self._described, self._session.run(feeds))
        return {name: self._real(name, values) for name, values in seen.items()}

    def _real(self, name: str, values: Array) -> Array:
        scale, zero_point = self._steps.get(name, (0.0, 0))
        if not scale or values.dtype.kind == "f":
            return values
        return (values.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def _step(tensor: Any) -> tuple[float, int]:
    quantization = tensor.quantization
    scales = None if quantization is None else quantization.scale
    if scales is None or len(scales) != 1:
        return 0.0, 0
    return float(scales[0]), int(quantization.zeroPoint[0])


def _range(tensor: Any) -> tuple[float, float] | None:
    """The smallest and largest number of an integer tensor; None for others."""
    types = schema_module().TensorType
    limits = {types.INT8: (-128, 127), types.UINT8: (0, 255), types.INT16: (-32768, 32767)}
    scale, zero_point = _step(tensor)
    if not scale or tensor.type not in limits:
        return None
    low, high = limits[tensor.type]
    return (low - zero_point) * scale, (high - zero_point) * scale


def packed(model: Any) -> bytes:
    """The file of a model that was read and changed."""
    import flatbuffers

    schema_module()
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
