"""The quantize stage: files to files, one model per weight scheme, a plan that says everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.writing.qdq import PLAN_KEY
from edgeship.pipeline.recipe import load_recipe
from edgeship.pipeline.stage import StageContext
from edgeship.pipeline.stages.quantize import STAGE
from edgeship.targets.onnxruntime import open_float

Make = Callable[..., tuple[StageContext, Path]]


@pytest.fixture
def context(tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path) -> Make:
    """Makes a context of the stage for the residual net; `quantize` and `targets` are the recipe's tables as TOML."""

    def make(
        quantize: str = "", targets: str = "[targets.onnxruntime]", data: Path = tiny_data
    ) -> tuple[StageContext, Path]:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            f'name = "tiny"\n[model]\nsource = "m.onnx"\n[data]\ncalibration = "{data}"\n'
            f"[quantize]\n{quantize}\n{targets}\n"
        )
        simplified, folder = tmp_path / "3-simplify", tmp_path / "4-quantize"
        simplified.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        (simplified / "model.onnx").write_bytes(tiny_models["residual"])
        loaded = load_recipe(recipe)
        return (
            StageContext(loaded, tuple(loaded.targets), {"simplify": simplified}, folder, lambda *_: None),
            folder,
        )

    return make


def test_full_weights_are_enough_where_no_target_clips(context: Make) -> None:
    stage_context, folder = context(targets='[targets.onnxruntime]\nweights = "full"')
    STAGE.run(stage_context)
    assert sorted(path.name for path in folder.iterdir()) == ["full.onnx", "histograms.json", "plan.json"]


def test_the_files_declared_are_the_files_made(context: Make) -> None:
    stage_context, folder = context()
    STAGE.run(stage_context)
    declared = {output.path for output in STAGE.models(stage_context.recipe, stage_context.targets)}
    assert declared | {"plan.json", "histograms.json"} == {path.name for path in folder.iterdir()}
    for path in declared:
        onnx.checker.check_model(str(folder / path), full_check=True)


def test_the_plan_file_names_digests_and_every_decision(context: Make) -> None:
    stage_context, folder = context("samples = 8")
    STAGE.run(stage_context)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["samples"] == 8
    assert plan["digest"] == plan["digests"]["full"]
    for scheme, digest in plan["digests"].items():
        assert ir.load(folder / f"{scheme}.onnx").metadata_props[PLAN_KEY] == digest
    assert plan["stays_float"] == {}
    assert set(plan["folded"]) == {"stem", "inner_1", "sum"}
    assert plan["pair_limited"].keys() <= plan["weights"].keys()


