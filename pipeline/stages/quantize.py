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
from edgeship.pipeline.stage import ModelOutput, Progress, Stage, StageContext

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.collect import Feeds
    from edgeship.calibration.overrides import Override
    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.silhouette import Silhouette
    from edgeship.calibration.types import Finding, QuantPlan, QuantRules, WeightScheme
    from edgeship.pipeline.recipe import Recipe

PLAN = "plan.json"
HISTOGRAMS = "histograms.json"
MODES = ("static", "none")


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
    silhouettes: Mapping[str, Silhouette]

    @property
    def plan(self) -> QuantPlan:
        """The first plan; activations are the same in all."""
        return next(iter(self.plans.values()))


def quantize_model(  # noqa: PLR0913 - six of nine are keyword-only options
    model: ir.Model,
    samples: Iterable[Feeds],
    rules: Sequence[QuantRules],
    *,
    algorithm: str = "minmax",
    schemes: Sequence[WeightScheme] = ("full",),
    per_tensor: bool = False,
    refinements: Sequence[str] = ("bias_correction",),
    overrides: Sequence[Override] = (),
    progress: Progress | None = None,
) -> Quantized:
    """The model quantized under the strictest of `rules`, once per weight scheme, after one pass over `samples`.

    Raises InputError for unusable samples, an unknown algorithm or refinement, an override in vain, rules that exclude
    each other, or a model without a node that can be int8. `model` is not modified.
    """
    from edgeship.calibration.quantize import calibrate
    from edgeship.calibration.types import strictest
    from edgeship.targets.onnxruntime import open_float

    try:
        together = strictest(rules)
    except ValueError as error:
        raise InputError(f"the targets cannot share one quantized model: {error}") from error
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
        calibration.silhouettes,
    )


def run(context: StageContext) -> None:
    """Writes the models and plan.json. Raises InputError for a mode or calibration data that cannot be used."""
    from edgeship.calibration.onnx_file import load_onnx, to_bytes
    from edgeship.pipeline.workspace import write_atomically, write_json
    from edgeship.targets.base import load

    recipe = context.recipe
    settings = recipe.quantize
    path = context.inputs["simplify"] / "model.onnx"
    schemes = recipe.weight_schemes()
    mode: str = settings.mode
    if mode not in MODES:
        raise InputError(f"quantize.mode is {mode!r}; accepted so far: {', '.join(MODES)}")
    if mode == "none":
        for scheme in schemes:
            write_atomically(context.folder / f"{scheme}.onnx", path.read_bytes())
        write_json(context.folder / PLAN, {"mode": "none", "digest": "none", "digests": {}})
        return
    samples, findings = _calibration_samples(recipe, path)
    result = quantize_model(
        load_onnx(path),
        samples,
        [load(name).rules for name in sorted(recipe.targets)],
        algorithm=settings.algorithm,
        schemes=schemes,
        per_tensor=settings.per_tensor,
        refinements=settings.refine,
        overrides=[wish.as_override() for wish in settings.override],
        progress=context.progress,
    )
    for scheme, model in result.models.items():
        write_atomically(context.folder / f"{scheme}.onnx", to_bytes(model))
    write_json(context.folder / PLAN, {"mode": "static", **describe(result), "findings": [str(f) for f in findings]})
    write_json(context.folder / HISTOGRAMS, {name: each.to_json() for name, each in result.silhouettes.items()})


def _calibration_samples(recipe: Recipe, model: Path) -> tuple[Samples, list[Finding]]:
    """The samples and what is remarkable about them. Raises InputError when they are useless."""
    from edgeship.calibration.samples.data import check_calibration
    from edgeship.pipeline.artifacts import input_shapes

    samples = recipe.calibration_samples(input_shapes(model))
    findings = check_calibration(samples)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise InputError(f"data.calibration cannot be used: {'; '.join(errors)}")
    return samples, findings


def describe(result: Quantized) -> dict[str, Any]:
    """Everything that was decided, as plain values: digests, ranges, scales, folds, and what stays float and why."""
    from edgeship.calibration.ranges import representable
    from edgeship.calibration.refine.pair_limit import limited_channels

    plan = result.plans.get("full", result.plan)
    activations = {}
    for name, params in plan.activations.items():
        covered = representable(params)
        activations[name] = {
            "scale": float(params.scale),
            "zero_point": int(params.zero_point),
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
        "activations": activations,
        "weights": {name: _weight_facts(plan, name) for name in plan.weights},
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


def _weight_facts(plan: QuantPlan, name: str) -> dict[str, Any]:
    constant = plan.weights[name]
    scale = constant.params.scale
    return {
        "shape": list(constant.integers.shape),
        "axis": constant.params.spec.axis,
        "scale": [float(scale.min()), float(scale.max())],
    }


def _settings(recipe: Recipe, _targets: Sequence[str]) -> Any:
    return {
        "quantize": recipe.dump("quantize"),
        "targets": sorted(recipe.targets),
        "schemes": list(recipe.weight_schemes()),
        "data": _calibration_digest(recipe) if recipe.quantize.mode == "static" else None,
    }


def _calibration_digest(recipe: Recipe) -> str:
    digest = recipe.data_digest("calibration")
    if digest is None:
        raise InputError(f"{recipe.path.name}: data.calibration is not set; int8 ranges are chosen on real samples")
    return digest


def _models(recipe: Recipe, _targets: Sequence[str]) -> Sequence[ModelOutput]:
    return [ModelOutput(f"{scheme}.onnx", steps=recipe.quantize.mode == "static") for scheme in recipe.weight_schemes()]


STAGE = Stage(name="quantize", needs=("simplify",), settings=_settings, run=run, models=_models)
