"""A wrong recipe is refused before anything runs: one sentence with the key, what was seen, what is accepted."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("samples = 8", "sampels = 8", "quantize.sampels: unknown key; did you mean 'samples'?"),
        ("samples = 8", 'samples = "many"', 'quantize.samples: seen "many"; accepted: integer'),
        ("samples = 8", 'algorithm = "minmix"', "minmax"),
        ("[targets.tflite]", "[targets.tflight]", "targets.tflight: unknown target; did you mean 'tflite'?"),
        ("[targets.tflite]", "[target.tflite]", "target: unknown key; did you mean 'targets'?"),
        ("[quantize]", '[gates]\n"parity.max_stesp" = 2\n[quantize]', "did you mean 'parity.max_steps'?"),
        ('name = "tiny"', 'name = "a/b"', 'name: seen "a/b"; accepted: at most 100 letters'),
        ('name = "tiny"', f'name = "{"x" * 101}"', "accepted: at most 100 letters"),
        ('"model.onnx"', '"model.onnx:build"', "names a factory in a file that is no Python code"),
        ('"model.onnx"', '"model.h5"', '"model.h5" names no factory; accepted: PATH.py:factory'),
        ('"model.onnx"', '"model.onnx"\nargs = {width = 8}', "model.args: model.onnx holds its own weights"),
        ('"model.onnx"', '"model.onnx"\nweights_key = "ema"', "model.weights_key: model.onnx holds its own weights"),
        ('"model.onnx"', '"m.py:build"\nweights_key = "ema"', "model.weights_key: there is no model.weights"),
        ('"model.onnx"', '"model.pth"', "PATH.py:factory, and this file as model.weights"),
        ('"model.onnx"', '"missing.onnx"', "there is no file"),
        ('name = "image"', "std = [1, 2, 3, 4]", "input.std: seen [1.0, 2.0, 3.0, 4.0]; accepted: one number, or 3"),
        ('calibration = "tiny.npz"', "", "data.calibration is not set"),
        ('"tiny.npz"', '""', "data.calibration"),
        ('"tiny.npz"', '"nowhere.npz"', "'nowhere.npz' does not exist"),
        ('"tiny.npz"', '"model.onnx"', "'model.onnx' is a file of another kind; accepted: a folder, .csv, .npz, .zip"),
        ("[targets.onnxruntime]", "[benchmark]\nruns = 10000000\n[targets.onnxruntime]", "benchmark.runs: seen"),
    ],
)
def test_a_wrong_entry_is_named_before_any_stage_runs(project: Any, old: str, new: str, sentence: str) -> None:
    project.set(old, new)
    refusal = project.refuse_deploy()
    assert refusal.code == 2
    assert sentence in refusal.sentence
    assert not (project.folder / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, "name = 'x'".encode("utf-16"), b"\x08\x0a\xff\xfe"])
def test_a_recipe_that_is_no_text_is_refused(project: Any, content: bytes) -> None:
    (project.folder / "recipe.toml").write_bytes(content)
    assert project.refuse_deploy().code == 2


def test_all_wrong_entries_are_listed_at_once(project: Any) -> None:
    project.set("samples = 8", "sampels = 8\nmode = 'int4'")
    refusal = project.refuse_deploy()
    assert "2 wrong entries" in refusal.sentence
    assert "quantize.sampels" in refusal.stderr
    assert "quantize.mode" in refusal.stderr


def test_an_empty_output_path_is_not_the_current_folder(project: Any) -> None:
    assert "the path is empty" in project.refuse("deploy", "recipe.toml", "--out", "").sentence


@pytest.mark.parametrize("out", ["model.onnx", "model.onnx/run", "/dev/null", "/proc/run"])
def test_an_output_folder_that_cannot_be_written_is_refused(project: Any, out: str) -> None:
    refusal = project.refuse("deploy", "recipe.toml", "--out", out)
    assert refusal.code == 2
    assert "cannot be written to" in refusal.sentence


def test_a_failing_run_leaves_no_report_of_an_earlier_one(project: Any) -> None:
    run = project.folder / "run"
    run.mkdir()
    (run / "report.json").write_text("{}")
    project.set("samples = 8", "samples = 1")
    refusal = project.refuse_deploy(kept=("2-export", "3-simplify"), gone=("run/report.json",))
    assert "a single sample" in refusal.sentence
