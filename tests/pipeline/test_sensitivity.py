"""What each layer costs is measured, and the dearest layers go back until the model costs no more than was allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgeship.calibration.errors import StageError
from edgeship.calibration.planning.overrides import Override
from edgeship.calibration.quantize import Calibration
from edgeship.calibration.refine import gptq
from edgeship.calibration.samples.data import Samples, open_samples
from edgeship.pipeline.quantizing.calibrated import Quantized, quantize_model
from edgeship.pipeline.quantizing.limits import Limits
from edgeship.pipeline.quantizing.mixed import Mixer, Revert
from edgeship.pipeline.quantizing.sensitivity import Cache, measure_layers, table
from edgeship.pipeline.quantizing.yardstick import Cost, Yardstick
from edgeship.targets.base import load
from edgeship.targets.onnxruntime import open_float, open_reference
from projects import run

Array = np.ndarray[Any, np.dtype[Any]]
SPOILED = ("Conv_inner_1", "Conv_inner_2")


@pytest.fixture(scope="module")
def spoiled(tiny_models: dict[str, bytes]) -> bytes:
    """A net that computes what `residual` does, with one channel between two layers that dwarfs the others."""
    model = onnx.load_model_from_string(tiny_models["residual"])
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("inner_1_weight", "inner_1_bias"):
            values[0] *= 300
        elif tensor.name == "inner_2_weight":
            values[:, 0] /= 300
            values *= 20
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def labelled(spoiled: bytes, tiny_images: Array, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny images with the classes that the float model decides for."""
    session = open_float(spoiled)
    labels = [int(session.run({"image": image[np.newaxis]})["logits"].argmax()) for image in tiny_images]
    path = tmp_path_factory.mktemp("labelled") / "tiny.npz"
    np.savez(path, image=tiny_images, label=np.array(labels))
    return path


@pytest.fixture(scope="module")
def samples(labelled: Path) -> Samples:
    return open_samples(labelled, shapes={"image": (1, 3, 12, 12)})


@pytest.fixture(scope="module")
def quantized(spoiled: bytes, samples: Samples) -> Quantized:
    model = ir.from_proto(onnx.load_model_from_string(spoiled))
    return quantize_model(model, samples, [load("onnxruntime").rules])


@pytest.fixture(scope="module")
def yardstick(spoiled: bytes, samples: Samples) -> Yardstick:
    return Yardstick(open_float(spoiled), samples)


def test_the_float_model_itself_costs_nothing(spoiled: bytes, yardstick: Yardstick) -> None:
    cost = yardstick.cost(open_float(spoiled))
    assert cost == Cost(
        drop=0.0, loss=0.0, noise=0.0, samples=32, top1=100.0, agreement=1.0
    )  # the labels are its own decisions
    assert yardstick.unit == "points of top-1"


