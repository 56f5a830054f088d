"""Refinements, one per file: a better model to calibrate, or a complete plan -> a better one of the same shape.

A file `<name>.py` here is a refinement called `<name>`: it ends in `REFINEMENT = <a Refinement>`. It says which
tensors it wants to see during calibration, so that all refinements and the range algorithm share one pass over the
samples. Refinements work in three steps, whatever the order they are asked for in: first those of the float model,
then those of the weights' integers, then those of the biases, which depend on both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import onnx_ir as ir

from edgeship.calibration.errors import InputError, nearest
from edgeship.calibration.observing.collect import Progress, Statistic
from edgeship.calibration.types import QuantPlan, QuantRules, WeightScheme

Step = Literal["model", "weights", "biases"]
STEPS: Sequence[Step] = ("model", "weights", "biases")
"""The order in which refinements are applied; within a step, the order of the user."""

Observe = Callable[[ir.Model, Mapping[str, Sequence[Statistic]]], None]
"""Shows the statistics, by tensor name, what a float model computes on all calibration samples."""

BY_SCHEME = frozenset({"pair_limit"})
"""Refinements that the weight scheme asks for (`quantize.weights`), not `quantize.refine`."""


class Refinement:
    """Improves what calibration makes; every method may be left as it is here, doing nothing."""

    step: ClassVar[Step] = "biases"
    settles_biases: ClassVar[bool] = False
    """Whether it leaves biases that those of the last step would only undo: they are passed over then."""

    def configured(self, options: object, progress: Progress | None) -> Refinement:
        """The same with options of its own kind (None: its defaults), and told who watches."""
        return self

    def prepare(self, model: ir.Model, rules: QuantRules, observe: Observe) -> ir.Model:
        """The float model to calibrate: a new one that computes the same, or `model`. `observe` costs a pass."""
        return model

    def statistics(self, model: ir.Model, rules: QuantRules) -> Mapping[str, Statistic]:
        """What to collect, new and empty, by tensor name."""
        return {}

    def refine(
        self, model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic], weights: WeightScheme
    ) -> QuantPlan:
        """The refined plan; `seen` is what `statistics` asked for, after all samples."""
        return plan

    def report(self) -> Mapping[str, Any]:
        """What was changed, as plain values for plan.json; empty where there is nothing to tell."""
        return {}


def names() -> Sequence[str]:
    """The names of all refinements, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def choices() -> Sequence[str]:
    """The names that `quantize.refine` takes, sorted."""
    return [name for name in names() if name not in BY_SCHEME]


def load(name: str) -> Refinement:
    """The refinement called `name`. Raises InputError with the names there are."""
    if name not in names():
        raise InputError(f"unknown refinement {name!r}{nearest(name, choices())}")
    return cast(Refinement, importlib.import_module(f"{__name__}.{name}").REFINEMENT)


def load_all(
    wanted: Iterable[str], options: Mapping[str, object] | None = None, progress: Progress | None = None
) -> dict[str, Refinement]:
    """The refinements called so with their `options`, in the order they are applied.

    Raises InputError for one that cannot be asked for.
    """
    asked = list(wanted)
    for name in asked:
        if asked.count(name) > 1:
            raise InputError(f"refinement {name!r} is asked for {asked.count(name)} times; once is enough")
        if name in BY_SCHEME:
            raise InputError(
                f"refinement {name!r} is not asked for by name: `weights` of [quantize] or of a target says which "
                f"artifact gets it; accepted: {', '.join(choices())}"
            )
    loaded = {name: load(name).configured((options or {}).get(name), progress) for name in asked}
    return dict(sorted(loaded.items(), key=lambda item: STEPS.index(item[1].step)))
