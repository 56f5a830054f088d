"""Returns what is decided by measuring the quantized model: each layer's sensitivity, and mixed precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.quantizing.calibrated import Quantized, planned
from edgeship.pipeline.quantizing.mixed import Mixed, Mixer
from edgeship.pipeline.quantizing.sensitivity import Cache, LayerCost, facts, measure_layers
from edgeship.pipeline.quantizing.yardstick import Yardstick

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import QuantPlan, WeightScheme
    from edgeship.pipeline.stage import StageContext


@dataclass(frozen=True)
class Found:
    """The quantized models after the search, what plan.json says of it, and the times that were taken."""

    result: Quantized
    facts: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


def search(context: StageContext, model: ir.Model, samples: Samples, result: Quantized) -> Found:
    """What the recipe wants measured: `quantize.sensitivity`, and the limits of mixed precision."""
    settings = context.recipe.quantize
    if not settings.sensitivity and not settings.limits:
        return Found(result)
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.targets.onnxruntime import open_float

    yardstick = Yardstick(
        open_float(to_bytes(model)), samples, lambda done, total: context.progress(done, total, "float outputs")
    )
    cache = Cache(None if context.cache is None else context.cache / "sensitivity.json")
    # of the schemes the coarser one decides: it costs more
    scheme: WeightScheme = "pair_limited" if "pair_limited" in result.plans else "full"
    known: list[LayerCost] = []

    def costs(plan: QuantPlan) -> Sequence[LayerCost]:
        if not known:
            known.extend(measure_layers(result.calibration.model, plan, yardstick, cache, context.progress))
        return known

    if settings.sensitivity:
        costs(result.plans[scheme])
    found: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    if settings.limits:
        mixer = Mixer(settings.limits, settings.revert, scheme, yardstick, cache, context.progress)
        mixed = mixer.meet(result.calibration, costs)
        found["mixed"] = mixed.to_json()
        if mixed.reverted:
            result = planned(mixed.calibration, tuple(result.plans))
            measured["mixed"] = _prices(context, mixed, scheme)
    if known:
        found["sensitivity"] = facts(known, yardstick.unit)
    return Found(result, found, measured)


def _prices(context: StageContext, mixed: Mixed, scheme: WeightScheme) -> Mapping[str, Any]:
    """The latency of the model after each step, on each target."""
    from edgeship.pipeline.quantizing.prices import measure_models

    models = {step.reverted or "all int8": mixed.calibration.quantized(step.plan, scheme) for step in mixed.steps}
    return measure_models(context, models)
