"""Returns the mixed-precision model that costs at most so much: the dearest layers go back to float, or to int16.

Layers are reverted one after the other, in the order of what each costs by itself, until the whole quantized model
meets the limit on the calibration samples. The evaluation samples have no part in it: they judge what comes out.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeship.calibration.errors import StageError
from edgeship.pipeline.quantizing.yardstick import Cost, Yardstick

if TYPE_CHECKING:
    from edgeship.calibration.planning.overrides import Override
    from edgeship.calibration.quantize import Calibration
    from edgeship.calibration.types import QuantPlan, WeightScheme
    from edgeship.pipeline.quantizing.sensitivity import Cache, LayerCost
    from edgeship.pipeline.stage import Progress

Revert = Literal["float", "int16"]


@dataclass(frozen=True)
class Step:
    """The model after `reverted` (None: none yet) joined the layers that went back, and what it costs then."""

    reverted: str | None
    cost: Cost
    plan: QuantPlan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"reverted": self.reverted, **self.cost.to_json()}


@dataclass(frozen=True)
class Mixed:
    """The calibration whose plans meet the limit, and the way there."""

    calibration: Calibration
    steps: Sequence[Step]
    limit: float
    unit: str
    precision: Revert

    @property
    def reverted(self) -> list[str]:
        """The layers that went back, in order."""
        return [step.reverted for step in self.steps if step.reverted is not None]

    def to_json(self) -> Mapping[str, Any]:
        """Plain values."""
        return {
            "max_drop": self.limit,
            "unit": self.unit,
            "precision": self.precision,
            "reverted": self.reverted,
            "steps": [step.to_json() for step in self.steps],
        }


@dataclass(frozen=True)
class Mixer:
    """How precision is mixed: what may be lost, what layers go back to, and how the loss is measured."""

    limit: float
    precision: Revert
    scheme: WeightScheme
    yardstick: Yardstick
    cache: Cache
    progress: Progress

    def meet(self, calibration: Calibration, order: Callable[[QuantPlan], Sequence[LayerCost]]) -> Mixed:
        """The calibration with as many of the dearest layers reverted as the limit asks for.

        `order` gives a plan's layers, the dearest first; it is asked only where the limit is not met at once. Raises
        StageError when it is not met with all but one layer reverted, or where the model decides nothing to count.
        """
        steps = [self._step(calibration, None)]
        layers = [] if self._met(steps[-1]) else [each.layer for each in order(steps[0].plan)]
        for done, layer in enumerate(layers[:-1]):
            self.progress(done, len(layers), f"max_drop: {layer} in {self.precision}")
            calibration = calibration.with_overrides([_override(layer, self.precision)])
            steps.append(self._step(calibration, layer))
            if self._met(steps[-1]):
                break
        if not self._met(steps[-1]):
            raise StageError(
                f"quantize.max_drop = {self.limit:g} cannot be met: with {len(steps) - 1} of {len(layers)} layers in "
                f"{self.precision} the drop is {steps[-1].cost.drop:g} {self.yardstick.unit} on "
                f"{steps[-1].cost.samples} calibration samples"
            )
        return Mixed(calibration, steps, self.limit, self.yardstick.unit, self.precision)

    def _met(self, step: Step) -> bool:
        if step.cost.drop is None:
            raise StageError(
                "quantize.max_drop counts decisions, and the model has none: no output of shape (n, classes); pin "
                "layers with [[quantize.override]] instead"
            )
        return step.cost.drop <= self.limit + 1e-9

    def _step(self, calibration: Calibration, layer: str | None) -> Step:
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.targets.onnxruntime import open_reference

        plan = calibration.plan(self.scheme)
        key = hashlib.sha256(f"whole {self.yardstick.digest()} {plan.digest()}".encode()).hexdigest()

        def measured() -> Cost:
            return self.yardstick.cost(open_reference(to_bytes(calibration.quantized(plan, self.scheme))))

        return Step(layer, self.cache.get(key, measured), plan)


def _override(layer: str, precision: Revert) -> Override:
    from edgeship.calibration.planning.overrides import Override

    reason = "it was reverted to meet quantize.max_drop"
    pattern = glob.escape(layer)
    return (
        Override(pattern, wide=True, reason=reason)
        if precision == "int16"
        else Override(pattern, stays_float=True, reason=reason)
    )
