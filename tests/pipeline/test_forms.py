"""A target's own form of the one plan: uint8 weights, kinds of layers in float, or what a measurement found fastest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.pipeline import machine
from edgeship.pipeline.machine import Cpu
from edgeship.pipeline.quantizing import auto
from edgeship.pipeline.quantizing.auto import possible_forms
from edgeship.pipeline.quantizing.calibrated import Quantized, quantize_model
from edgeship.pipeline.quantizing.forms import Form, islands, kinds_in, make
from edgeship.targets.base import ConvertOptions, load
from edgeship.targets.onnxruntime import OnnxSession, open_reference
from projects import run, write_project

Array = np.ndarray[Any, np.dtype[Any]]


class Shot:
    def __init__(self, name: str, feeds: Mapping[str, Array]) -> None:
        self.name, self.feeds = name, feeds


@pytest.fixture(scope="module")
def quantized(tiny_models: dict[str, bytes], tiny_images: Array) -> Quantized:
    model = ir.from_proto(onnx.load_model_from_string(tiny_models["depthwise"]))
    shots = [Shot(str(i), {"image": image[np.newaxis]}) for i, image in enumerate(tiny_images[:8])]
    return quantize_model(model, shots, [load("onnxruntime").rules])


def test_unsigned_weights_are_the_same_numbers(quantized: Quantized, tiny_images: Array, tmp_path: Path) -> None:
    _, model = make(quantized.calibration, Form("unsigned"), "onnxruntime")
    target = load("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(target.convert(model, ConvertOptions()))
    weights = [i for i in onnx.load(path).graph.initializer if i.name.endswith("_weight__q")]
    assert weights
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.UINT8}
    assert target.integer_share(path).share == 1.0
    reference, artifact = open_reference(to_bytes(quantized.models["full"])), OnnxSession(path)
    step = float(quantized.plan.activations["logits"].scale)
    for image in tiny_images[:8]:
        feeds = {"image": image[np.newaxis]}
        difference = np.abs(artifact.run(feeds)["logits"] - reference.run(feeds)["logits"]).max()
        assert difference <= 1.01 * step


def test_kinds_of_layers_stay_float_and_say_for_whom(quantized: Quantized) -> None:
    assert kinds_in(quantized.calibration.model, quantized.plan) == {
        "conv": ["Conv_stem"],
        "depthwise": ["Conv_depthwise"],
        "pointwise": ["Conv_pointwise"],
        "matmul": ["Gemm_logits"],
    }
    plan, _ = make(quantized.calibration, Form("full", ("depthwise",)), "onnxruntime")
    assert "Conv_depthwise" not in plan.int8_nodes
    assert "Conv_pointwise" in plan.int8_nodes
    for name, params in plan.activations.items():
        assert params.same_as(quantized.plan.activations[name])  # integers are the same wherever both have them
    assert islands(Form("full"), ["conv"]) == []
    assert islands(Form("full"), ["conv", "matmul"]) == [Form("full", ("conv",)), Form("full", ("matmul",))]


@pytest.mark.parametrize(
    ("features", "forms", "excluded"),
    [
        (("avx2",), ["pair_limited", "unsigned"], {"full"}),
        (("avx2", "avx512_vnni"), ["pair_limited", "unsigned", "full"], set()),
    ],
)
def test_forms_that_the_cpu_clips_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], forms: list[str], excluded: set[str]
) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: Cpu("a CPU", "x86_64", 2, features))
    possible, why = possible_forms(load("onnxruntime").forms)
    assert [form.weights for form in possible] == forms
    assert set(why) == excluded
    assert [form.weights for form in possible_forms(load("tflite").forms)[0]] == ["full"]


MORE = """
[quantize]
scheme = "auto"
[targets.onnxruntime]
[gates]
"parity.max_steps" = 2
[benchmark]
runs = 4
warmup = 1
[parity]
samples = 4
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path) -> Path:
    return write_project(tmp_path, tiny_models["depthwise"], tiny_data, MORE)


def times(by_name: Mapping[str, float]) -> Callable[..., dict[str, tuple[float, bool]]]:
    """Stands for the clock: what a machine would measure by the name of the form."""
    return lambda _context, _target, paths: {name: (by_name.get(name, 9.0), False) for name in paths}


def decided(folder: Path) -> dict[str, Any]:
    plan = json.loads((folder / "4-quantize/plan.json").read_text())
    return dict(plan["scheme"]["targets"]["onnxruntime"])


