"""Model files that nobody vouches for."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes


@pytest.fixture
def model(tiny_models: dict[str, bytes]) -> onnx.ModelProto:
    return onnx.load_from_string(tiny_models["plain"])


@pytest.fixture
def external(model: onnx.ModelProto, tmp_path: Path) -> Path:
    """A model whose weights lie in weights.bin beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.onnx"
    copy = onnx.load_from_string(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def _relocate(path: Path, location: str, **facts: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
        if entry.key in facts:
            entry.value = facts[entry.key]
    path.write_bytes(model.SerializeToString())


def test_a_model_comes_back_as_it_was_written(tiny_models: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_models["residual"])
    first = to_bytes(load_onnx(path))
    path.write_bytes(first)
    assert to_bytes(load_onnx(path)) == first


def test_external_data_beside_the_model_is_read(external: Path, model: onnx.ModelProto) -> None:
    loaded = load_onnx(external)
    for tensor in model.graph.initializer:
        value = loaded.graph.initializers[tensor.name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), numpy_helper.to_array(tensor))


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin", "", "C:\\secret.bin", "..\\secret.bin"]
)
def test_external_data_outside_the_models_folder_is_refused(external: Path, location: str) -> None:
    (external.parent.parent / "secret.bin").write_bytes(bytes(10_000))
    _relocate(external, location)
    with pytest.raises(InputError, match="accepted: a file in the model's own folder"):
        load_onnx(external)


def test_a_link_out_of_the_models_folder_is_refused(external: Path) -> None:
    secret = external.parent.parent / "secret.bin"
    secret.write_bytes(bytes(10_000))
    (external.parent / "link.bin").symlink_to(secret)
    _relocate(external, "link.bin")
    with pytest.raises(InputError, match="leads out of the model's folder"):
        load_onnx(external)


def test_a_missing_or_short_file_of_external_data_is_an_input_error(external: Path) -> None:
    weights = external.parent / "weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(content[:50])
    with pytest.raises(InputError, match=r"weights\.bin, which has 50"):
        load_onnx(external)
    weights.unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_onnx(external)


@pytest.mark.parametrize("facts", [{"offset": "-1"}, {"offset": "x"}, {"length": "99999999999"}])
def test_places_in_external_data_that_make_no_sense_are_input_errors(external: Path, facts: dict[str, str]) -> None:
    _relocate(external, "weights.bin", **facts)
    with pytest.raises(InputError, match="external data of"):
        load_onnx(external)


def test_nan_in_a_weight_names_the_initializer_and_its_layer(model: onnx.ModelProto, tmp_path: Path) -> None:
    values = numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[0].name))
    path = tmp_path / "nan.onnx"
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"initializer 'first_weight' \(used by Conv Conv_first\) holds 1 NaN"):
        load_onnx(path)


def test_an_infinite_bound_of_a_clip_is_meant(tiny_models: dict[str, bytes], tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_models["depthwise"])
    for tensor in model.graph.initializer:
        if tensor.name == "six":
            tensor.CopyFrom(numpy_helper.from_array(np.float32(np.inf), "six"))
    path = tmp_path / "clip.onnx"
    onnx.save(model, path)
    load_onnx(path)


def test_files_that_are_no_models_are_input_errors(tmp_path: Path, tiny_models: dict[str, bytes]) -> None:
    good = tiny_models["plain"]
    contents = {"empty": b"", "random": random.Random(0).randbytes(5000), "text": b"hello\n", "zeros": bytes(100)}
    for name, content in {**contents, "half": good[: len(good) // 2]}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_onnx(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_onnx(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="is not a file"):
        load_onnx(tmp_path)


def test_a_damaged_model_is_read_or_refused_but_nothing_else_happens(
    tmp_path: Path, tiny_models: dict[str, bytes]
) -> None:
    dice = random.Random(1)
    path = tmp_path / "damaged.onnx"
    for _ in range(120):
        content = bytearray(tiny_models["plain"])
        for _ in range(dice.choice((1, 5, 50))):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            load_onnx(path)


def test_a_graph_that_breaks_onnxs_rules_is_an_input_error(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.node[0].input[0] = "nobody makes this"
    path = tmp_path / "loose.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="breaks the rules of ONNX"):
        load_onnx(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("input", "input 'nobody makes this' of node: name: Conv_first OpType: Conv is not output of"),
        ("op", "Conv_first"),
    ],
)
def test_the_node_that_breaks_a_rule_is_named(model: onnx.ModelProto, tmp_path: Path, change: str, told: str) -> None:
    if change == "input":
        model.graph.node[0].input[0] = "nobody makes this"
    else:
        model.graph.node[0].op_type = "Convolve"
    path = tmp_path / "loose.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError) as caught:
        load_onnx(path)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_beyond_two_gigabytes_is_refused_before_its_data_is_read(external: Path) -> None:
    with (external.parent / "weights.bin").open("r+b") as file:
        file.truncate(3 * 2**30)  # sparse: no disk is used
    model = onnx.load(external, load_external_data=False)
    tensor = model.graph.initializer[0]
    for index in range(2):
        other = model.graph.initializer.add()
        other.CopyFrom(tensor)
        other.name = f"big_{index}"
        del other.external_data[:]
        for key, value in (("location", "weights.bin"), ("offset", str(index * 2**30)), ("length", str(5 * 2**28))):
            entry = other.external_data.add()
            entry.key, entry.value = key, value
    external.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"2\.68 GB with its external data; accepted: up to 2\.15 GB"):
        load_onnx(external)


def test_an_opset_newer_than_any_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.opset_import[0].version = 99
    (tmp_path / "new.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        InputError, match=rf"opset 99; the newest that onnx .* defines is {onnx.defs.onnx_opset_version()}"
    ):
        load_onnx(tmp_path / "new.onnx")
