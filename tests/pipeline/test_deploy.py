"""One command from a model to a release: the same bytes every time, through kills, interrupts and wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from edgeship.calibration.types import Array
from edgeship.pipeline.report import RENDERED, REPORT
from edgeship.pipeline.workspace import INTERNAL, Workspace
from projects import run, write_project

MEASURED = {"8-latency/latency.json", REPORT, *RENDERED}
MORE = """
evaluation = "tiny.npz"
[quantize]
samples = 16
[targets.onnxruntime]
[targets.tflite]
[gates]
"parity.max_steps" = 2
"int8_share.min" = 1.0
[benchmark]
runs = 4
warmup = 1
[parity]
samples = 8
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, bytes], tiny_data: Path) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny_models["plain"], tiny_data, MORE)


def deploy(recipe: Path, out: Path, *more: str) -> Result:
    return run("deploy", recipe, "--out", out, *more)


def start(recipe: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgeship.pipeline.cli", "deploy", str(recipe), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a run that must be the same in every run."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith(INTERNAL) and name not in MEASURED
    }


@pytest.fixture(scope="module")
def deployed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing disturbed; tests that change it copy it."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    result = deploy(recipe, out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def run_copy(deployed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deployed, tmp_path / "run"))


def test_a_run_leaves_what_the_contract_says(deployed: Path) -> None:
    folders = sorted(path.name for path in deployed.iterdir() if path.is_dir())
    assert folders == [
        *(INTERNAL, "2-export", "3-simplify", "4-quantize", "5-convert", "6-parity", "7-accuracy", "8-latency"),
        "9-release",
    ]
    assert sorted(path.name for path in (deployed / "9-release").iterdir()) == [
        *("MODEL_CARD.md", "SHA256SUMS", "manifest.json", "model.onnx", "model.tflite", "sbom.cdx.json"),
    ]
    report = json.loads((deployed / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]][-1] == "release"
    for name in ("onnxruntime", "tflite"):
        facts = report["targets"][name]
        assert (deployed / facts["artifact"]).stat().st_size == facts["bytes"]
        assert facts["int8_share"] == 1.0
        assert facts["parity"]["max_steps"] <= 2
        assert facts["parity"]["samples"] == 8
        assert facts["accuracy"]["n"] == 32
        assert {"top1", "top5", "drop"} <= set(facts["accuracy"])
        assert facts["latency"]["runs"] == 4
        assert all(gate["met"] for gate in facts["gates"])
    assert report["reference"]["accuracy"]["n"] == 32
    assert report["model"]["macs"] > 0
    assert str(deployed) not in json.dumps(report)


def test_the_card_says_how_each_artifact_wants_its_input(deployed: Path) -> None:
    card = (deployed / "9-release" / "MODEL_CARD.md").read_text()
    assert "- input of model.onnx: image: float 1 x 3 x 12 x 12" in card
    assert "- input of model.tflite: image: float32 1 x 12 x 12 x 3" in card


def test_the_same_recipe_gives_the_same_bytes_in_another_folder(
    deployed: Path, tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path
) -> None:
    elsewhere = write_project(tmp_path / "elsewhere" / "deeper", tiny_models["plain"], tiny_data, MORE)
    result = deploy(elsewhere, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "run") == files(deployed)


def test_neither_places_nor_times_are_in_the_release(deployed: Path, recipe: Path) -> None:
    text = (deployed / "9-release" / "manifest.json").read_text()
    for secret in (str(deployed), str(recipe.parent), os.uname().nodename, time.strftime("%Y-%m-%d")):
        assert secret not in text


def test_a_second_run_uses_everything_and_changes_nothing(recipe: Path, run_copy: Path) -> None:
    before = files(run_copy)
    result = deploy(recipe, run_copy, "--json")
    report = json.loads(result.stdout)
    assert all(stage["cached"] for stage in report["stages"])
    assert files(run_copy) == before


def test_json_is_one_document_and_the_summary_names_the_artifacts(recipe: Path, run_copy: Path) -> None:
    assert json.loads(deploy(recipe, run_copy, "--json").stdout)["recipe"] == "tiny"
    summary = deploy(recipe, run_copy)
    for word in ("onnxruntime", "tflite", "top-1", "steps", "100 % of MACs", "met parity.max_steps", "9-release"):
        assert word in summary.stdout
    assert "up to date" in summary.stderr


def test_verify_takes_the_release_and_finds_a_changed_bit(deployed: Path, run_copy: Path) -> None:
    assert run("verify", deployed / "9-release").exit_code == 0
    artifact = run_copy / "9-release" / "model.tflite"
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(bytes(content))
    result = run("verify", run_copy / "9-release")
    assert result.exit_code == 1
    assert "model.tflite: the file was changed" in result.stderr
    assert "is not as released: 1 problem" in last_line(result.stderr)


def test_one_target_can_be_built_alone_from_the_same_plan(recipe: Path, run_copy: Path, deployed: Path) -> None:
    result = deploy(recipe, run_copy, "--target", "tflite", "--json")
    report = json.loads(result.stdout)
    assert list(report["targets"]) == ["tflite"]
    cached = {stage["name"]: stage["cached"] for stage in report["stages"]}
    assert cached["quantize"]
    assert not cached["convert"]
    assert (run_copy / "9-release/model.tflite").read_bytes() == (deployed / "9-release/model.tflite").read_bytes()


