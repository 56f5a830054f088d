"""Sessions say clearly what does not fit, and print nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgeship.calibration.errors import InputError
from edgeship.targets.onnxruntime import TARGET, OnnxSession, open_float, open_reference

Array = np.ndarray[Any, np.dtype[Any]]


def test_inputs_and_outputs_are_told_as_the_caller_sees_them(tiny_models: dict[str, bytes]) -> None:
    session = open_float(tiny_models["plain"])
    assert [(i.name, i.shape, i.dtype) for i in session.inputs] == [("image", (1, 3, 12, 12), np.float32)]
    assert [(o.name, o.shape, o.dtype) for o in session.outputs] == [("logits", (1, 5), np.float32)]


def test_a_dynamic_batch_is_minus_one_and_takes_any(tiny_models: dict[str, bytes], tiny_images: Array) -> None:
    model = onnx.load_from_string(tiny_models["plain"])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    session = open_float(model.SerializeToString())
    assert session.inputs[0].shape == (-1, 3, 12, 12)
    together = session.run({"image": tiny_images[:5]})["logits"]
    alone = [session.run({"image": image[None]})["logits"][0] for image in tiny_images[:5]]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)


def test_the_reference_and_the_optimised_float_model_agree(tiny_models: dict[str, bytes], tiny_images: Array) -> None:
    for content in tiny_models.values():
        feeds = {"image": tiny_images[:1]}
        np.testing.assert_allclose(
            open_float(content).run(feeds)["logits"], open_reference(content).run(feeds)["logits"], rtol=1e-4, atol=1e-5
        )


def test_a_wrong_name_says_which_inputs_there_are(tiny_models: dict[str, bytes], tiny_images: Array) -> None:
    with pytest.raises(InputError, match=r"takes the inputs \['image'\]; given: \['picture'\]"):
        open_float(tiny_models["plain"]).run({"picture": tiny_images[:1]})


@pytest.mark.parametrize("shape", [(1, 3, 12, 11), (3, 12, 12), (2, 3, 12, 12), (1, 12, 12, 3)])
def test_a_wrong_shape_says_seen_and_accepted(tiny_models: dict[str, bytes], shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"accepted: \[1, 3, 12, 12\]"):
        open_float(tiny_models["plain"]).run({"image": np.zeros(shape, np.float32)})


def test_random_truncated_and_empty_files_are_input_errors(tmp_path: Path, tiny_models: dict[str, bytes]) -> None:
    good = tiny_models["plain"]
    for name, content in {"random": bytes(range(256)) * 9, "cut": good[: len(good) // 2], "empty": b""}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            TARGET.open(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.onnx cannot be read"):
        TARGET.open(tmp_path / "nowhere.onnx")


def test_an_operator_that_does_not_exist_is_named_with_its_node(tiny_models: dict[str, bytes]) -> None:
    model = onnx.load_from_string(tiny_models["plain"])
    model.graph.node[1].op_type, model.graph.node[1].name = "Rleu", "typo"
    model.graph.node[-1].op_type, model.graph.node[-1].domain, model.graph.node[-1].name = "Solve", "my.own", "mine"
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    findings = TARGET.check(ir.from_proto(model))
    assert [finding.where for finding in findings] == ["Rleu typo", "my.own.Solve mine"]


def test_a_model_that_every_operator_of_exists_but_does_not_fit_is_found() -> None:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="bad")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.zeros((4, 5, 3, 3), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session_or_findings = TARGET.check(ir.from_proto(model))
    if not session_or_findings:  # ONNX Runtime finds channels that do not match only when it runs
        with pytest.raises(Exception, match=r"channels|bad"):
            open_float(model.SerializeToString()).run({"x": np.zeros((1, 3, 8, 8), np.float32)})


def test_nothing_is_printed(
    tmp_path: Path, signed_files: dict[str, Path], tiny_images: Array, capfd: pytest.CaptureFixture[str]
) -> None:
    session = OnnxSession(signed_files["residual"])
    session.run({"image": tiny_images[:1]})
    TARGET.integer_share(signed_files["residual"])
    with pytest.raises(InputError):
        open_float(b"\0" * 64)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_external_data_is_read_from_the_models_folder_whatever_the_working_directory(
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_images: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(
        onnx.load_from_string(tiny_models["plain"]),
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    monkeypatch.chdir(tmp_path)
    feeds = {"image": tiny_images[:1]}
    np.testing.assert_array_equal(
        OnnxSession(folder / "model.onnx").run(feeds)["logits"], open_float(tiny_models["plain"]).run(feeds)["logits"]
    )
