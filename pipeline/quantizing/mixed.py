"""Returns the mixed-precision model that costs at most so much: the dearest layers go back to float, or to int16.

Layers are reverted one after the other, until the whole quantized model meets the limits on the calibration samples.
The next one is that with the largest

    gain = (what it costs by itself + what reverting it now brings to the whole model) / 2

The second alone would pass over two layers that help only together, such as both ends of a tensor; the first alone
takes one that repeats what another spoils. Candidates are measured in the order of their last known gains, at first
what they cost by themselves, and no further than to one that is not below the next (lazy greedy: Minoux, 1978,
"Accelerated greedy algorithms for maximizing submodular set functions"). The evaluation samples have no part in it:
they judge what comes out.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeship.calibration.errors import StageError
from edgeship.pipeline.quantizing.limits import Limits
from edgeship.pipeline.quantizing.yardstick import Cost, Yardstick

if TYPE_CHECKING:
    from edgeship.calibration.planning.overrides import Override
    from edgeship.calibration.quantize import Calibration
    from edgeship.calibration.types import QuantPlan, WeightScheme
    from edgeship.pipeline.quantizing.sensitivity import Cache, LayerCost
    from edgeship.pipeline.stage import Progress

Revert = Literal["float", "int16"]
TRIED = 8
"""Candidates that are measured for one step at most."""


@dataclass(frozen=True)
class Step:
    """The model after `reverted` (None: none yet) joined the layers that went back, and what it costs then."""

    reverted: str | None
    cost: Cost
    plan: QuantPlan
    calibration: Calibration

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"reverted": self.reverted, **self.cost.to_json()}


@dataclass(frozen=True)
class Mixed:
    """The calibration whose plans meet the limits, and the way there."""

    steps: Sequence[Step]
    limits: Limits
    unit: str
    precision: Revert

    @property
    def calibration(self) -> Calibration:
        """That of the last step."""
        return self.steps[-1].calibration

    @property
    def reverted(self) -> list[str]:
        """The layers that went back, in order."""
        return [step.reverted for step in self.steps if step.reverted is not None]

    def to_json(self) -> Mapping[str, Any]:
        """Plain values."""
        return {
            **asdict(self.limits),
            "unit": self.unit,
            "precision": self.precision,
            "reverted": self.reverted,
            "steps": [step.to_json() for step in self.steps],
        }


@dataclass(frozen=True)
class Mixer:
    """How precision is mixed: what may be lost, what layers go back to, and how the loss is measured."""

    limits: Limits
    precision: Revert
    scheme: WeightScheme
    yardstick: Yardstick
    cache: Cache
    progress: Progress

    def meet(self, calibration: Calibration, order: Callable[[QuantPlan], Sequence[LayerCost]]) -> Mixed:
        """The calibration with as many layers reverted as the limits ask for.

        `order` gives a plan's layers, the dearest first; it is asked only where a limit is not met at once. Raises
        StageError where one is not met with all but one layer reverted, or where the model decides nothing to count.
        """
        steps = [self._step(calibration, None)]
        missed = self._missed(steps[-1])
        alone = {each.layer: self.limits.worth(each.cost) for each in order(steps[0].plan)} if missed else {}
        gains = dict(alone)
        while missed and len(gains) > 1:
            steps.append(self._best(steps[-1], alone, gains, len(steps)))
            missed = self._missed(steps[-1])
        if missed:
            count = len(steps) - 1
            raise StageError(
                f"{'; '.join(missed)}, with {count} of {count + len(gains)} layers in {self.precision}, on "
                f"{steps[-1].cost.samples} calibration samples"
            )
        return Mixed(steps, self.limits, self.yardstick.unit, self.precision)

    def _best(self, before: Step, alone: Mapping[str, float], gains: dict[str, float], number: int) -> Step:
        """The step with the largest gain; its layer leaves `gains`, what was measured of others is noted there."""
        tried: dict[str, Step] = {}
        while True:
            layer = max(gains, key=lambda each: gains[each])
            if layer in tried:
                break
            if len(tried) == min(TRIED, len(gains)):
                layer = max(tried, key=lambda each: gains[each])
                break
            self.progress(len(tried), TRIED, f"layer {number} to go back to {self.precision}: {layer}")
            tried[layer] = self._step(before.calibration.with_overrides([_override(layer, self.precision)]), layer)
            brought = self.limits.worth(before.cost) - self.limits.worth(tried[layer].cost)
            gains[layer] = (alone[layer] + brought) / 2
        del gains[layer]
        return tried[layer]

    def _missed(self, step: Step) -> list[str]:
        return self.limits.missed(step.cost, self.yardstick.unit)

    def _step(self, calibration: Calibration, layer: str | None) -> Step:
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.targets.onnxruntime import open_reference

        plan = calibration.plan(self.scheme)
        key = hashlib.sha256(f"whole {self.yardstick.digest()} {plan.digest()}".encode()).hexdigest()

        def measured() -> Cost:
            return self.yardstick.cost(open_reference(to_bytes(calibration.quantized(plan, self.scheme))))

        return Step(layer, self.cache.get(key, measured), plan, calibration)


def _override(layer: str, precision: Revert) -> Override:
    from edgeship.calibration.planning.overrides import Override

    reason = "it was reverted to meet the limits of [quantize]"
    pattern = glob.escape(layer)
    return (
        Override(pattern, wide=True, reason=reason)
        if precision == "int16"
        else Override(pattern, stays_float=True, reason=reason)
    )