def test_a_gate_that_is_not_met_exits_with_3_and_leaves_no_release(recipe: Path, run_copy: Path) -> None:
    result = deploy(recipe, run_copy, "--set", "gates.latency.max_median_ms=0")
    assert result.exit_code == 3
    assert "no release was made" in last_line(result.stderr)
    assert "latency.max_median_ms" in last_line(result.stderr)
    assert "NOT MET" in result.stdout
    assert not (run_copy / "9-release").exists()
    assert (run_copy / "5-convert" / "tflite" / "model.tflite").exists()
    report = json.loads((run_copy / "report.json").read_text())
    assert report["targets"]["tflite"]["artifact"] == "5-convert/tflite/model.tflite"
    assert not report["targets"]["tflite"]["gates"][-1]["met"] or not all(
        gate["met"] for gate in report["targets"]["tflite"]["gates"]
    )


def test_gates_count_before_the_release_too(recipe: Path, run_copy: Path) -> None:
    result = deploy(recipe, run_copy, "--to", "convert", "--set", "gates.size.max_bytes=10")
    assert result.exit_code == 3
    assert "size.max_bytes" in last_line(result.stderr)


def test_full_weights_for_onnxruntime_are_caught_by_parity(
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path
) -> None:
    """The tiny model's random weights have pairs that can overflow 16 bits; whether one does depends on the data."""
    recipe = write_project(tmp_path, tiny_models["plain"], tiny_data, MORE)
    out = tmp_path / "run"
    deploy(recipe, out, "--set", "quantize.weights=full", "--target", "onnxruntime", "--to", "parity")
    saturation = json.loads((out / "6-parity/parity.json").read_text())["targets"]["onnxruntime"]["saturation"]
    assert saturation["layers"]
    assert {"layer", "channels", "pairs", "clipped", "sums"} == set(saturation["layers"][0])
    deploy(recipe, out, "--target", "onnxruntime", "--to", "parity")
    saturation = json.loads((out / "6-parity/parity.json").read_text())["targets"]["onnxruntime"]["saturation"]
    assert saturation == {"layers": [], "layers_clipping": 0, "samples": 8}


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"the run ended before {path.name} was there: {process.returncode}\n{out}\n{err}")
        if time.monotonic() > deadline:
            process.kill()
            process.communicate()
            pytest.fail(f"{path.name} was never there")
        time.sleep(0.002)


def test_killed_at_many_points_the_result_is_that_of_an_undisturbed_run(
    recipe: Path, deployed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    internal = out / INTERNAL
    for place in (
        *(internal / "tmp-simplify", internal / "tmp-quantize", out / "5-convert", internal / "tmp-latency"),
        internal / "tmp-release",
    ):
        process = start(recipe, out)
        wait_for(place, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(recipe, out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert files(out) == files(deployed)
    assert sorted(path.name for path in internal.iterdir() if "-" in path.name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["simplify", "latency"])
def test_an_interrupt_exits_with_130_and_leaves_nothing_half_written(
    recipe: Path, run_copy: Path, number: signal.Signals, stage: str
) -> None:
    before = files(run_copy)
    process = start(recipe, run_copy, "--from", stage)
    wait_for(run_copy / INTERNAL / f"tmp-{stage}", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert last_line(err).startswith("edgeship: interrupted")
    assert "Traceback" not in err
    assert files(run_copy) == before
    assert not list((run_copy / INTERNAL).glob("tmp-*"))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    with Workspace(tmp_path / "run").held() as workspace:
        yield workspace.folder


def test_two_runs_on_one_folder_are_refused(recipe: Path, held: Path) -> None:
    process = start(recipe, held)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert last_line(err).startswith("edgeship: another run is using ")
    assert out == ""


def test_an_output_folder_that_cannot_be_made_is_an_input_error(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = deploy(recipe, tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert "cannot be written to" in last_line(result.stderr)


def test_a_target_the_recipe_does_not_have_is_named(recipe: Path, tmp_path: Path) -> None:
    result = deploy(recipe, tmp_path / "run", "--target", "tflight")
    assert result.exit_code == 2
    assert "did you mean 'tflite'?" in last_line(result.stderr)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.onnx", b"nonsense"), ("model.onnx", b""), ("tiny.npz", b"PK\x03\x04nonsense"), ("tiny.npz", None)],
)
def test_damaged_input_is_one_sentence_and_no_release(
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path, name: str, content: bytes | None
) -> None:
    recipe = write_project(tmp_path, tiny_models["plain"], tiny_data, MORE)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    result = deploy(recipe, tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert name in last_line(result.stderr)
    assert not list((tmp_path / "run").glob("[1-9]-*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_in_the_data_are_named(
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path, tiny_images: Array, bad: float
) -> None:
    recipe = write_project(tmp_path, tiny_models["plain"], tiny_data, MORE)
    images = tiny_images.copy()
    images[3, 0, 0, 0] = bad
    np.savez(tmp_path / "tiny.npz", image=images)
    result = deploy(recipe, tmp_path / "run", "--set", "quantize.samples=32", "--set", "golden.samples=1")
    assert result.exit_code in (1, 2), result.output
    assert "edgeship: " in last_line(result.stderr)
    assert "unexpected" not in last_line(result.stderr)
