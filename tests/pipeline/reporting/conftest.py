"""Run folders to report of: complete ones with every record, made of plain JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeship.calibration.values.silhouette import Silhouette
from edgeship.pipeline.reporting.run_folder import Run, open_run


def records(name: str = "conv_1") -> dict[str, Any]:
    """The stages' records by path; `name` is what a tensor is called."""
    rng = np.random.default_rng(0)
    silhouette = Silhouette()
    silhouette.update(rng.normal(0, 1, 5000).astype(np.float32))
    times = [int(ns) for ns in rng.normal(1e6, 1e4, 200)]
    layer = {"name": name, "operator": "Conv", "max_steps": 2.0, "mean_steps": 0.1, "sqnr_db": None}
    return {
        "4-quantize/plan.json": {
            "activations": {name: {"range": [-2.0, 2.0], "scale": 4 / 255}},
            "findings": [f"{name}: odd; seen: 1"],
            "stays_float": {name: "its output is an index"},
        },
        "4-quantize/histograms.json": {name: silhouette.to_json(), "logits": silhouette.to_json()},
        "6-parity/parity.json": {"targets": {"tflite": {"layers": [{**layer, "own": {"max_steps": 1.0}}]}}},
        "8-latency/latency.json": {
            "targets": {
                "tflite": {
                    "profile": [{"name": name, "operator": "CONV_2D", "us": 500.0}],
                    "int8": {"nanoseconds": times},
                    "fp32": {"nanoseconds": [2 * ns for ns in times]},
                }
            }
        },
        "9-release/manifest.json": {"inputs": {"model": "ab" * 32}, "versions": {"onnx": "1.23.2"}},
    }


def report(outputs: dict[str, bytes], name: str = "digits", gate: str = "parity.max_steps") -> dict[str, Any]:
    """A report.json whose stages made `outputs`."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for path, content in outputs.items():
        digest = {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        stages.setdefault(path.split("/")[0].split("-")[1], []).append(digest)
    accuracy = {
        "top1": 99.0,
        "top5": 100.0,
        "n": 400,
        "drop": 0.5,
        "drop_interval": [-0.5, 1.5],
        "fp32_agreement": 0.99,
    }
    return {
        "edgeship": "0.1.0",
        "recipe": name,
        "model": {"name": name, "parameters": 22442, "macs": 5_687_936},
        "stages": [{"name": stage, "seconds": 1.5, "cached": False, "outputs": made} for stage, made in stages.items()],
        "reference": {"accuracy": {"top1": 99.5, "n": 400, "interval": [98.0, 99.9]}, "data": "evaluation"},
        "quantization": {"data": {"findings": [{"where": name, "rule": "odd", "seen": "1", "accepted": ""}]}},
        "machine": {"cpu": {"model": name}},
        "targets": {
            "tflite": {
                "artifact": "9-release/model.tflite",
                "sha256": "cd" * 32,
                "bytes": 30_000,
                "fp32_bytes": 92_000,
                "int8_share": 1.0,
                "float_layers": [],
                "parity": {"max_steps": 1.0, "mean_steps": 0.01, "agreement": 1.0},
                "accuracy": {**accuracy, "interval": [97.5, 99.7]},
                "latency": {"threads": 1, "median_ms": 1.0, "fp32_median_ms": 2.0, "speedup": 2.0, "noisy": True},
                "gates": [
                    {"name": gate, "limit": 2.0, "measured": 1.0, "met": True},
                    {"name": "accuracy.max_drop", "limit": 0.1, "measured": 0.5, "met": False},
                    {"name": "accuracy.min_top1", "limit": 90.0, "measured": None, "met": False},
                ],
            }
        },
    }


def write_run(folder: Path, name: str = "digits", tensor: str = "conv_1", gate: str = "parity.max_steps") -> Path:
    """A run folder."""
    outputs = {path: json.dumps(value).encode() for path, value in records(tensor).items()}
    for path, content in outputs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "report.json").write_text(json.dumps(report(outputs, name, gate)))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with every record there is."""
    return write_run(tmp_path / "run")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """The run of a folder with names of the caller's choice."""
    return lambda **names: open_run(write_run(tmp_path / "named", **names))


@pytest.fixture
def plain_report() -> dict[str, Any]:
    """What report.json holds."""
    return report({})
