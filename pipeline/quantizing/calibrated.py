"""Returns a model quantized on samples: plans and QDQ models by weight scheme, and everything that was decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.observing.collect import Feeds
    from edgeship.calibration.planning.overrides import Override
    from edgeship.calibration.quantize import Calibration
    from edgeship.calibration.types import QuantPlan, QuantRules, WeightScheme
    from edgeship.pipeline.stage import Progress


@dataclass(frozen=True)
class Quantized:
    """Plans and QDQ models by weight scheme, and how they came about."""

    plans: Mapping[WeightScheme, QuantPlan]
    models: Mapping[WeightScheme, ir.Model]
    calibration: Calibration

    @property
    def plan(self) -> QuantPlan:
        """The first plan; activations are the same in all."""
        return next(iter(self.plans.values()))


def quantize_model(  # noqa: PLR0913 - nine of twelve are keyword-only options
    model: ir.Model,
    samples: Iterable[Feeds],
    rules: Sequence[QuantRules],
    *,
    algorithm: str = "minmax",
    weight_algorithm: str = "minmax",
    schemes: Sequence[WeightScheme] = ("full",),
    per_tensor: bool = False,
    refinements: Sequence[str] = ("gptq", "bias_correction"),
    overrides: Sequence[Override] = (),
    wide: bool = False,
    options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """The model quantized under the strictest of `rules`, once per weight scheme, after one pass over `samples`.

    `wide`: activations of 16 bits; `options`: those of refinements, by name. Raises InputError for unusable samples, an
    unknown algorithm or refinement, an override in vain, rules that exclude each other, or a model without a node that
    can be int8. `model` stays as it is.
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
        weight_algorithm=weight_algorithm,
        refinements=refinements,
        overrides=overrides,
        wide=wide,
        options=options,
        progress=progress,
    )
    return planned(calibration, schemes)


def planned(calibration: Calibration, schemes: Sequence[WeightScheme]) -> Quantized:
    """The plans and models that follow from what the samples showed."""
    plans = {scheme: calibration.plan(scheme) for scheme in schemes}
    models = {scheme: calibration.quantized(plan, scheme) for scheme, plan in plans.items()}
    return Quantized(plans, models, calibration)


def with_wide_integers(model: ir.Model) -> ir.Model:
    """The model at an operator set whose quantizers know 16 bits. Raises StageError where it cannot be upgraded."""
    from edgeship.calibration.writing.qdq import WIDE_OPSET
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


def describe(result: Quantized) -> dict[str, Any]:
    """Everything that was decided, as plain values: digests, ranges, scales, folds, and what stays float and why."""
    from edgeship.calibration.planning.pair_limit import limited_channels
    from edgeship.calibration.values.ranges import representable
    from edgeship.pipeline.quantizing.weight_only import weight_facts

    plan = result.plans.get("full", result.plan)
    seen = result.calibration
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
        "rules": seen.rules.name,
        "algorithm": seen.algorithm,
        "weight_algorithm": seen.weight_algorithm,
        "refinements": list(seen.refinements),
        "refined": {name: each.report() for name, each in seen.refinements.items() if each.report()},
        "samples": seen.samples,
        "overrides": [asdict(override) for override in seen.overrides],
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
