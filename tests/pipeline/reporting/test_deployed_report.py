"""What `deploy` and `report` leave in a run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgeship.calibration.types import Array
from edgeship.pipeline.report import RENDERED
from projects import run, write_project

MORE = """
evaluation = "tiny.npz"
[targets.onnxruntime]
[gates]
"parity.max_steps" = 2
[parity]
layers = 2
[benchmark]
profile = true
runs = 4
warmup = 0
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path) -> Path:
    return write_project(tmp_path, tiny_models["plain"], tiny_data, MORE)


def timeless(html: str) -> str:
    return re.sub(r"<time.*?</time>", "", html)


def test_a_deployment_has_its_pages_and_they_can_be_made_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("deploy", recipe, "--out", out, "--set", "quantize.samples=16")
    assert result.exit_code == 0, result.output
    assert "report.html" in result.stdout
    before = {name: (out / name).read_text() for name in RENDERED}
    assert "edgeship deploy recipe.toml --target onnxruntime --set quantize.samples=16" in before["report.html"]
    assert "All gates met" in before["report.html"]
    assert "Error of each layer: onnxruntime" in before["report.html"]
    assert "Operators of onnxruntime" in before["report.html"]
    assert json.loads(run("report", out, "--json").stdout)["files"] == [(out / name).as_posix() for name in RENDERED]
    assert {name: (out / name).read_text() for name in RENDERED} == before
    assert run("report", out / "report.json", "-o", tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").read_text() == before["report.html"]
    again = run("deploy", recipe, "--out", out, "--set", "quantize.samples=16")
    assert again.exit_code == 0
    kept = timeless((out / "report.html").read_text()).replace(" (kept)", "")
    assert kept == timeless(before["report.html"])
    wrong = run("report", out, "-o", tmp_path / "page.pdf")
    assert wrong.exit_code == 2
    assert "a report is written as .html, .md, .xml" in wrong.stderr


def test_a_run_that_fails_half_way_says_so_on_its_page(recipe: Path, tmp_path: Path, tiny_images: Array) -> None:
    out = tmp_path / "run"
    assert run("deploy", recipe, "--out", out, "--to", "quantize").exit_code == 0
    failing = run("deploy", recipe, "--out", out, "--set", "quantize.samples=1")
    assert failing.exit_code == 2
    assert not (out / "report.json").exists()
    page = (out / "report.html").read_text()
    assert "Run failed in quantize" in page
    assert "a single sample" in page
    assert "3-simplify/model.onnx" in page
    assert 'errors="1"' in (out / "junit.xml").read_text()
    assert "failed in quantize" in (out / "report.md").read_text()
    assert run("report", out, "-o", tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").read_text() == page


def test_a_gate_that_is_not_met_is_on_the_page(recipe: Path, tmp_path: Path) -> None:
    result = run("deploy", recipe, "--out", tmp_path / "run", "--set", 'gates={"size.max_bytes"=1}')
    assert result.exit_code == 3
    assert "1 of 1 gate not met" in (tmp_path / "run/report.html").read_text()
    assert 'failures="1"' in (tmp_path / "run/junit.xml").read_text()
