"""NHWC and integer borders change how an artifact is fed, not what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgeship.calibration.errors import InputError
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET
from edgeship.targets.onnxruntime.border import KEY, Port, read_ports
from projects import run

Array = np.ndarray[Any, np.dtype[Any]]
TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_every_border_gives_the_results_of_the_plain_artifact(  # noqa: PLR0917 - fixtures
    signed: ir.Model, tiny_images: Array, opened: Any, tmp_path: Path, layout: Any, dtype: Any
) -> None:
    plain = opened(TARGET.convert(signed, ConvertOptions()))
    path = tmp_path / "border.onnx"
    path.write_bytes(TARGET.convert(signed, ConvertOptions(io_layout=layout, io_dtype=dtype)))
    session = TARGET.open(path)
    assert session.inputs == plain.inputs
    assert session.outputs == plain.outputs
    for image in tiny_images[:4]:
        expected, seen = plain.run({"image": image[None]}), session.run({"image": image[None]})
        np.testing.assert_allclose(seen["logits"], expected["logits"], rtol=1e-6, atol=0)
    assert TARGET.integer_share(path).share == 1.0


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_the_file_itself_has_the_border_asked_for(signed: ir.Model, dtype: Any) -> None:
    written = onnx.load_from_string(TARGET.convert(signed, ConvertOptions(io_layout="nhwc", io_dtype=dtype)))
    taken, given = written.graph.input[0], written.graph.output[0]
    assert taken.name == "image"
    assert given.name == "logits"
    assert [side.dim_value for side in taken.type.tensor_type.shape.dim] == [1, 12, 12, 3]
    assert [side.dim_value for side in given.type.tensor_type.shape.dim] == [1, 5]
    assert taken.type.tensor_type.elem_type == given.type.tensor_type.elem_type == TYPES[dtype]


def test_unsigned_integers_enter_without_a_quantizer(signed: ir.Model) -> None:
    written = onnx.load_from_string(TARGET.convert(signed, ConvertOptions(io_dtype="uint8")))
    quantizers = [node for node in written.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "image"]
    assert not quantizers


def test_a_float_model_refuses_an_integer_border_and_names_inputs_and_outputs(tiny_model: ir.Model) -> None:
    with pytest.raises(InputError, match=r"input image: cannot be int8: it is not quantized; .* output logits: cannot"):
        TARGET.convert(tiny_model, ConvertOptions(io_dtype="int8"))


def test_what_is_no_real_number_stays_as_it_is(signed: ir.Model, tiny_images: Array, opened: Any) -> None:
    (logits,) = signed.graph.outputs
    best = ir.node("ArgMax", [logits], {"axis": 1})
    best.outputs[0].name, best.outputs[0].type = "best", ir.TensorType(ir.DataType.INT64)
    best.outputs[0].shape = ir.Shape([1, 1])
    signed.graph.append(best)
    signed.graph.outputs.append(best.outputs[0])
    content = TARGET.convert(signed, ConvertOptions(io_dtype="int8"))
    types = [value.type.tensor_type.elem_type for value in onnx.load_from_string(content).graph.output]
    assert types == [TensorProto.INT8, TensorProto.INT64]
    outputs = opened(content).run({"image": tiny_images[:1]})
    assert outputs["best"].item() == outputs["logits"].argmax()


@pytest.mark.parametrize("target", ["onnxruntime", "tflite"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("mode", ["none", "int16"])
def test_an_integer_border_that_the_model_does_not_have_is_wrong_input_for_every_target(  # noqa: PLR0917 - fixtures
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path, target: str, dtype: str, mode: str
) -> None:
    model, out = tmp_path / "model.onnx", tmp_path / "out"
    model.write_bytes(tiny_models["plain"])
    if mode == "int16":
        made = run("quantize", model, "-o", tmp_path / "int16.onnx", "--data", tiny_data, "--mode", "int16")
        assert made.exit_code == 0, made.output
        model = tmp_path / "int16.onnx"
    result = run("convert", model, "-o", out, "--target", target, "--io-dtype", dtype)
    assert (result.exit_code, out.exists()) == (2, False), result.output
    assert "image" in result.output.splitlines()[-1]
    assert dtype in result.output.splitlines()[-1]


@pytest.mark.parametrize("option", ["--integer-only", "--c-array"])
def test_an_option_that_onnxruntime_does_not_have_is_told_before_the_model_is_read(tmp_path: Path, option: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    result = run("convert", tmp_path / "model.onnx", "-o", tmp_path / "out.onnx", "--target", "onnxruntime", option)
    assert result.exit_code == 2
    assert result.output.startswith(f"edgeship: {option}: ONNX Runtime ")


def test_a_port_rounds_half_to_even_and_saturates() -> None:
    port = Port(dtype="int8", scale=2.0, zero_point=1)
    values = np.array([1.0, 3.0, 5.0, 1e9, -1e9], np.float32)
    np.testing.assert_array_equal(port.enter(values), [1, 3, 3, 127, -128])
    np.testing.assert_array_equal(port.leave(np.array([1, 3], np.int8)), [0.0, 4.0])


@pytest.mark.parametrize("text", ["{", "[]", '{"image": {"color": 1}}', '{"image": 3}'])
def test_damaged_metadata_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=KEY):
        read_ports({KEY: text})
