"""What model files say of themselves."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.pipeline.inspection import inspect_model
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET
from projects import run

PARAMETERS = 8 * 27 + 8 + 16 * 72 + 16 + 5 * 16 + 5
MACS = 144 * 8 * 27 + 36 * 16 * 72 + 5 * 16


@pytest.fixture
def float_file(tiny_models: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "plain.onnx"
    path.write_bytes(tiny_models["plain"])
    return path


@pytest.fixture
def int8_file(float_file: Path, tiny_images: Any) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._left = list(tiny_images[:4])

        def get_next(self) -> dict[str, Any] | None:
            return {"image": self._left.pop()[None]} if self._left else None

    path = float_file.with_name("int8.onnx")
    quantize_static(
        float_file, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def test_a_float_onnx_file(float_file: Path) -> None:
    facts = inspect_model(float_file)
    assert (facts.format, facts.bytes) == ("onnx", float_file.stat().st_size)
    assert [(port.name, port.shape, port.dtype) for port in facts.inputs] == [("image", (1, 3, 12, 12), "float")]
    assert [(port.name, port.shape) for port in facts.outputs] == [("logits", (1, 5))]
    assert facts.operators["Conv"] == 2
    assert (facts.parameters, facts.macs, facts.int8_share) == (PARAMETERS, MACS, 0.0)
    assert facts.quantization.float_layers == ("Conv_first", "Conv_second", "Gemm_logits")
    assert ("quantization", "none: float") in facts.rows()


def test_a_quantized_onnx_file_does_the_same_work_with_the_same_parameters(int8_file: Path) -> None:
    facts = inspect_model(int8_file)
    assert (facts.parameters, facts.macs, facts.int8_share) == (PARAMETERS, MACS, 1.0)
    quantization = facts.quantization
    assert (quantization.layers, quantization.integer_layers, quantization.float_layers) == (3, 3, ())
    assert (quantization.per_channel_weights, quantization.activation_dtypes) == (3, ("int8",))


def test_an_artifact_tells_its_unsigned_activations_and_metadata(int8_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "artifact.onnx"
    path.write_bytes(
        TARGET.convert(load_onnx(int8_file), ConvertOptions(metadata={"edgeship.preprocessing.color": '"rgb"'}))
    )
    facts = inspect_model(path)
    assert facts.quantization.activation_dtypes == ("uint8",)
    assert facts.metadata == {"edgeship.preprocessing.color": '"rgb"'}


def test_facts_are_json(int8_file: Path) -> None:
    facts = inspect_model(int8_file).to_json()
    assert json.loads(json.dumps(facts))["macs"] == MACS


def test_unknown_shapes_leave_the_work_open_with_the_reason(tiny_models: dict[str, bytes], tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_models["plain"])
    del model.graph.value_info[:]
    for side in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[side].dim_param = "side"
    path = tmp_path / "open.onnx"
    onnx.save(model, path)
    facts = inspect_model(path)
    assert facts.macs is None
    assert facts.int8_share is None
    assert "is unknown" in facts.note
    assert facts.inputs[0].shape == (1, 3, "side", "side")


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize("content", [b"", b"x", b"\x1c\0\0\0TFL3" + bytes(40), random.Random(3).randbytes(4000)])
def test_random_bytes_are_an_input_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="model"):
        inspect_model(path)


def test_other_files_and_missing_ones_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "model.pb").write_bytes(b"1234")
    with pytest.raises(InputError, match=r"accepted: \.onnx, \.tflite"):
        inspect_model(tmp_path / "model.pb")
    for name in ("gone.onnx", "gone.tflite", "gone"):
        with pytest.raises(InputError, match="gone"):
            inspect_model(tmp_path / name)


@pytest.fixture(scope="session")
def tflite_content() -> bytes:
    """A convolution and a fully connected layer in int8, packed with the schema's own object API."""
    schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="the TFLite schema")
    import flatbuffers

    def tensor(name: str, shape: list[int], kind: int, buffer: int, scales: int) -> Any:
        quantization = schema.QuantizationParametersT(scale=[0.1] * scales, zeroPoint=[0] * scales)
        return schema.TensorT(name=name, shape=shape, type=kind, buffer=buffer, quantization=quantization)

    int8, int32 = schema.TensorType.INT8, schema.TensorType.INT32
    tensors = [
        tensor("image", [1, 8, 8, 3], int8, 0, 1),
        tensor("conv/weight", [4, 3, 3, 3], int8, 1, 4),
        tensor("conv/bias", [4], int32, 2, 4),
        tensor("conv", [1, 6, 6, 4], int8, 0, 1),
        tensor("fc/weight", [5, 144], int8, 3, 1),
        tensor("logits", [1, 5], int8, 0, 1),
    ]
    sizes = {1: 4 * 27, 2: 16, 3: 5 * 144}
    buffers = [schema.BufferT(data=np.ones(sizes[place], np.uint8) if place in sizes else None) for place in range(4)]
    kinds = [schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.FULLY_CONNECTED]
    operators = [
        schema.OperatorT(opcodeIndex=0, inputs=[0, 1, 2], outputs=[3]),
        schema.OperatorT(opcodeIndex=1, inputs=[3, 4, -1], outputs=[5]),
    ]
    model = schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(deprecatedBuiltinCode=kind, builtinCode=kind, version=1) for kind in kinds],
        subgraphs=[schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[5], operators=operators)],
        buffers=buffers,
    )
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_a_tflite_file(tflite_content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(tflite_content)
    facts = inspect_model(path)
    assert (facts.format, facts.operators) == ("tflite", {"CONV_2D": 1, "FULLY_CONNECTED": 1})
    assert facts.inputs[0].quantization == "scale 0.1, zero point 0"
    assert (facts.inputs[0].name, facts.inputs[0].shape, facts.inputs[0].dtype) == ("image", (1, 8, 8, 3), "int8")
    assert (facts.macs, facts.int8_share) == (36 * 4 * 27 + 5 * 144, 1.0)
    assert facts.parameters == 4 * 27 + 4 + 5 * 144
    assert (facts.quantization.per_channel_weights, facts.quantization.per_tensor_weights) == (1, 1)


def test_an_artifact_tells_its_open_sides_and_the_oldest_runtime(float_file: Path, tmp_path: Path) -> None:
    model = onnx.load(float_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.save(model, float_file)
    artifact = tmp_path / "open.tflite"
    assert run("convert", float_file, "-o", artifact, "--target", "tflite").exit_code == 0
    facts = inspect_model(artifact)
    assert [port.shape for port in (*facts.inputs, *facts.outputs)] == [("?", 12, 12, 3), ("?", 5)]
    assert re.fullmatch(r"schema 3, edgeship, runtime \d+\.\d+\.\d+ or newer", facts.version)


@pytest.mark.parametrize(
    ("mode", "onnx_says", "tflite_says"),
    [
        ("dynamic", "QDQ on weights only", "int8 weights, activations rounded at run time (hybrid kernels)"),
        ("float16", "float16 weights", "float16 weights"),
    ],
)
def test_small_weights_of_float_layers_are_told(
    float_file: Path, tmp_path: Path, mode: str, onnx_says: str, tflite_says: str
) -> None:
    small, artifact = tmp_path / "small.onnx", tmp_path / "small.tflite"
    assert run("quantize", float_file, "-o", small, "--mode", mode).exit_code == 0
    assert run("convert", small, "-o", artifact, "--target", "tflite").exit_code == 0
    assert ("quantization", onnx_says) in inspect_model(small).rows()
    assert ("quantization", tflite_says) in inspect_model(artifact).rows()


def test_a_damaged_tflite_file_is_read_or_refused_but_nothing_else_happens(
    tflite_content: bytes, tmp_path: Path
) -> None:
    dice = random.Random(2)
    path = tmp_path / "damaged.tflite"
    refused = 0
    for trial in range(300):
        content = bytearray(tflite_content)
        if trial % 3 == 0:
            content = content[: dice.randrange(len(content))]
        for _ in range(dice.choice((1, 5, 50)) if trial % 3 else 0):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            inspect_model(path)
        except InputError:
            refused += 1
    assert refused >= 100  # every truncated one


def test_a_tensor_index_beyond_the_end_is_told(tflite_content: bytes) -> None:
    schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="the TFLite schema")
    import flatbuffers

    from edgeship.targets.tflite.reader import read_model

    model = schema.ModelT.InitFromPackedBuf(tflite_content, 0)
    model.subgraphs[0].operators[1].inputs = [3, 99, -1]
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    with pytest.raises(InputError, match="operator 1 reads or writes a tensor that is not there"):
        read_model(bytes(builder.Output()), "model.tflite")


def test_the_size_of_a_model_is_that_of_all_its_files(tmp_path: Path, tiny_models: dict[str, bytes]) -> None:
    model = onnx.load_model_from_string(tiny_models["plain"])
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    facts = inspect_model(tmp_path / "a.onnx")
    assert (tmp_path / "a.data").stat().st_size > 4000
    assert facts.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
