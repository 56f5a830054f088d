"""The recipes on real models deploy to both targets; needs EDGESHIP_DATA. Few samples: benchmarks have the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EDGESHIP = Path(sys.executable).parent / "edgeship"
RECIPES = sorted(path for path in (ROOT / "examples").glob("*/*.toml") if path.parent.name != "digits")
FEW = {"data.evaluation_samples": 60, "parity.samples": 30, "benchmark.runs": 10}
SHORT = {"data.training_samples": 256, "compress.training.epochs": 1, "compress.training.warmup_epochs": 0.0}


def test_there_are_recipes_on_real_models() -> None:
    assert {path.parent.name for path in RECIPES} >= {"mobilenet_v1", "cifar_resnet", "ultraface"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_recipe_deploys_in_integers_to_both_targets(path: Path, edgeship_data: Path, tmp_path: Path) -> None:
    values, recipe = dict(FEW), tomllib.loads(path.read_text())
    if "compress" in recipe:
        values |= SHORT
    if "accuracy.max_drop" in recipe.get("gates", {}):
        values["gates.accuracy.max_drop"] = 5  # three of 60 images; the recipe's own limit is for hundreds
    options = [option for key, value in values.items() for option in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [str(EDGESHIP), "deploy", str(path), "--out", str(tmp_path / "run"), *options, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "EDGESHIP_DATA": str(edgeship_data)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["targets"]) == {"onnxruntime", "tflite"}
    keeps_float = "min_agreement" in recipe["quantize"]
    wide = "wide_outputs" in recipe["quantize"].get("fixes", [])  # 256 steps of 16 bits are one of 8
    for target in report["targets"].values():
        assert target["int8_share"] >= recipe["gates"]["int8_share.min"]
        assert (target["int8_share"] < 1.0) == keeps_float
        assert target["parity"]["mean_steps"] < (0.5 * 256 if wide else 0.5)
        assert all(gate["met"] for gate in target["gates"])
