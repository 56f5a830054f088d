"""Quantized models by an independent quantizer (ONNX Runtime's own), and what a test asks of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.targets.onnxruntime import OnnxSession, open_reference

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="session")
def signed_files(
    tiny_models: dict[str, bytes], tiny_images: Array, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The tiny models in int8 by `onnxruntime.quantization`: signed activations, signed weights per channel, QDQ."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._images: Iterator[Array] = iter(tiny_images)

        def get_next(self) -> dict[str, Array] | None:
            image = next(self._images, None)
            return None if image is None else {"image": image[np.newaxis]}

    folder = tmp_path_factory.mktemp("signed")
    for name, content in tiny_models.items():
        (folder / f"{name}_float.onnx").write_bytes(content)
        quantize_static(
            folder / f"{name}_float.onnx",
            folder / f"{name}.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    return {name: folder / f"{name}.onnx" for name in tiny_models}


@pytest.fixture(params=["concat", "depthwise", "plain", "residual"])
def signed_file(request: pytest.FixtureRequest, signed_files: dict[str, Path]) -> Path:
    """Each of the signed models in turn."""
    return signed_files[request.param]


@pytest.fixture
def signed(signed_file: Path) -> ir.Model:
    """The graph of `signed_file`, a fresh copy."""
    return load_onnx(signed_file)


@pytest.fixture(scope="session")
def integers() -> Any:
    """A function (model, feeds) -> every quantized tensor by name, computed with optimisations off."""

    def compute(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
        model = model.clone()
        names = []
        for node in model.graph:
            if node.op_type == "QuantizeLinear":
                names.append(str(node.outputs[0].name))
                if not node.outputs[0].is_graph_output():
                    model.graph.outputs.append(node.outputs[0])
        session = open_reference(ir.to_proto(model).SerializeToString())
        results = session.run(feeds)
        return {name: results[name] for name in names}

    return compute


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """A function: bytes -> the artifact, opened as a file."""

    def write_and_open(content: bytes) -> OnnxSession:
        path = tmp_path / "artifact.onnx"
        path.write_bytes(content)
        return OnnxSession(path)

    return write_and_open