def test_the_fastest_form_that_meets_the_gates_is_kept_and_the_others_say_why_they_lost(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu", lambda: Cpu("a CPU", "x86_64", 2, ("avx2", "avx512_vnni")))
    measured = {"fp32": 3.0, "full weights": 1.0, "unsigned weights": 1.8, "pair_limited weights": 2.0}
    islands_ms = {"full weights, depthwise in float": 0.8, "unsigned weights, depthwise in float": 1.2}
    monkeypatch.setattr(auto, "measure_artifacts", times({**measured, **islands_ms}))
    result = run("deploy", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    chosen = decided(tmp_path / "run")
    lost = {each["form"]: each["lost"] for each in chosen["tried"]}
    assert "max_saturated_layers" in lost["full weights"]  # the fastest clips on other machines
    assert lost["pair_limited weights"].startswith("slower: 1.67 times")
    assert chosen["chosen"] == "unsigned weights, depthwise in float"
    assert lost[chosen["chosen"]] == ""
    assert chosen["pin"] == '[targets.onnxruntime] weights = "unsigned", keep_float = ["depthwise"]'
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["targets"]["onnxruntime"]["weights"] == "unsigned"
    assert report["quantization"]["measured"]["scheme"]["onnxruntime"][0]["name"] == "fp32"


def test_a_decision_is_kept_though_the_clock_says_something_else_now(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "measure_artifacts", times({"unsigned weights": 1.0}))
    assert run("deploy", recipe, "--out", tmp_path / "run", "--to", "convert").exit_code == 0
    first = (tmp_path / "run/5-convert/onnxruntime/model.onnx").read_bytes()
    monkeypatch.setattr(auto, "measure_artifacts", times({"pair_limited weights": 1.0}))
    again = run("deploy", recipe, "--out", tmp_path / "run", "--to", "convert", "--from", "quantize")
    assert again.exit_code == 0, again.output
    assert decided(tmp_path / "run")["weights"] == "unsigned"
    assert (tmp_path / "run/5-convert/onnxruntime/model.onnx").read_bytes() == first


def test_where_no_form_meets_the_gates_each_says_what_it_missed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "measure_artifacts", times({}))
    result = run("deploy", recipe, "--out", tmp_path / "run", "--set", "gates.size.max_bytes=10")
    assert result.exit_code == 1
    assert 'quantize.scheme = "auto": no form meets the gates on onnxruntime' in result.output
    assert "size.max_bytes is" in result.output


def test_forms_are_held_to_every_gate_on_accuracy_with_the_figures_of_the_report(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "measure_artifacts", times({"full weights": 1.0}))
    limits = {"max_drop": 99.0, "min_top1": 0.0, "min_agreement": 0.1, "min_sqnr": 3.0}
    gates = "{" + ", ".join(f'"accuracy.{name}" = {limit}' for name, limit in limits.items()) + "}"
    result = run("deploy", recipe, "--out", tmp_path / "run", "--set", f"gates={gates}")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run/report.json").read_text())
    found = {gate["name"]: gate["measured"] for gate in report["targets"]["onnxruntime"]["gates"]}
    tight = gates.replace("3.0", str(found["accuracy.min_sqnr"] + 1000))
    missed = run("deploy", recipe, "--out", tmp_path / "run", "--set", f"gates={tight}")
    assert missed.exit_code == 1
    assert f"accuracy.min_sqnr is {found['accuracy.min_sqnr']:.4g}" in missed.output


def test_the_real_clock_decides_too(recipe: Path, tmp_path: Path) -> None:
    result = run("deploy", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert decided(tmp_path / "run")["tried"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["quantize.scheme=fast"], "quantize.scheme: seen \"fast\"; accepted: 'default' or 'auto'"),
        (["quantize.mode=float16"], 'quantize.scheme: "auto" chooses among forms of mode "static"'),
        (["targets.onnxruntime.weights=u8"], "targets.onnxruntime.weights: seen"),
        (['targets.onnxruntime.keep_float=["conf"]'], "targets.onnxruntime.keep_float"),
        (
            ["quantize.mode=dynamic", "quantize.scheme=default", 'targets.onnxruntime.keep_float=["conv"]'],
            'mode "dynamic" has no integer activations',
        ),
        (
            ["targets.tflite.weights=unsigned"],
            "targets.tflite.weights: this target has no kernels for unsigned weights",
        ),
    ],
)
def test_wrong_forms_are_recipe_errors(recipe: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    more = [word for setting in settings for word in ("--set", setting)]
    result = run("deploy", recipe, "--out", tmp_path / "run", *more)
    assert result.exit_code == 2, result.output
    assert message in result.output
