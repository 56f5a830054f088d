"""Every mode of quantize from the recipe and the command line: files, plan, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from projects import run

RECIPE = """
name = "tiny"
[model]
source = "model.onnx"
[input]
name = "image"
[data]
evaluation = "tiny.npz"
{calibration}
[quantize]
mode = "{mode}"
{more}
[targets.onnxruntime]
[gates]
"parity.max_steps" = 2
[benchmark]
runs = 2
warmup = 1
[parity]
samples = 4
"""


@pytest.fixture
def model(tmp_path: Path, tiny_models: dict[str, bytes]) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_models["residual"])
    return path


def recipe(folder: Path, data: Path, mode: str, calibration: str = "", more: str = "") -> Path:
    (folder / "tiny.npz").write_bytes(data.read_bytes())
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(mode=mode, calibration=calibration, more=more))
    return path


@pytest.mark.parametrize("mode", ["dynamic", "float16", "int16"])
def test_a_mode_deploys_to_a_release_whose_artifact_agrees_with_its_reference(
    model: Path, tiny_data: Path, tmp_path: Path, mode: str
) -> None:
    calibration = 'calibration = "tiny.npz"' if mode == "int16" else ""
    path = recipe(tmp_path, tiny_data, mode, calibration)
    result = run("deploy", path, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "run/4-quantize/plan.json").read_text())
    assert plan["mode"] == mode
    facts = json.loads((tmp_path / "run/report.json").read_text())["targets"]["onnxruntime"]
    assert facts["parity"]["max_steps"] <= 2
    assert facts["int8_share"] == (1.0 if mode == "dynamic" else 0.0)
    assert facts["parity"]["saturation"]["layers"] == []
    assert facts["accuracy"]["drop"] == pytest.approx(0, abs=100 / 32 + 1e-9)  # one of 32 images


@pytest.mark.parametrize("mode", ["dynamic", "float16"])
def test_the_command_needs_no_data_where_only_weights_are_rounded(model: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "small.onnx"
    result = run("quantize", model, "-o", out, "--mode", mode)
    assert result.exit_code == 0, result.output
    assert "4 weight tensors" in result.output
    onnx.checker.check_model(str(out), full_check=True)
    assert out.stat().st_size < model.stat().st_size


def test_per_tensor_weights_in_dynamic_mode_have_one_scale(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    assert run("quantize", model, "-o", out, "--mode", "dynamic", "--per-tensor").exit_code == 0
    scales = [i for i in onnx.load(out).graph.initializer if i.name.endswith("__scale")]
    assert len(scales) == 4
    assert all(not scale.dims for scale in scales)


def test_int16_from_the_command_line_has_16_bit_quantizers(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.onnx"
    result = run("quantize", model, "-o", out, "--mode", "int16", "--data", tiny_data, "--samples", "4")
    assert result.exit_code == 0, result.output
    zero_points = {n.input[2] for n in onnx.load(out).graph.node if n.op_type == "QuantizeLinear"}
    types = {i.data_type for i in onnx.load(out).graph.initializer if i.name in zero_points}
    assert types == {onnx.TensorProto.INT16}


def test_modes_that_choose_ranges_ask_for_data(model: Path, tmp_path: Path) -> None:
    result = run("quantize", model, "-o", tmp_path / "x.onnx", "--mode", "int16")
    assert result.exit_code == 2
    assert "--mode int16 chooses ranges on real samples; give --data" in result.output
    assert not (tmp_path / "x.onnx").exists()


def test_an_unknown_mode_lists_those_there_are(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = run("deploy", recipe(tmp_path, tiny_data, "int4"), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "quantize.mode: seen \"int4\"; accepted: 'static', 'dynamic', 'float16', 'int16' or 'none'" in result.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            'pattern = "stem"\nalgorithm = "mse"',
            "'stem' is about activations, and mode 'float16' leaves those in float",
        ),
        ('pattern = "stm"\nfloat = true', "the pattern 'stm' matches no tensor, node or weights"),
        ('pattern = "stem"\nzero_point = 3', "zero_point beside scale only|exactly one of algorithm"),
        ('pattern = "stem"\nscale = 0.0', "override.0.scale: seen 0.0; accepted: greater than 0"),
        (
            'pattern = "stem"\nscale = 0.1\nzero_point = 200',
            "zero_point: seen 200; accepted: less than or equal to 127",
        ),
        (
            'pattern = "stem"\nint16 = true\nfloat = true',
            "exactly one of algorithm, weight_algorithm, float = true, range, scale and int16",
        ),
    ],
)
def test_overrides_that_cannot_be_followed_are_errors(
    model: Path, tiny_data: Path, tmp_path: Path, override: str, message: str
) -> None:
    path = recipe(tmp_path, tiny_data, "float16", more=f"[[quantize.override]]\n{override}")
    result = run("deploy", path, "--out", tmp_path / "run", "--to", "quantize")
    assert result.exit_code == 2, result.output
    assert any(part in result.output for part in message.split("|"))


def test_a_pinned_scale_is_the_scale_or_an_error(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    wish = '[[quantize.override]]\npattern = "inner_2"\nscale = 0.125\nzero_point = -3'
    path = recipe(tmp_path, tiny_data, "static", 'calibration = "tiny.npz"', wish)
    result = run("deploy", path, "--out", tmp_path / "run", "--to", "quantize")
    assert result.exit_code == 0, result.output
    chosen = json.loads((tmp_path / "run/4-quantize/plan.json").read_text())["activations"]["inner_2"]
    assert (chosen["scale"], chosen["zero_point"]) == (0.125, -3)
    wish = '[[quantize.override]]\npattern = "flat"\nscale = 0.125'
    path = recipe(tmp_path, tiny_data, "static", 'calibration = "tiny.npz"', wish)
    result = run("deploy", path, "--out", tmp_path / "run", "--to", "quantize")
    assert result.exit_code == 2
    assert "flat" in result.output


@pytest.mark.parametrize("mode", ["dynamic", "float16", "none"])
@pytest.mark.parametrize(
    "wish",
    [
        'algorithm = "mse"',
        'weight_algorithm = "mse"',
        'refine = ["gptq"]',
        'fixes = ["float_outputs"]',
        "sensitivity = true",
        "max_drop = 0",
        'revert = "int16"',
        "[quantize.reconstruct]",
        "[quantize.qat]",
    ],
)
def test_a_key_that_the_mode_would_ignore_is_an_error_that_says_which_modes_take_it(
    model: Path, tiny_data: Path, tmp_path: Path, mode: str, wish: str
) -> None:
    key = wish.strip("[]").removeprefix("quantize.").split(" ")[0]
    result = run("deploy", recipe(tmp_path, tiny_data, mode, more=wish), "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    said = f'quantize.{key}: mode "{mode}" would ignore it; accepted: nothing here, or mode = "static" or "int16"'
    assert said in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "wish", "key"),
    [
        ("float16", "per_tensor = true", "quantize.per_tensor"),
        ("none", 'weights = "shared"', "quantize.weights"),
        ("dynamic", '[targets.tflite]\nweights = "unsigned"', "targets.tflite.weights"),
        ("int16", '[targets.tflite]\nweights = "pair_limited"', "targets.tflite.weights"),
        ("none", '[[quantize.override]]\npattern = "stem"\nint16 = true', "quantize.override: 'stem'"),
    ],
)
def test_wishes_of_weights_and_tensors_are_not_ignored_either(  # noqa: PLR0917 - three are parameters of the case
    model: Path, tiny_data: Path, tmp_path: Path, mode: str, wish: str, key: str
) -> None:
    result = run("deploy", recipe(tmp_path, tiny_data, mode, more=wish), "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert key in result.output
    assert f'mode "{mode}"' in result.output or f"mode {mode!r}" in result.output


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("[quantize.reconstruct]\nsweeps = 2", "quantize.reconstruct: nothing is reconstructed with refine = "),
        ('revert = "int16"', "quantize.revert: nothing is reverted without a limit; accepted: beside max_drop, "),
    ],
)
def test_a_key_that_changes_nothing_without_another_is_an_error(
    model: Path, tiny_data: Path, tmp_path: Path, wish: str, said: str
) -> None:
    result = run("deploy", recipe(tmp_path, tiny_data, "static", more=wish), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_what_asks_for_nothing_is_taken_in_every_mode(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    nothing = 'refine = []\nfixes = []\nsensitivity = false\nper_tensor = false\nweights = "auto"\nscheme = "default"'
    path = recipe(tmp_path, tiny_data, "float16", more=nothing)
    assert run("deploy", path, "--out", tmp_path / "run", "--to", "quantize").exit_code == 0


@pytest.mark.parametrize(
    ("mode", "option", "accepted"),
    [
        ("dynamic", "--algorithm=minmax", "static, int16"),
        ("float16", "--refine=gptq", "static, int16"),
        ("float16", "--per-tensor", "static, int16, dynamic"),
        ("float16", "--weights=full", "static, int16, dynamic"),
    ],
)
def test_the_command_refuses_options_that_the_mode_would_ignore(
    model: Path, tmp_path: Path, mode: str, option: str, accepted: str
) -> None:
    result = run("quantize", model, "-o", tmp_path / "x.onnx", "--mode", mode, option)
    assert result.exit_code == 2
    assert f"--mode {mode} would ignore {option.split('=', maxsplit=1)[0]}; accepted with {accepted}" in result.output
    assert not (tmp_path / "x.onnx").exists()


def test_no_refinement_beside_others_is_refused(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    both = ["--refine", "none", "--refine", "gptq"]
    result = run("quantize", model, "-o", tmp_path / "x.onnx", "--data", tiny_data, *both)
    assert result.exit_code == 2
    assert "--refine none beside --refine gptq; accepted: none alone, or without it" in result.output
    assert not (tmp_path / "x.onnx").exists()


def test_without_calibration_data_static_says_what_is_missing(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = run("deploy", recipe(tmp_path, tiny_data, "static"), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "data.calibration is not set" in result.output


def test_two_runs_of_a_mode_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("quantize", model, "-o", tmp_path / f"{name}.onnx", "--mode", "dynamic").exit_code == 0
    assert np.array_equal(
        np.frombuffer((tmp_path / "a.onnx").read_bytes(), np.uint8),
        np.frombuffer((tmp_path / "b.onnx").read_bytes(), np.uint8),
    )