def test_without_labels_other_decisions_are_counted(spoiled: bytes, tiny_images: Array, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", image=tiny_images)
    bare = Yardstick(open_float(spoiled), open_samples(tmp_path / "bare.npz", shapes={"image": (1, 3, 12, 12)}))
    assert bare.unit == "percent of other decisions"
    cost = bare.cost(open_float(spoiled))
    assert (cost.drop, cost.loss) == (0.0, None)


def test_the_spoiled_layers_are_the_dearest(quantized: Quantized, yardstick: Yardstick) -> None:
    costs = measure_layers(quantized.calibration.model, quantized.plan, yardstick, Cache(None), lambda *_: None)
    assert {each.layer for each in costs} == {"Conv_stem", *SPOILED, "Gemm_logits"}
    assert {each.layer for each in costs[:2]} == set(SPOILED)
    assert costs[0].cost.noise > 10 * costs[2].cost.noise
    assert table(costs, yardstick.unit).splitlines()[1].startswith(costs[0].layer)


def test_a_layer_measured_before_is_read_from_the_cache(
    quantized: Quantized, yardstick: Yardstick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure() -> Any:
        cache = Cache(tmp_path / "cache.json")
        return measure_layers(quantized.calibration.model, quantized.plan, yardstick, cache, lambda *_: None)

    first = measure()
    monkeypatch.setattr(yardstick, "cost", lambda _: pytest.fail("measured again"))
    assert measure() == first


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text('{"key": {"drop"')
    cost = Cost(None, None, 0.5, 1)
    assert Cache(tmp_path / "cache.json").get("key", lambda: cost) == cost
    assert Cache(tmp_path / "cache.json").get("key", lambda: Cost(None, None, 1.0, 2)) == cost


def mixer(limits: Limits, precision: Revert, yardstick: Yardstick) -> Mixer:
    return Mixer(limits, precision, "full", yardstick, Cache(None), lambda *_: None)


def test_the_dearest_layers_go_back_until_the_limit_is_met(quantized: Quantized, yardstick: Yardstick) -> None:
    def order(plan: Any) -> Any:
        return measure_layers(quantized.calibration.model, plan, yardstick, Cache(None), lambda *_: None)

    mixed = mixer(Limits(max_drop=3.2), "float", yardstick).meet(quantized.calibration, order)
    assert mixed.steps[0].cost.drop is not None
    assert mixed.steps[0].cost.drop > 3.2
    assert set(mixed.reverted) <= set(SPOILED)
    assert mixed.reverted
    final = mixed.calibration.plan()
    assert not set(mixed.reverted) & set(final.int8_nodes)
    session = open_reference(ir.to_proto(mixed.calibration.quantized(final)).SerializeToString())
    assert yardstick.cost(session) == mixed.steps[-1].cost
    assert mixed.steps[-1].cost.drop is not None
    assert mixed.steps[-1].cost.drop <= 3.2


def test_a_layer_that_goes_back_leaves_the_others_rounded_as_they_were(
    spoiled: bytes, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrated() -> Calibration:
        model = ir.from_proto(onnx.load_model_from_string(spoiled))
        return quantize_model(model, samples, [load("onnxruntime").rules]).calibration

    float_stem = [Override("Conv_stem", stays_float=True)]
    afresh = calibrated().with_overrides(float_stem).plan().digest()
    calibration = calibrated()
    monkeypatch.setattr(gptq, "feed_back", lambda *_, **__: pytest.fail("rounded again"))
    assert calibration.with_overrides(float_stem).plan().digest() == afresh
    with pytest.raises(pytest.fail.Exception, match="rounded again"):
        calibration.plan("pair_limited")


def test_nothing_is_measured_layer_by_layer_where_the_limit_is_met_at_once(
    quantized: Quantized, yardstick: Yardstick
) -> None:
    mixed = mixer(Limits(max_drop=100.0), "float", yardstick).meet(
        quantized.calibration, lambda _: pytest.fail("asked for")
    )
    assert mixed.reverted == []
    assert len(mixed.steps) == 1


def test_a_limit_that_cannot_be_met_is_an_error(quantized: Quantized, yardstick: Yardstick) -> None:
    costs = measure_layers(quantized.calibration.model, quantized.plan, yardstick, Cache(None), lambda *_: None)
    harmless = [each for each in costs if each.layer not in SPOILED]
    with pytest.raises(
        StageError,
        match=r"max_drop = 0 cannot be met: the drop is .* points of top-1, with 1 of 2 layers in float, on 32",
    ):
        mixer(Limits(max_drop=0.0), "float", yardstick).meet(quantized.calibration, lambda _: harmless)


RECIPE = """
name = "tiny"
[model]
source = "model.onnx"
[input]
name = "image"
[data]
calibration = "{data}"
[quantize]

max_drop = 6.3
revert = "{revert}"
[targets.onnxruntime]
[benchmark]
runs = 2
warmup = 1
"""


def _printed(output: str) -> list[str]:
    """The lines without the mark of times that scatter."""
    return [line.removesuffix(" noisy") for line in output.splitlines()]


@pytest.mark.parametrize("revert", ["float", "int16"])
def test_a_recipe_with_a_limit_deploys_what_meets_it(
    spoiled: bytes, labelled: Path, tmp_path: Path, revert: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(spoiled)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(data=labelled, revert=revert))
    result = run("deploy", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "run/report.json").read_text())["quantization"]
    plan = json.loads((tmp_path / "run/4-quantize/plan.json").read_text())
    back = facts["mixed"]["reverted"]
    assert back
    assert (set(back) <= set(plan["int16_nodes"])) == (revert == "int16")
    assert (set(back) & set(plan["int8_nodes"]) == set()) == (revert == "float")
    assert facts["mixed"]["steps"][-1]["drop"] <= 6.3
    assert facts["sensitivity"]["layers"][0]["layer"] in SPOILED
    prices = facts["measured"]["mixed"]["onnxruntime"]
    assert [price["name"] for price in prices] == ["all int8", *back]
    assert all(price["median_ms"] > 0 for price in prices)
    assert f"back to {revert}" in result.output
    page = (tmp_path / "run/report.html").read_text()
    for name in ("all in integers", *back):
        assert any(line.startswith(name) and line.rstrip().endswith("ms") for line in _printed(result.output))
        assert name in page
    manifest = json.loads((tmp_path / "run/9-release/manifest.json").read_text())
    assert "measured.json" not in manifest["stages"]["4-quantize"]
    again = run("deploy", tmp_path / "recipe.toml", "--out", tmp_path / "run", "--from", "quantize")
    assert again.exit_code == 0, again.output
    repeated = json.loads((tmp_path / "run/9-release/manifest.json").read_text())
    assert repeated["stages"] == manifest["stages"]


@pytest.mark.parametrize("setting", ["quantize.min_agreement=0.97", "quantize.min_sqnr=30"])
def test_a_recipe_may_limit_the_outputs_distance_without_labels(
    spoiled: bytes, tiny_images: Array, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(spoiled)
    np.savez(tmp_path / "bare.npz", image=tiny_images)
    recipe = RECIPE.format(data="bare.npz", revert="float").replace("max_drop = 6.3\n", "")
    (tmp_path / "recipe.toml").write_text(recipe)
    result = run("deploy", tmp_path / "recipe.toml", "--out", tmp_path / "run", "--set", setting)
    assert result.exit_code == 0, result.output
    mixed = json.loads((tmp_path / "run/report.json").read_text())["quantization"]["mixed"]
    key, limit = setting.removeprefix("quantize.").split("=")
    assert mixed[key] == float(limit)
    reached = [
        step["agreement"] if key == "min_agreement" else -10 * np.log10(step["noise"]) for step in mixed["steps"]
    ]
    assert mixed["reverted"][0] in SPOILED
    assert reached[-1] >= float(limit) > reached[0]
    assert mixed["max_drop"] is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantize.max_drop=-1", "quantize.max_drop: seen -1; accepted: greater than or equal to 0"),
        ("quantize.revert=float32", "quantize.revert: seen \"float32\"; accepted: 'float' or 'int16'"),
        ("quantize.sensitivity=3", "quantize.sensitivity: seen 3; accepted: boolean"),
        ("quantize.min_agreement=98.5", "quantize.min_agreement: seen 98.5; accepted: less than or equal to 1"),
        ("quantize.min_sqnr=-3", "quantize.min_sqnr: seen -3; accepted: greater than or equal to 0"),
        ('quantize.min_sqnr="high"', 'quantize.min_sqnr: seen "high"; accepted: number'),
    ],
)
def test_wrong_settings_are_recipe_errors(
    spoiled: bytes, labelled: Path, tmp_path: Path, setting: str, message: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(spoiled)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(data=labelled, revert="float"))
    result = run("deploy", tmp_path / "recipe.toml", "--out", tmp_path / "run", "--set", setting)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--algorithm=minmix", "unknown range algorithm 'minmix'; there are: "),
        ("--weight-algorithm=mze", "unknown range algorithm of weights 'mze'; there are: "),
        ("--refine=gtpq", "unknown refinement 'gtpq'; there are: "),
    ],
)
@pytest.mark.parametrize("command", [("sensitivity",), ("quantize", "-o", "out.onnx")])
def test_a_misspelt_name_is_told_before_model_and_samples_are_read(
    tmp_path: Path, command: tuple[str, ...], option: str, message: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    result = run(command[0], tmp_path / "model.onnx", *command[1:], "--data", tmp_path / "nowhere", option)
    assert result.exit_code == 2
    assert message in result.output


def test_the_command_prints_the_layers_and_one_json_document(spoiled: bytes, labelled: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(spoiled)
    result = run("sensitivity", path, "--data", labelled, "--target", "onnxruntime", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["samples"] == 32
    assert facts["unit"] == "points of top-1"
    assert {each["layer"] for each in facts["layers"][:2]} == set(SPOILED)


def test_a_picture_that_cannot_be_drawn_is_told_before_anything_is_measured(
    spoiled: bytes, labelled: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(spoiled)
    result = run("sensitivity", path, "--data", labelled, "--plot", tmp_path / "nowhere" / "plot.bmp")
    assert result.exit_code == 2
    assert "--plot" in result.output
