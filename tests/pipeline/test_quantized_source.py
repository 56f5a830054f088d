"""Models that are quantized already: what each command says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import InputError
from edgeship.pipeline.inspection import inspect_model
from edgeship.pipeline.onnx_source import read_source
from projects import run


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A convolution that its maker quantized to uint8, its weights around a zero point of 7."""
    node = helper.make_node
    constants = {
        "s": np.float32(0.02), "z": np.uint8(120), "ws": np.float32(0.01), "wz": np.uint8(7), "ys": np.float32(0.05),
        "w": np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3)).astype(np.uint8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        node("Conv", ["d", "wd"], ["c"], "first"),
        node("QuantizeLinear", ["c", "ys", "z"], ["yq"]),
        node("DequantizeLinear", ["yq", "ys", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    path = tmp_path / "theirs.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_quantize_refuses_it_and_says_what_to_do(quantized: Path) -> None:
    np.savez(quantized.with_name("data.npz"), x=np.zeros((2, 3, 8, 8), np.float32))
    out = quantized.with_name("out.onnx")
    result = run("quantize", quantized, "-o", out, "--data", quantized.with_name("data.npz"))
    assert result.exit_code == 2
    assert "is quantized already (QDQ: 3 DequantizeLinear, 2 QuantizeLinear)" in result.stderr
    assert "edgeship convert" in result.stderr
    assert not out.exists()


def test_a_recipe_whose_model_it_is_is_refused(quantized: Path) -> None:
    with pytest.raises(InputError, match="is quantized already"):
        read_source(quantized)


def test_convert_takes_it_and_names_what_is_computed_in_float(quantized: Path) -> None:
    out = quantized.with_name("out.tflite")
    result = run("convert", quantized, "-o", out, "--target", "tflite")
    assert result.exit_code == 0, result.stderr
    assert "in float: Conv 'first': its weights have zero points up to 121; TFLite's are symmetric" in result.stderr
    assert out.exists()


def test_inspect_says_how_it_is_quantized_and_what_a_target_computes_in_float(quantized: Path) -> None:
    assert inspect_model(quantized).quantization.form == "QDQ"
    lines = run("inspect", quantized, "--target", "tflite").stdout.splitlines()
    assert "tflite: can be converted" in lines
    assert any(line.startswith("  in float: Conv 'first'") for line in lines)
