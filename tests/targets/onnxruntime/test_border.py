"""NHWC and integer borders change how an artifact is fed, not what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET
from edgeship.targets.onnxruntime.border import KEY, Port, read_ports

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
    with pytest.raises(UnsupportedError, match="input image: cannot be int8") as caught:
        TARGET.convert(tiny_model, ConvertOptions(io_dtype="int8"))
    assert [finding.where for finding in caught.value.findings] == ["input image", "output logits"]


def test_a_port_rounds_half_to_even_and_saturates() -> None:
    port = Port(dtype="int8", scale=2.0, zero_point=1)
    values = np.array([1.0, 3.0, 5.0, 1e9, -1e9], np.float32)
    np.testing.assert_array_equal(port.enter(values), [1, 3, 3, 127, -128])
    np.testing.assert_array_equal(port.leave(np.array([1, 3], np.int8)), [0.0, 4.0])


@pytest.mark.parametrize("text", ["{", "[]", '{"image": {"color": 1}}', '{"image": 3}'])
def test_damaged_metadata_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=KEY):
        read_ports({KEY: text})