def test_two_runs_write_the_same_bytes(context: Make) -> None:
    stage_context, folder = context()
    STAGE.run(stage_context)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    STAGE.run(stage_context)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_an_unknown_algorithm_is_an_input_error(context: Make) -> None:
    with pytest.raises(InputError, match=r"quantize.algorithm: unknown algorithm 'minmx'; did you mean 'minmax'"):
        context('algorithm = "minmx"')


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (
            'refine = ["bias_corection"]',
            "quantize.refine: unknown refinement 'bias_corection'; did you mean 'bias_corr",
        ),
        ('refine = ["pair_limit"]', "'pair_limit' is not asked for by name: `weights` of .quantize."),
        ('refine = ["equalize", "equalize"]', "refinement 'equalize' is asked for 2 times"),
        (
            '[[quantize.override]]\npattern = "x"',
            "exactly one of algorithm, weight_algorithm, float = true, range, scale and int16",
        ),
        ('[[quantize.override]]\npattern = "x"\nrange = [1, 2]', r"low <= 0 <= high and low < high"),
        ('[[quantize.override]]\npattern = "x"\nfloat = "yes"', "quantize.override.0.float: seen .*boolean"),
        ('weight_algorithm = "moving_average"', "weight_algorithm: 'moving_average' is no range algorithm for weights"),
        ('[[quantize.override]]\npatern = "x"\nfloat = true', "unknown key; did you mean 'pattern'"),
        ('[[quantize.override]]\npattern = "x"\nalgorithm = "ms"', "override.0.algorithm: unknown algorithm 'ms'"),
    ],
)
def test_wrong_refinements_and_overrides_are_recipe_errors(context: Make, quantize: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        context(quantize)


def test_an_override_that_matches_nothing_names_the_nearest_tensors(context: Make) -> None:
    stage_context, folder = context('[[quantize.override]]\npattern = "stm"\nfloat = true')
    with pytest.raises(InputError, match=r"the pattern 'stm' matches no tensor, node or weights.*did you mean 'stem'"):
        STAGE.run(stage_context)
    assert not list(folder.iterdir())


def test_the_plan_file_says_what_the_recipe_asked_for(context: Make) -> None:
    stage_context, folder = context(
        'algorithm = "mse"\nrefine = ["bias_correction", "weight_scale", "equalize"]\nsamples = 8\n'
        '[[quantize.override]]\npattern = "sum*"\nalgorithm = "percentile"'
    )
    STAGE.run(stage_context)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["algorithm"] == "mse"
    assert plan["refinements"] == ["equalize", "weight_scale", "bias_correction"]  # in the order they are applied
    (override,) = plan["overrides"]
    assert {key: value for key, value in override.items() if value} == {"algorithm": "percentile", "pattern": "sum*"}


def test_without_refinements_biases_are_only_rounded(context: Make) -> None:
    stage_context, folder = context("refine = []")
    STAGE.run(stage_context)
    assert json.loads((folder / "plan.json").read_text())["refinements"] == []


@pytest.mark.parametrize(("count", "seen"), [(0, "holds no samples"), (1, "a single sample")])
def test_calibration_data_that_is_no_data_is_an_input_error(
    context: Make, tmp_path: Path, tiny_images: np.ndarray, count: int, seen: str
) -> None:
    path = tmp_path / "few.npz"
    np.savez(path, image=tiny_images[:count])
    stage_context, folder = context(data=path)
    with pytest.raises(InputError, match=seen):
        STAGE.run(stage_context)
    assert not list(folder.iterdir())


def test_settings_change_with_what_the_result_depends_on(context: Make) -> None:
    first = STAGE.settings(context()[0].recipe, ())
    assert STAGE.settings(context()[0].recipe, ("onnxruntime",)) == first
    assert STAGE.settings(context("samples = 7")[0].recipe, ()) != first
    assert STAGE.settings(context(targets="[targets.onnxruntime]\n[targets.tflite]")[0].recipe, ()) != first


def test_settings_change_with_the_data_that_is_trained_on(
    context: Make, tmp_path: Path, tiny_images: np.ndarray
) -> None:
    def settings(seed: int, data: str) -> Any:
        np.savez(
            tmp_path / "train.npz", image=np.roll(tiny_images, seed, axis=0), label=np.arange(len(tiny_images)) % 3
        )
        path = context()[0].recipe.path
        text = path.read_text().replace("[data]", '[data]\ntraining = "train.npz"')
        path.write_text(f'{text}\n[quantize.qat]\ndata = "{data}"\n')
        return STAGE.settings(load_recipe(path), ())

    assert settings(0, "training") == settings(0, "training") != settings(1, "training")
    assert settings(0, "calibration") == settings(1, "calibration")


@pytest.mark.parametrize("knows", [True, False])
def test_a_float_model_that_only_guesses_is_noted(
    context: Make, tiny_models: dict[str, bytes], tmp_path: Path, knows: bool
) -> None:
    session = open_float(tiny_models["residual"])
    images = np.random.default_rng(5).normal(size=(120, 3, 12, 12)).astype(np.float32)
    decided = np.array([int(session.run({"image": image[None]})["logits"].argmax()) for image in images])
    np.savez(tmp_path / "labelled.npz", image=images, label=decided if knows else (decided + 1) % 5)
    stage_context, folder = context("samples = 60", data=tmp_path / "labelled.npz")
    STAGE.run(stage_context)
    findings = json.loads((folder / "plan.json").read_text())["data"]["findings"]
    rules = [each["rule"].split(":")[0] for each in findings]
    assert ("the float model is no better than guessing" in rules) is not knows
