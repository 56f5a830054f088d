"""The interpreter behind the Session protocol, and what it says about files that are no models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeship.calibration.errors import InputError
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def artifact(tiny_models: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx_ir as ir

    from edgeship.targets.base import ConvertOptions

    path = tmp_path_factory.mktemp("session") / "plain.tflite"
    model = ir.serde.deserialize_model(onnx.load_from_string(tiny_models["plain"]))
    path.write_bytes(TARGET.convert(model, ConvertOptions()))
    return path


@pytest.mark.parametrize(
    "content", [b"", b"TFL3", b"\x1c\x00\x00\x00TFL3", b"\x08\x00\x00\x00TFL3" + bytes(range(256)), b"PK\x03\x04" * 100]
)
def test_bytes_that_are_no_model_are_named_as_such(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.tflite"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.tflite"):
        TARGET.open(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.tflite"):
        TARGET.open(tmp_path / "nothing.tflite")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_model_is_refused(part: float, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.tflite"
    content = artifact.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(InputError):
        TARGET.open(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 600), value=st.integers(0, 255))
def test_reading_a_file_with_one_changed_byte_never_crashes(
    place: int, value: int, artifact: Path, tmp_path: Path
) -> None:
    content = bytearray(artifact.read_bytes())
    content[place] = value
    path = tmp_path / "changed.tflite"
    path.write_bytes(content)
    try:
        TARGET.integer_share(path)
    except InputError as error:
        assert "changed.tflite" in str(error)  # noqa: PT017 - most changes are harmless, the others must be named


def test_missing_input_and_wrong_shape_are_named(artifact: Path) -> None:
    session = TARGET.open(artifact)
    with pytest.raises(InputError, match="'image' is missing"):
        session.run({"picture": np.zeros((1, 3, 12, 12), np.float32)})
    with pytest.raises(InputError, match=r"\[1, 12, 12, 3\]"):
        session.run({"image": np.zeros((1, 12, 12, 3), np.float32)})


def test_file_without_our_metadata_is_run_as_it_is(artifact: Path, tmp_path: Path, tiny_images: Array) -> None:
    path = tmp_path / "foreign.tflite"
    path.write_bytes(artifact.read_bytes().replace(b"edgeship\0", b"somebody\0"))
    foreign, own = TARGET.open(path), TARGET.open(artifact)
    assert foreign.inputs[0].shape == (1, 12, 12, 3)
    (theirs,) = foreign.run({foreign.inputs[0].name: tiny_images[:1].transpose(0, 2, 3, 1)}).values()
    np.testing.assert_array_equal(theirs, own.run({"image": tiny_images[:1]})["logits"])


def test_session_sees_onnx_shapes(artifact: Path) -> None:
    session = TARGET.open(artifact)
    assert [(info.name, info.shape) for info in session.inputs] == [("image", (1, 3, 12, 12))]
    assert [(info.name, info.shape) for info in session.outputs] == [("logits", (1, 5))]


def test_unknown_engine_is_a_failure_with_the_way_out(artifact: Path) -> None:
    from edgeship.calibration.errors import StageError

    with pytest.raises(StageError, match="pip install"):
        TFLiteSession(artifact, engine="none")


def test_importing_the_target_imports_no_runtime() -> None:
    import subprocess
    import sys

    code = (
        "import sys, edgeship.targets.tflite as t; t.TARGET.rules;"
        "print([m for m in ('ai_edge_litert', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_share_counts_macs_by_the_types_the_operators_work_on(
    model_of: Callable[..., onnx.ModelProto], quantize: Callable[..., onnx.ModelProto], convert: Callable[..., Path]
) -> None:
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], name="integer"),
        onnx.helper.make_node("ConvTranspose", ["a", "v"], ["y"], name="real"),
    ]
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(4, 2, 2, 2)).astype(np.float32),
    }
    model = model_of(nodes, {"x": (1, 3, 8, 8)}, ["y"], constants)
    share = TARGET.integer_share(convert(quantize(model, {"x": (0.03, 0), "a": (0.05, 0)}, {"w": 0})))
    assert share.integer_macs == 6 * 6 * 4 * 27
    assert share.total_macs - share.integer_macs == 6 * 6 * 4 * 2 * 4
    assert share.float_layers == ("y",)
