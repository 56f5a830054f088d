"""What a file is that is not what it should be, is told by its first bytes."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.file_kind import looks_like
from edgeship.calibration.graph.onnx_file import load_onnx

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def picture(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, form)
    return file.getvalue()


def model() -> bytes:
    node = helper.make_node("Relu", ["x"], ["y"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    return helper.make_model(
        helper.make_graph([node], "g", ports[:1], ports[1:]), producer_name="somebody"
    ).SerializeToString()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "Git LFS pointer; `git lfs pull`"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(20), "TFLite"),
        (pickle.dumps({}, protocol=2), "pickle"),
        (b"PK\x03\x04" + bytes(20), "zip"),
        (picture("PNG"), "PNG"),
        (picture("JPEG"), "JPEG"),
        (b"\n <!DOCTYPE html>", "web page"),
        (b'{"a": 1}', "JSON"),
        (model(), "ONNX"),
    ],
)
def test_a_known_kind_is_named(content: bytes, said: str) -> None:
    assert said in looks_like(content)


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", bytes(range(200, 256))])
def test_nothing_is_said_of_what_tells_nothing(content: bytes) -> None:
    assert looks_like(content) == ""


def test_the_sentence_about_a_model_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"is not an ONNX model: it is a Git LFS pointer; `git lfs pull` fetches"):
        load_onnx(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(model()[:-3])
    with pytest.raises(InputError, match=r"is not an ONNX model: it begins as an ONNX model, and is damaged"):
        load_onnx(tmp_path / "model.onnx")
    onnx.save(onnx.load_model_from_string(model()), tmp_path / "good.onnx")
    assert load_onnx(tmp_path / "good.onnx").graph.outputs[0].name == "y"
