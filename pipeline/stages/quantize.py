"""Returns the quantized models, one per weight scheme that the recipe's targets need, and the plan they were made from.

4-quantize/full.onnx and, when a target asks for it, pair_limited.onnx; plan.json says every decision in words and
numbers, histograms.json what the calibrated tensors' values look like. The plan is made under the strictest union of
the rules of all targets of the recipe, whichever of them are built now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.recipe import CALIBRATED_MODES
from edgeship.pipeline.stage import ModelOutput, Progress, Stage, StageContext

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.collect import Feeds
    from edgeship.calibration.overrides import Override
    from edgeship.calibration.quantize import Calibration
    from edgeship.calibration.types import QuantPlan, QuantRules, WeightScheme
    from edgeship.pipeline.recipe import Recipe

PLAN = "plan.json"
HISTOGRAMS = "histograms.json"


@dataclass(frozen=True)
class Quantized:
    """Plans and QDQ models by weight scheme, and how they came about."""

    plans: Mapping[WeightScheme, QuantPlan]
    models: Mapping[WeightScheme, ir.Model]
    rules: str
    algorithm: str
    refinements: tuple[str, ...]
    overrides: tuple[Override, ...]
    samples: int
    calibration: Calibration

    @property
    def plan(self) -> QuantPlan:
        """The first plan; activations are the same in all."""
        return next(iter(self.plans.values()))


def quantize_model(  # noqa: PLR0913 - seven of ten are keyword-only options
    model: ir.Model,
    samples: Iterable[Feeds],
    rules: Sequence[QuantRules],
    *,
    algorithm: str = "minmax",
    schemes: Sequence[WeightScheme] = ("full",),
    per_tensor: bool = False,
    refinements: Sequence[str] = ("bias_correction",),
    overrides: Sequence[Override] = (),
    wide: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """The model quantized under the strictest of `rules`, once per weight scheme, after one pass over `samples`.

    `wide`: activations of 16 bits. Raises InputError for unusable samples, an unknown algorithm or refinement, an
    override in vain, rules that exclude each other, or a model without a node that can be int8. `model` stays as it is.
    """
    from edgeship.calibration.quantize import calibrate
    from edgeship.targets.onnxruntime import open_float

    together = combined(rules)
    if wide or any(override.wide for override in overrides):
        model = with_wide_integers(model)
    if per_tensor:
        together = replace(together, weight=replace(together.weight, axis=None))
    calibration = calibrate(
        model,
        samples,
        together,
        open_float,
        algorithm=algorithm,
        refinements=refinements,
        overrides=overrides,
        wide=wide,
        progress=progress,
    )
    plans = {scheme: calibration.plan(scheme) for scheme in schemes}
    models = {scheme: calibration.quantized(plan, scheme) for scheme, plan in plans.items()}
    return Quantized(
        plans,
        models,
        together.name,
        algorithm,
        calibration.refinements,
        calibration.overrides,
        calibration.samples,
        calibration,
    )


def with_wide_integers(model: ir.Model) -> ir.Model:
    """The model at an operator set whose quantizers know 16 bits. Raises StageError where it cannot be upgraded."""
    from edgeship.calibration.qdq import WIDE_OPSET
    from edgeship.pipeline.onnx_source import upgrade

    if model.opset_imports.get("", 0) >= WIDE_OPSET:
        return model
    upgraded, _ = upgrade(model, smallest=WIDE_OPSET, target=WIDE_OPSET)
    return upgraded


def combined(rules: Sequence[QuantRules]) -> QuantRules:
    """The strictest of `rules`. Raises InputError when they exclude each other."""
    from edgeship.calibration.types import strictest

    try:
        return strictest(rules)
    except ValueError as error:
        raise InputError(f"the targets cannot share one quantized model: {error}") from error


def run(context: StageContext) -> None:
    """Writes the models and plan.json. Raises InputError for calibration data or overrides that cannot be used."""
    from edgeship.calibration.onnx_file import load_onnx, to_bytes
    from edgeship.pipeline.workspace import write_atomically, write_json

    recipe = context.recipe
    path = context.inputs["simplify"] / "model.onnx"
    if recipe.quantize.mode == "none":
        for scheme in recipe.weight_schemes():
            write_atomically(context.folder / f"{scheme}.onnx", path.read_bytes())
        write_json(context.folder / PLAN, {"mode": "none", "digest": "none", "digests": {}})
        return
    make = _with_data if recipe.quantize.mode in CALIBRATED_MODES else _without_data
    made = make(context, load_onnx(path), path)
    for scheme, model in made.models.items():
        write_atomically(context.folder / f"{scheme}.onnx", to_bytes(model))
    for name, facts in made.facts.items():
        write_json(context.folder / name, facts)


@dataclass(frozen=True)
class _Made:
    """Models by weight scheme, and what is said of them by file name."""

    models: Mapping[WeightScheme, ir.Model]
    facts: Mapping[str, Mapping[str, Any]]


def _without_data(context: StageContext, model: ir.Model, _path: Path) -> _Made:
    from edgeship.pipeline.quantizing.weight_only import float16_weights, int8_weights

    recipe, settings = context.recipe, context.recipe.quantize
    overrides = [wish.as_override() for wish in settings.override]
    if settings.mode == "float16":
        small = float16_weights(model, overrides)
    else:
        rules = combined(_rules(recipe))
        small = int8_weights(model, rules, recipe.weight_schemes(), overrides, per_tensor=settings.per_tensor)
    return _Made(small.models, {PLAN: small.facts})


def _with_data(context: StageContext, model: ir.Model, path: Path) -> _Made:
    from edgeship.calibration.samples.checks import to_json
    from edgeship.pipeline.quantizing.data import calibration_samples

    recipe, settings = context.recipe, context.recipe.quantize
    samples, findings = calibration_samples(recipe, path, model)
    result = quantize_model(
        model,
        samples,
        _rules(recipe),
        algorithm=settings.algorithm,
        schemes=recipe.weight_schemes(),
        per_tensor=settings.per_tensor,
        refinements=settings.refine,
        overrides=[wish.as_override() for wish in settings.override],
        wide=settings.mode == "int16",
        progress=context.progress,
    )
    findings += result.calibration.convergence.findings()
    data = {"findings": to_json(findings), "convergence": result.calibration.convergence.to_json()}
    plan = {"mode": settings.mode, **describe(result), "findings": [str(f) for f in findings], "data": data}
    histograms = {name: each.to_json() for name, each in result.calibration.silhouettes.items()}
    return _Made(result.models, {PLAN: plan, HISTOGRAMS: histograms})


def _rules(recipe: Recipe) -> list[QuantRules]:
    from edgeship.targets.base import load

    return [load(name).rules for name in sorted(recipe.targets)]


def describe(result: Quantized) -> dict[str, Any]:
    """Everything that was decided, as plain values: digests, ranges, scales, folds, and what stays float and why."""
    from edgeship.calibration.ranges import representable
    from edgeship.calibration.refine.pair_limit import limited_channels
    from edgeship.pipeline.quantizing.weight_only import weight_facts

    plan = result.plans.get("full", result.plan)
    activations = {}
    for name, params in plan.activations.items():
        covered = representable(params)
        activations[name] = {
            "scale": float(params.scale),
            "zero_point": int(params.zero_point),
            "bits": params.spec.bits,
            "range": [covered.low, covered.high],
        }
    facts: dict[str, Any] = {
        "digest": plan.digest(),
        "digests": {scheme: each.digest() for scheme, each in result.plans.items()},
        "rules": result.rules,
        "algorithm": result.algorithm,
        "refinements": list(result.refinements),
        "samples": result.samples,
        "overrides": [asdict(override) for override in result.overrides],
        "int8_nodes": list(plan.int8_nodes),
        "int16_nodes": list(plan.wide_nodes),
        "activations": activations,
        "weights": {name: weight_facts(plan, name) for name in plan.weights},
        "folded": dict(plan.folded),
        "stays_float": dict(plan.stays_float),
    }
    if "full" in result.plans and "pair_limited" in result.plans:
        limited = limited_channels(plan, result.plans["pair_limited"])
        facts["pair_limited"] = {
            name: {"channels": list(each.channels), "scale_growth": list(each.factors)}
            for name, each in limited.items()
        }
    return facts


def _settings(recipe: Recipe, _targets: Sequence[str]) -> Any:
    return {
        "quantize": recipe.dump("quantize"),
        "targets": sorted(recipe.targets),
        "schemes": list(recipe.weight_schemes()),
        "data": _data_digests(recipe) if recipe.quantize.mode in CALIBRATED_MODES else None,
    }


def _data_digests(recipe: Recipe) -> list[str | None]:
    """What ranges are chosen on, and what must not be among it."""
    digest = recipe.data_digest("calibration")
    if digest is None:
        raise InputError(f"{recipe.path.name}: data.calibration is not set; int8 ranges are chosen on real samples")
    return [digest, recipe.data_digest("evaluation")]


def _models(recipe: Recipe, _targets: Sequence[str]) -> Sequence[ModelOutput]:
    return [ModelOutput(f"{scheme}.onnx", steps=recipe.quantize.mode != "none") for scheme in recipe.weight_schemes()]


STAGE = Stage(name="quantize", needs=("simplify",), settings=_settings, run=run, models=_models)
