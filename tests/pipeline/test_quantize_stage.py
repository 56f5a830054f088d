"""The quantize stage: files to files, one model per weight scheme, a plan that says everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.qdq import PLAN_KEY
from edgeship.pipeline.recipe import load_recipe
from edgeship.pipeline.stage import StageContext
from edgeship.pipeline.stages.quantize import STAGE

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
    assert sorted(path.name for path in folder.iterdir()) == ["full.onnx", "plan.json"]


def test_the_files_declared_are_the_files_made(context: Make) -> None:
    stage_context, folder = context()
    STAGE.run(stage_context)
    declared = {output.path for output in STAGE.models(stage_context.recipe, stage_context.targets)}
    assert declared | {"plan.json"} == {path.name for path in folder.iterdir()}
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
    stage_context, folder = context('algorithm = "minmx"')
    with pytest.raises(InputError, match=r"unknown range algorithm 'minmx'; there are: .*minmax"):
        STAGE.run(stage_context)
    assert not list(folder.iterdir())


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
