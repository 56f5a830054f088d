"""A float model and samples -> plan and QDQ model: calibration as one call.

The samples are gone through once, and once more for each refinement that changes the float model. What was seen then
gives any number of plans (full and pair-limited weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from edgeship.calibration import refine
from edgeship.calibration.algorithms import load
from edgeship.calibration.observing.collect import Feeds, Progress, Statistic, observe
from edgeship.calibration.observing.convergence import Convergence, Watch
from edgeship.calibration.planning.overrides import (
    Override,
    check_scales,
    make_observers,
    of_weights,
    rules_with_floats,
    weight_observers,
    wide_nodes,
)
from edgeship.calibration.planning.plan import make_plan
from edgeship.calibration.planning.wide import widen
from edgeship.calibration.refine import Refinement
from edgeship.calibration.types import Observer, OpenModel, QuantPlan, QuantRules, WeightScheme
from edgeship.calibration.values.ranges import Extremes
from edgeship.calibration.values.silhouette import Silhouette
from edgeship.calibration.writing.exact import exact
from edgeship.calibration.writing.qdq import apply_plan

REFINEMENTS = ("gptq", "bias_correction")
"""What is done by default beyond ranges and rounding."""


@dataclass(frozen=True)
class Calibration:
    """What the samples showed: everything a plan is made from.

    `model` is the float model as it was calibrated: a refinement (equalization) may have changed its numbers. `wide`:
    all activations get 16 bits.
    """

    model: ir.Model
    rules: QuantRules
    algorithm: str
    weight_algorithm: str
    samples: int
    observers: Mapping[str, Observer]
    refinements: Mapping[str, Refinement]
    overrides: tuple[Override, ...]
    statistics: Mapping[str, Mapping[str, Statistic]]
    silhouettes: Mapping[str, Silhouette]
    convergence: Convergence
    wide: bool = False

    def plan(self, weights: WeightScheme = "full") -> QuantPlan:
        """The plan with weights of the given scheme: ranges, then limits of the weights, then the other refinements."""
        of_weights = weight_observers(self.model, self.rules, self.weight_algorithm, self.overrides)
        plan = make_plan(self.model, self.rules, self.observers, of_weights)
        if weights == "pair_limited":
            plan = refine.load("pair_limit").refine(self.model, plan, {}, weights)
        settled = any(refinement.settles_biases for refinement in self.refinements.values())
        for name, refinement in self.refinements.items():
            if settled and refinement.step == "biases":
                continue
            plan = refinement.refine(self.model, plan, self.statistics[name], weights)
        check_scales(plan, self.overrides)
        wide = wide_nodes(self.model, plan, self.overrides)
        return widen(self.model, plan, None if self.wide else wide) if self.wide or wide else plan

    def with_overrides(self, more: Sequence[Override]) -> Calibration:
        """The same with further wishes of nodes. Raises InputError for a wish in vain."""
        rules = rules_with_floats(self.model, self.rules, more)
        return replace(self, rules=rules, overrides=(*self.overrides, *more))

    def quantized(self, plan: QuantPlan, weights: WeightScheme = "full") -> ir.Model:
        """The QDQ model of `plan`, with the facts of this calibration in its metadata."""
        facts: dict[str, str | int | float] = {
            "algorithm": self.algorithm,
            "weight_algorithm": self.weight_algorithm,
            "refinements": ",".join(self.refinements),
            "rules": self.rules.name,
            "samples": self.samples,
            "weights": weights,
        }
        if self.overrides:
            facts["overrides"] = ",".join(override.pattern for override in self.overrides)
        return exact(apply_plan(self.model, plan, facts))


def check_names(algorithm: str, weight_algorithm: str, refinements: Sequence[str]) -> None:
    """Raises InputError for an algorithm or refinement that there is not; needs neither model nor samples."""
    load(algorithm)
    of_weights(weight_algorithm)
    refine.load_all(refinements)


def calibrate(  # noqa: PLR0913 - seven of eleven are keyword-only options
    model: ir.Model,
    samples: Iterable[Feeds],
    rules: QuantRules,
    open_model: OpenModel,
    *,
    algorithm: str = "minmax",
    weight_algorithm: str = "minmax",
    refinements: Sequence[str] = REFINEMENTS,
    overrides: Sequence[Override] = (),
    wide: bool = False,
    options: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """What one pass over `samples` shows of a float model; `open_model` opens it, with intermediate tensors as outputs.

    `options` are those of refinements, by name. A refinement of the model itself goes over `samples` first, which then
    must not be an iterator. Raises InputError for an unknown algorithm or refinement, an override in vain, no samples,
    non-finite values, or a model without a node that can be int8.
    """
    loaded = refine.load_all(refinements, options, progress)
    rules = rules_with_floats(model, rules, overrides)
    observers = make_observers(model, rules, algorithm, overrides)
    weight_observers(model, rules, weight_algorithm, overrides)  # what cannot be met is said before the pass

    def look(of: ir.Model, wanted: Mapping[str, Sequence[Statistic]]) -> None:
        observe(of, samples, wanted, open_model, progress)

    for refinement in loaded.values():
        model = refinement.prepare(model, rules, look)
    statistics = {name: dict(each.statistics(model, rules)) for name, each in loaded.items()}
    wanted: dict[str, list[Statistic]] = {name: [observer] for name, observer in observers.items()}
    silhouettes = {}
    for name, observer in observers.items():
        extremes = observer if isinstance(observer, Extremes) else Extremes()
        if not isinstance(observer, Extremes):
            wanted[name].append(extremes)
        silhouettes[name] = Silhouette(extremes)
    for each in statistics.values():
        for name, statistic in each.items():
            wanted.setdefault(name, []).append(statistic)
    watch = Watch(observers, progress)
    observe(model, samples, wanted, open_model, watch, silhouettes)
    return Calibration(
        model,
        rules,
        algorithm,
        weight_algorithm,
        watch.done,
        observers,
        loaded,
        tuple(overrides),
        statistics,
        silhouettes,
        watch.result(),
        wide,
    )


def quantize_model(  # noqa: PLR0913 - five of nine are keyword-only options
    model: ir.Model,
    samples: Iterable[Feeds],
    rules: QuantRules,
    open_model: OpenModel,
    *,
    algorithm: str = "minmax",
    weights: WeightScheme = "full",
    refinements: Sequence[str] = REFINEMENTS,
    overrides: Sequence[Override] = (),
    progress: Progress | None = None,
) -> tuple[QuantPlan, ir.Model]:
    """The plan and the QDQ model of a float model. Raises as `calibrate` does; `model` is not modified."""
    calibration = calibrate(
        model,
        samples,
        rules,
        open_model,
        algorithm=algorithm,
        refinements=refinements,
        overrides=overrides,
        progress=progress,
    )
    plan = calibration.plan(weights)
    return plan, calibration.quantized(plan, weights)
