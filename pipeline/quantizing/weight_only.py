"""Returns the models of the modes that need no data: int8 weights (dynamic) and float16 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.planning.overrides import Override
    from edgeship.calibration.types import QuantPlan, QuantRules, WeightScheme


@dataclass(frozen=True)
class SmallWeights:
    """Models by weight scheme, and what plan.json says of them."""

    models: Mapping[WeightScheme, ir.Model]
    facts: Mapping[str, Any]

    @property
    def count(self) -> int:
        """How many weight tensors are small now."""
        return len(self.facts["weights"])


def float16_weights(model: ir.Model, overrides: Sequence[Override]) -> SmallWeights:
    """The model with float16 weights. Raises InputError for overrides that this mode cannot follow."""
    from edgeship.calibration.writing.weight_only import halve_weights

    halved = halve_weights(model, _kept(model, overrides, "float16"))
    facts = {
        "mode": "float16",
        "digest": halved.digest,
        "digests": {"full": halved.digest},
        "weights": list(halved.weights),
        "stays_float": dict(halved.stays_float),
    }
    return SmallWeights({"full": halved.model}, facts)


def int8_weights(
    model: ir.Model,
    rules: QuantRules,
    schemes: Sequence[WeightScheme],
    overrides: Sequence[Override],
    *,
    per_tensor: bool,
) -> SmallWeights:
    """The model with int8 weights and float activations.

    Raises InputError for overrides that this mode cannot follow.
    """
    from edgeship.calibration.writing.qdq import apply_plan
    from edgeship.calibration.writing.weight_only import weight_only_plan

    kept = _kept(model, overrides, "dynamic")
    if per_tensor:
        rules = replace(rules, weight=replace(rules.weight, axis=None))
    plans = {scheme: weight_only_plan(model, rules, scheme, kept) for scheme in schemes}
    models = {scheme: apply_plan(model, plan, {"mode": "dynamic", "weights": scheme}) for scheme, plan in plans.items()}
    first = plans.get("full", next(iter(plans.values())))
    facts = {
        "mode": "dynamic",
        "digest": first.digest(),
        "digests": {scheme: plan.digest() for scheme, plan in plans.items()},
        "int8_nodes": list(first.int8_nodes),
        "weights": {name: weight_facts(first, name) for name in first.weights},
        "stays_float": dict(first.stays_float),
    }
    return SmallWeights(models, facts)


def weight_facts(plan: QuantPlan, name: str) -> dict[str, Any]:
    """Shape, axis and the smallest and largest scale of one weight."""
    constant = plan.weights[name]
    scale = constant.params.scale
    return {
        "shape": list(constant.integers.shape),
        "axis": constant.params.spec.axis,
        "scale": [float(scale.min()), float(scale.max())],
    }


def check_overrides(overrides: Sequence[Override], mode: str) -> None:
    """Raises InputError for an override that a mode with float activations cannot follow."""
    others = [each.pattern for each in overrides if not each.stays_float]
    if others:
        raise InputError(
            f"quantize.override: {others[0]!r} is about activations, and mode {mode!r} leaves those in float; accepted "
            "here: float = true"
        )


def _kept(model: ir.Model, overrides: Sequence[Override], mode: str) -> dict[str, str]:
    """The nodes that overrides keep float, each with the reason."""
    from edgeship.calibration.graph.operators import node_key
    from edgeship.calibration.planning.overrides import kept_by, matching_nodes

    check_overrides(overrides, mode)
    return {node_key(node): kept_by(each) for each in overrides for node in matching_nodes(model, each)}
