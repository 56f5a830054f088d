"""The first command of the README: the digits network becomes checked artifacts for both targets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EDGESHIP = Path(sys.executable).parent / "edgeship"
TARGETS = ("onnxruntime", "tflite")
STAGES = ("export", "simplify", "quantize", "convert", "parity", "accuracy", "latency", "release")
FEW_RUNS = ("--set", "benchmark.runs=20")

pytestmark = pytest.mark.xdist_group("digits")


@dataclass(frozen=True)
class Deployment:
    """A finished run: its recipe, its folder and what it printed."""

    recipe: Path
    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return found

    def again(self, *options: str) -> subprocess.CompletedProcess[str]:
        return edgeship("deploy", str(self.recipe), "--out", str(self.folder), *options)


def edgeship(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(EDGESHIP), *arguments], capture_output=True, text=True, check=False, timeout=300)


def deploy(folder: Path, *options: str) -> Deployment:
    """A run on a copy of the example, as a user would have it anywhere."""
    example = folder / "digits"
    shutil.copytree(ROOT / "examples" / "digits", example, ignore=shutil.ignore_patterns("__pycache__"))
    recipe, out = example / "recipe.toml", folder / "run"
    done = edgeship("deploy", str(recipe), "--out", str(out), *FEW_RUNS, *options)
    assert done.returncode == 0, done.stderr
    return Deployment(recipe, out, done)


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return deploy(tmp_path_factory.mktemp("first"))


def test_the_report_has_every_key_of_the_contract(deployment: Deployment) -> None:
    report = deployment.report
    assert set(report) >= {"edgeship", "recipe", "model", "stages", "reference", "targets"}
    assert set(report["model"]) >= {"name", "parameters", "macs"}
    assert tuple(stage["name"] for stage in report["stages"]) == STAGES
    for stage in report["stages"]:
        assert set(stage) >= {"name", "seconds", "cached", "outputs"}
        assert all(set(output) >= {"path", "sha256", "bytes"} for output in stage["outputs"])
    assert set(report["reference"]["accuracy"]) >= {"top1", "n"}
    assert set(report["targets"]) == set(TARGETS)
    for target in report["targets"].values():
        assert set(target) >= {"artifact", "sha256", "bytes", "int8_share", "parity", "accuracy", "latency", "gates"}
        assert set(target["parity"]) >= {"reference", "samples", "max_steps", "mean_steps", "agreement"}
        assert set(target["accuracy"]) >= {"top1", "top5", "n", "drop"}
        latency = {"threads", "runs", "median_ms", "p90_ms", "fp32_median_ms", "speedup", "noisy"}
        assert set(target["latency"]) >= latency
        assert all(set(gate) >= {"name", "limit", "measured", "met"} for gate in target["gates"])


def test_paths_in_the_report_are_relative_and_there(deployment: Deployment) -> None:
    outputs = [output for stage in deployment.report["stages"] for output in stage["outputs"]]
    artifacts = [{"path": t["artifact"], **t} for t in deployment.report["targets"].values()]
    for entry in [*outputs, *artifacts]:
        content = (deployment.folder / entry["path"]).read_bytes()
        assert not Path(entry["path"]).is_absolute()
        assert (sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"])


@pytest.mark.parametrize("name", TARGETS)
def test_the_artifact_is_int8_exact_and_as_good_as_fp32(deployment: Deployment, name: str) -> None:
    target = deployment.report["targets"][name]
    assert target["int8_share"] == 1.0
    assert target["parity"]["max_steps"] <= 2
    assert target["parity"]["agreement"] >= 0.995
    assert target["accuracy"]["n"] == 400
    assert target["accuracy"]["drop"] <= 1.0
    assert {gate["name"] for gate in target["gates"]} >= {"accuracy.max_drop", "parity.max_steps"}
    assert all(gate["met"] for gate in target["gates"])


def test_the_float_network_is_as_good_as_its_readme_says(deployment: Deployment) -> None:
    assert (
        deployment.report["reference"]["accuracy"] | {"top1": 99.75, "n": 400}
        == deployment.report["reference"]["accuracy"]
    )


def test_the_summary_names_targets_and_artifacts(deployment: Deployment) -> None:
    for name in TARGETS:
        assert name in deployment.done.stdout
    assert "9-release" in deployment.done.stdout


def test_a_second_run_repeats_nothing(deployment: Deployment) -> None:
    before = {path: path.stat().st_mtime_ns for path in deployment.folder.glob("9-release/**/*")}
    done = deployment.again(*FEW_RUNS, "--json")
    assert done.returncode == 0, done.stderr
    assert all(stage["cached"] for stage in json.loads(done.stdout)["stages"])
    assert {path: path.stat().st_mtime_ns for path in deployment.folder.glob("9-release/**/*")} == before


def test_two_runs_in_two_folders_give_the_same_bytes(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = deploy(tmp_path_factory.mktemp("second"))
    patterns = ("2-export/*", "3-simplify/*.onnx", "4-quantize/*", "5-convert/**/*.onnx", "5-convert/**/*.tflite")
    files = [
        path.relative_to(deployment.folder)
        for pattern in patterns
        for path in deployment.folder.glob(pattern)
        if path.suffix in {".onnx", ".tflite", ".npz"}
    ]
    assert len(files) >= 8
    different = [str(f) for f in files if (deployment.folder / f).read_bytes() != (other.folder / f).read_bytes()]
    assert not different


def test_the_release_verifies_and_a_changed_byte_is_found(deployment: Deployment, tmp_path: Path) -> None:
    release = tmp_path / "release"
    shutil.copytree(deployment.folder / "9-release", release)
    assert edgeship("verify", str(release)).returncode == 0
    artifact = next(release.rglob("*.tflite"))
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"\x55")
    done = edgeship("verify", str(release))
    assert done.returncode == 1
    assert artifact.name in done.stderr


def test_a_gate_that_is_not_met_keeps_the_artifacts_but_makes_no_release(
    deployment: Deployment, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(deployment.folder, folder)
    options = ("--out", str(folder), *FEW_RUNS, "--set", "gates.size.max_bytes=1000")
    done = edgeship("deploy", str(deployment.recipe), *options)
    assert done.returncode == 3
    assert "size.max_bytes" in done.stderr.strip().splitlines()[-1]
    assert not (folder / "9-release" / "manifest.json").exists()
    assert list((folder / "5-convert").rglob("*.tflite"))


def test_one_target_alone_gets_the_same_artifact(deployment: Deployment, tmp_path: Path) -> None:
    done = edgeship(
        "deploy", str(deployment.recipe), "--out", str(tmp_path / "run"), "--target", "tflite", *FEW_RUNS, "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["targets"]) == {"tflite"}
    assert report["targets"]["tflite"]["sha256"] == deployment.report["targets"]["tflite"]["sha256"]
