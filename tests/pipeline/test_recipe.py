"""A recipe is one typed value; what is wrong with a file is said once, with the key, the value and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.errors import InputError
from edgeship.pipeline.recipe import json_schema, load_recipe
from edgeship.pipeline.recipe_sections import GATES

MINIMAL = """
name = "tiny"
[model]
source = "model.onnx"
[targets.onnxruntime]
"""
FULL = """
name = "digits"
[model]
source = "model.py:build"
weights = "${data.root}/weights.pt"
args = { width = 8 }
[input]
name = "image"
shape = ["dynamic", 3, 32, 32]
mean = [1, 2.5, 3]
std = 127.5
resize = [40, 48]
crop = 32
color = "bgr"
[data]
root = "data"
calibration = "calibration.csv"
evaluation = "evaluation.csv"
evaluation_samples = 20
seed = 3
[quantize]
algorithm = "minmax"
samples = 10
weights = "shared"
[targets.tflite]
io_layout = "nchw"
[targets.onnxruntime]
weights = "full"
[gates]
"accuracy.max_drop" = 1
parity.max_steps = 2
[benchmark]
threads = 2
"""


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_every_part_of_a_full_recipe_arrives_typed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.input.shape == ("dynamic", 3, 32, 32)
    assert recipe.input.mean == (1.0, 2.5, 3.0)
    assert recipe.input.std == (127.5,)
    assert recipe.input.resize == (40, 48)
    assert recipe.model.args == {"width": 8}
    assert recipe.gates == {"accuracy.max_drop": 1.0, "parity.max_steps": 2.0}
    assert list(recipe.targets) == ["tflite", "onnxruntime"]
    assert (recipe.benchmark.threads, recipe.benchmark.runs) == (2, 200)


def test_paths_start_from_the_recipe_and_may_name_the_data_root(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.source_path == tmp_path / "model.py"
    assert recipe.source_factory == "build"
    assert recipe.weights_path == tmp_path / "data" / "weights.pt"
    assert load_recipe(recipe.path, ["data.root=/elsewhere"]).weights_path == Path("/elsewhere/weights.pt")


def test_a_module_as_source_has_no_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["model.source=torchvision.models:mobilenet_v2"])
    assert recipe.source_path is None
    assert recipe.source_factory == "mobilenet_v2"


def test_a_list_beside_the_recipe_comes_before_one_under_the_root(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    (tmp_path / "data").mkdir()
    below = tmp_path / "data" / "calibration.csv"
    below.write_text("file\n")
    assert recipe.data_path("calibration") == below
    beside = tmp_path / "calibration.csv"
    beside.write_text("file\n")
    assert recipe.data_path("calibration") == beside


def test_data_that_is_in_neither_place_is_an_error_naming_both(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, FULL))
    with pytest.raises(InputError, match=r"calibration.csv' does not exist; looked for .* and .*data/calibration.csv"):
        recipe.data_path("calibration")


def test_an_environment_variable_in_a_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESHIP_DATA", "/somewhere")
    recipe = load_recipe(write(tmp_path, FULL), ["data.root=${EDGESHIP_DATA}/images"])
    assert recipe.data_root == Path("/somewhere/images")


def test_an_unset_environment_variable_says_how_to_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGESHIP_DATA", raising=False)
    recipe = load_recipe(write(tmp_path, FULL), ["data.root=${EDGESHIP_DATA}"])
    with pytest.raises(InputError, match=r"EDGESHIP_DATA, which is not set.*--set data.root=PATH"):
        _ = recipe.data_root


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quantize.sampels=3", "quantize.sampels: unknown key; did you mean 'samples'?"),
        ("nam=x", "nam: unknown key; did you mean 'name'?"),
        ("targets.tflite.io_layuot=nchw", "targets.tflite.io_layuot: unknown key; did you mean 'io_layout'?"),
        ("targets.tflight.weights=full", "targets.tflight: unknown target; did you mean 'tflite'?"),
        (
            "targets.onnxruntime.integer_only=true",
            "targets.onnxruntime.integer_only: ONNX Runtime chooses its kernels by itself; accepted: false, or left",
        ),
        ("targets.onnxruntime.c_array=true", "targets.onnxruntime.c_array: ONNX Runtime reads files"),
        (
            "targets.tflite={c_array=true, io_dtype='uint8'}",
            'targets.tflite.c_array: seen io_dtype = "uint8"; accepted: io_dtype = "int8"',
        ),
        ("gates.parity.maxsteps=1", 'gates."parity.maxsteps": unknown gate; did you mean'),
        (
            "gates.accuracy.min_agreement=99",
            'gates."accuracy.min_agreement": seen 99 (smallest share of samples decided as fp32 decides, 0..1; '
            "needs no labels); accepted: 0 .. 1",
        ),
        ("gates.parity.max_steps=-1", "quantization steps); accepted: at least 0"),
        ("gates.parity.max_steps=nan", "gates.parity.max_steps: seen NaN; accepted: a finite number"),
        ("input.shape=[1, -2]", "input.shape: seen [1, -2]; accepted: a list of positive integers"),
        ("input.color=rbg", "input.color: seen \"rbg\"; accepted: 'rgb', 'bgr' or 'gray'"),
        ("input.std=0", "input.std: seen [0.0]; accepted: positive numbers"),
        ("input.resize=[1, 2, 3]", "accepted: a positive integer, or [height, width]"),
        ("benchmark.runs=2.5", "benchmark.runs: seen 2.5; accepted: integer"),
        ("input.mean=inf", "input.mean: seen Infinity; accepted: a finite number, or one number per channel"),
        ("quantize.qat.lr=inf", "quantize.qat.lr: seen Infinity; accepted: a finite number"),
        ("quantize.qat.mixup=nan", "quantize.qat.mixup: seen NaN; accepted: a finite number"),
        ("benchmark.runs=0", "benchmark.runs: seen 0; accepted: greater than 0"),
        ("benchmark.sweep=[0]", "benchmark.sweep.0: seen 0; accepted: greater than 0"),
        ("device=bord", 'device: seen "bord"; accepted: host, ssh://[user@]host[:port], adb:SERIAL'),
        ("devices.pi.url=pi@board", 'devices.pi.url: seen "pi@board"; accepted: host, ssh://[user@]host[:port] or'),
        ("devices.pi.pyton=x", "devices.pi.pyton: unknown key; did you mean 'python'?"),
        ("name=3", "name: seen 3; accepted: at most 100 letters"),
        ("name=../up", 'name: seen "../up"'),
        ("quantize.mode=sttic", "quantize.mode: seen \"sttic\"; accepted: 'static'"),
        ("name.deeper=1", "--set name.deeper: name is a value, not a table"),
        ("name", "--set takes KEY=VALUE"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_seen_and_what_is_accepted(
    tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in message(write(tmp_path, FULL), override)


def test_several_wrong_values_are_listed_together(tmp_path: Path) -> None:
    text = message(write(tmp_path, FULL), "benchmark.runs=0", "quantize.sampels=3")
    assert text.splitlines()[0].startswith("recipe.toml has 2 wrong entries, first ")
    assert len(text.splitlines()) == 3


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "model: required, and not given" in message(write(tmp_path, 'name = "x"\n[targets.tflite]\n'))


def test_a_recipe_without_targets_is_refused(tmp_path: Path) -> None:
    assert "targets: required" in message(write(tmp_path, 'name = "x"\nmodel.source = "m.onnx"\n'))


@pytest.mark.parametrize("content", [b"", b"name = ", b"\xff\xfe\x00", b"\x00" * 100])
def test_a_file_that_is_no_recipe_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    assert "recipe.toml" in message(path)


def test_a_missing_recipe_and_a_folder_are_input_errors(tmp_path: Path) -> None:
    assert "there is no recipe" in message(tmp_path / "none.toml")
    assert "is a folder" in message(tmp_path)


def test_an_override_is_toml_where_it_can_be_and_text_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    recipe = load_recipe(path, ["quantize.samples=7", "model.weights=a b.pt", "input.crop=[8, 9]", 'name="quoted"'])
    assert recipe.quantize.samples == 7
    assert recipe.model.weights == "a b.pt"
    assert recipe.input.crop == (8, 9)
    assert recipe.name == "quoted"


def test_the_later_override_wins(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, FULL), ["quantize.samples=7", "quantize.samples=9"]).quantize.samples == 9


def test_a_dump_is_plain_and_equal_for_equal_recipes(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    first, second = load_recipe(path), load_recipe(path)
    assert json.dumps(first.dump("input", "quantize")) == json.dumps(second.dump("input", "quantize"))
    assert set(first.dump("input")) == {"input"}
    assert str(tmp_path) not in json.dumps(first.dump())


def test_weights_are_auto_shared_or_set_for_one_target(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    shared = load_recipe(path)
    assert shared.weight_scheme("tflite") == "pair_limited"
    assert shared.weight_scheme("onnxruntime") == "full"
    auto = load_recipe(write(tmp_path, MINIMAL))
    assert auto.weight_scheme("onnxruntime") == "pair_limited"
    assert auto.weight_schemes() == ("full", "pair_limited")
    assert load_recipe(auto.path, ["quantize.weights=full"]).weight_schemes() == ("full",)


def test_the_schema_names_every_gate_and_allows_no_other() -> None:
    schema = json_schema()
    assert set(schema["properties"]["gates"]["properties"]) == set(GATES)
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema


def test_calibration_that_is_not_set_is_an_error_when_it_is_needed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.evaluation_samples() is None
    with pytest.raises(InputError, match=r"data.calibration is not set"):
        recipe.calibration_samples()


@given(st.text(max_size=40))
def test_any_override_is_taken_or_refused_with_one_kind_of_error(text: str) -> None:
    from edgeship.pipeline.recipe_reader import apply_override

    values: dict[str, object] = {"name": "x", "gates": {}}
    try:
        apply_override(values, text)
    except InputError as error:
        assert "--set" in str(error)  # noqa: PT017  # either outcome is right
