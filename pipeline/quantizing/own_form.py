"""Returns the quantized models of the targets that have a form of their own: the recipe's wish, or measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.quantizing.forms import Form, make

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.quantize import Calibration
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.stage import StageContext


@dataclass(frozen=True)
class OwnForms:
    """Models and plan digests by target, what plan.json says of them, and the times that were taken."""

    models: Mapping[str, ir.Model]
    digests: Mapping[str, str]
    facts: Mapping[str, Any]
    measured: Mapping[str, Any]


def own_forms(context: StageContext, model: ir.Model, calibration: Calibration) -> OwnForms:
    """The targets' own models, after one calibration. `model` is the float model.

    Raises StageError where no form meets the gates, InputError where a form leaves no layer in integers.
    """
    from edgeship.pipeline.quantizing.auto import Auto
    from edgeship.targets.base import load

    recipe = context.recipe
    models, digests, chosen, times = {}, {}, {}, {}
    for name in sorted(recipe.targets):
        if not recipe.has_own_form(name):
            continue
        target = load(name)
        form = wished(recipe, name)
        if recipe.quantize.scheme == "auto" and target.availability().installed:
            decision = Auto(context, target, calibration, model).decide()
            form = decision.form
            chosen[name] = {**decision.to_json(), "pin": pin(name, form)}
            times[name] = decision.times()
        plan, models[name] = make(calibration, form, name)
        digests[name] = plan.digest()
    scheme = {"targets": chosen} if chosen else None
    return OwnForms(models, digests, {"scheme": scheme} if scheme else {}, {"scheme": times} if times else {})


def wished(recipe: Recipe, target: str) -> Form:
    """The form that the recipe gives a target."""
    options = recipe.targets[target]
    weights = options.weights or recipe.weight_scheme(target)
    return Form(weights, tuple(options.keep_float))


def pin(target: str, form: Form) -> str:
    """The lines of a recipe that give the same form on any machine."""
    kinds = ", ".join(f'"{kind}"' for kind in form.keep_float)
    return f'[targets.{target}] weights = "{form.weights}", keep_float = [{kinds}]'
