"""Returns the stage that simplifies the exported model: 3-simplify/model.onnx and simplify.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.stage import ModelOutput, Stage, StageContext

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

MODEL = "model.onnx"


def _settings(_recipe: Recipe, _targets: Sequence[str]) -> Any:
    return {}


def _run(context: StageContext) -> None:
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.golden import read_golden
    from edgeship.pipeline.simplification.simplifier import simplify_model

    exported = context.inputs["export"]
    golden = read_golden(exported / "golden.npz")
    result = simplify_model((exported / MODEL).read_bytes(), feeds=golden.feeds)
    (context.folder / MODEL).write_bytes(to_bytes(result.model))
    text = json.dumps(result.to_json(), indent=2) + "\n"
    (context.folder / "simplify.json").write_text(text, "utf-8")


def _models(_recipe: Recipe, _targets: Sequence[str]) -> Sequence[ModelOutput]:
    return [ModelOutput(MODEL)]


STAGE = Stage("simplify", ("export",), _settings, _run, models=_models)
