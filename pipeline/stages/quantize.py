"""Returns the quantized models, one per weight scheme that the recipe's targets need, and the plan they were made from.

4-quantize/full.onnx, when a target asks for it pair_limited.onnx, and `<target>.onnx` where a target has a form of its
own; plan.json says every decision in words and
numbers, histograms.json what the calibrated tensors' values look like. The plan is made under the strictest union of
the rules of all targets of the recipe, whichever of them are built now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.recipe import CALIBRATED_MODES
from edgeship.pipeline.stage import ModelOutput, Stage, StageContext

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import QuantRules
    from edgeship.pipeline.quantize_section import Qat
    from edgeship.pipeline.quantizing.search import Found
    from edgeship.pipeline.recipe import Recipe

PLAN = "plan.json"
HISTOGRAMS = "histograms.json"
MEASURED = "measured.json"
"""Times: they differ from run to run, and no artifact depends on them."""


def run(context: StageContext) -> None:
    """Writes the models and plan.json. Raises InputError for calibration data or overrides that cannot be used."""
    from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
    from edgeship.pipeline.workspace import write_atomically, write_json

    recipe = context.recipe
    path = context.inputs["simplify"] / "model.onnx"
    if recipe.quantize.mode == "none":
        for scheme in recipe.weight_schemes():
            write_atomically(context.folder / f"{scheme}.onnx", path.read_bytes())
        said = _doubts(recipe, load_onnx(path), path)
        write_json(context.folder / PLAN, {"mode": "none", "digest": "none", "digests": {}, **said})
        return
    make = _with_data if recipe.quantize.mode in CALIBRATED_MODES else _without_data
    made = make(context, load_onnx(path), path)
    for name, model in made.models.items():
        write_atomically(context.folder / f"{name}.onnx", to_bytes(model))
    for file, facts in made.facts.items():
        write_json(context.folder / file, facts)


@dataclass(frozen=True)
class _Made:
    """Models by weight scheme or target, and what is said of them, by file name."""

    models: Mapping[str, ir.Model]
    facts: Mapping[str, Mapping[str, Any]]


def _without_data(context: StageContext, model: ir.Model, path: Path) -> _Made:
    from edgeship.pipeline.quantizing.calibrated import combined
    from edgeship.pipeline.quantizing.weight_only import float16_weights, int8_weights

    recipe, settings = context.recipe, context.recipe.quantize
    overrides = [wish.as_override() for wish in settings.override]
    if settings.mode == "float16":
        small = float16_weights(model, overrides)
    else:
        rules = combined(_rules(recipe))
        small = int8_weights(model, rules, recipe.weight_schemes(), overrides, per_tensor=settings.per_tensor)
    models = {str(scheme): each for scheme, each in small.models.items()}
    return _Made(models, {PLAN: {**small.facts, **_doubts(recipe, model, path)}})


def _doubts(recipe: Recipe, model: ir.Model, path: Path) -> dict[str, Any]:
    """What plan.json says where no ranges are chosen: whether model and data seem to belong together."""
    from edgeship.calibration.samples.checks import to_json
    from edgeship.pipeline.artifacts import input_shapes
    from edgeship.pipeline.quantizing.data import data_doubts

    findings = data_doubts(recipe, model, input_shapes(path))
    return {"findings": [str(each) for each in findings], "data": {"findings": to_json(findings)}}


def _with_data(context: StageContext, model: ir.Model, path: Path) -> _Made:
    from edgeship.calibration.diagnosis.structure import WIDE_FIXES
    from edgeship.calibration.samples.checks import to_json
    from edgeship.pipeline.quantizing.calibrated import describe, quantize_model, with_wide_integers
    from edgeship.pipeline.quantizing.data import calibration_samples
    from edgeship.pipeline.quantizing.own_form import own_forms
    from edgeship.pipeline.quantizing.search import search
    from edgeship.pipeline.quantizing.structure import with_fixes

    recipe, settings = context.recipe, context.recipe.quantize
    if settings.qat is not None:
        from edgeship.pipeline.models import require_training

        require_training()
    samples, findings = calibration_samples(recipe, path, model)
    reverts_to_wide = bool(settings.limits) and settings.revert == "int16"
    if reverts_to_wide or WIDE_FIXES & set(settings.fixes):
        model = with_wide_integers(model)
    result = quantize_model(
        model,
        samples,
        _rules(recipe),
        algorithm=settings.algorithm,
        weight_algorithm=settings.weight_algorithm,
        schemes=recipe.weight_schemes(),
        per_tensor=settings.per_tensor,
        refinements=settings.refine,
        overrides=[wish.as_override() for wish in settings.override],
        wide=settings.mode == "int16",
        options={"reconstruct": settings.reconstruct.as_options()},
        progress=context.progress,
    )
    result, structure = with_fixes(result, samples, settings.fixes)
    found = search(context, model, samples, result)
    if settings.qat is not None:
        found = _trained(context, settings.qat, samples, found)
    seen = found.result.calibration
    findings += seen.convergence.findings()
    data = {"findings": to_json(findings), "convergence": seen.convergence.to_json()}
    plan = {"mode": settings.mode, **describe(found.result), "findings": [str(f) for f in findings], "data": data}
    histograms = {name: each.to_json() for name, each in seen.silhouettes.items()}
    own = own_forms(context, model, seen)
    plan |= {**found.facts, **own.facts, "structure": structure, "digests": {**plan["digests"], **own.digests}}
    measured = {**found.measured, **own.measured}
    return _Made(
        {**{str(scheme): each for scheme, each in found.result.models.items()}, **own.models},
        {PLAN: plan, HISTOGRAMS: histograms, **({MEASURED: measured} if measured else {})},
    )


def _trained(context: StageContext, settings: Qat, samples: Samples, found: Found) -> Found:
    """What was found, with trained models."""
    from edgeship.pipeline.compression.qat import train_quantized

    trained = train_quantized(context.recipe, settings, samples, found.result, context.kept, context.progress)
    return replace(found, result=trained.result, facts={**found.facts, "qat": trained.to_json()})


def _rules(recipe: Recipe) -> list[QuantRules]:
    from edgeship.targets.base import load

    return [load(name).rules for name in sorted(recipe.targets)]


def _settings(recipe: Recipe, _targets: Sequence[str]) -> Any:
    return {
        "quantize": recipe.dump("quantize"),
        "forms": {name: options.keep_float for name, options in sorted(recipe.targets.items())},
        "auto": _auto_settings(recipe) if recipe.quantize.scheme == "auto" else None,
        "targets": sorted(recipe.targets),
        "schemes": list(recipe.weight_schemes()),
        "data": _data_digests(recipe),
        "outputs": recipe.model.outputs,
        "training": _training_settings(recipe),
    }


def _training_settings(recipe: Recipe) -> Any:
    """What quantization-aware training learns from, besides the model and the calibration samples."""
    settings = recipe.quantize.qat
    if settings is None:
        return None
    found = recipe.qat_distill
    teacher = None if found is None else found[1].model_dump(mode="json")
    if settings.data == "calibration":
        return [teacher]
    from edgeship.pipeline.source_files import loader_names

    digest = None if recipe.data.training is None else recipe.data_digest("training")
    return [teacher, digest, list(loader_names(recipe)), recipe.dump("input")]


def _files(recipe: Recipe) -> Sequence[Path]:
    """The code of the teacher and of the loaders, and the teacher's weights, where training uses them."""
    from edgeship.pipeline.source_files import loader_files, teacher_files

    settings = recipe.quantize.qat
    if settings is None:
        return []
    found = recipe.qat_distill
    files = [] if found is None else teacher_files(recipe, found[0], found[1].teacher)
    return [*files, *(loader_files(recipe) if settings.data == "training" else [])]


def _auto_settings(recipe: Recipe) -> Any:
    """What a measured decision depends on."""
    from edgeship.pipeline.judging import jury_digest
    from edgeship.pipeline.machine import cpu_key

    return [recipe.dump("gates", "benchmark", "parity"), jury_digest(recipe), recipe.data.seed, cpu_key()]


def _data_digests(recipe: Recipe) -> list[str | None]:
    """What ranges are chosen on, and what must not be among it and says whether the model knows the data."""
    digest = recipe.data_digest("calibration")
    if digest is None and recipe.quantize.mode in CALIBRATED_MODES:
        raise InputError(f"{recipe.path.name}: data.calibration is not set; int8 ranges are chosen on real samples")
    return [digest, recipe.data_digest("evaluation")]


def _models(recipe: Recipe, _targets: Sequence[str]) -> Sequence[ModelOutput]:
    own = [name for name in sorted(recipe.targets) if recipe.has_own_form(name)]
    return [
        ModelOutput(f"{name}.onnx", steps=recipe.quantize.mode != "none") for name in (*recipe.weight_schemes(), *own)
    ]


STAGE = Stage(name="quantize", needs=("simplify",), settings=_settings, run=run, files=_files, models=_models)
