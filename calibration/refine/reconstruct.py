"""Layer reconstruction: integers chosen such that each layer gives back what the float layer computes.

    min over integers q of  E[(s q . x_hat - w . x)^2],   b' = b + w . E[x] - s q . E[x_hat]

with x what the float model feeds the layer and x_hat what the quantized layers before it, already rounded for good,
feed it: errors made so far are made good where they can be. Layer by layer as AdaRound does (Nagel et al., 2020, "Up or
Down? Adaptive Rounding for Post-Training Quantization", section 3.4, asymmetric reconstruction), but solved by
coordinate descent on the integers themselves (`learned/descent.py`): no relaxation, no learning rate, and a pair of
weights that is limited is rounded inside its limit, at the scale that suits the channel best.

It runs the model in torch (the extra `torch`), on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.graph.operators import value_name
from edgeship.calibration.learned import require_torch
from edgeship.calibration.learned.reconstruct_options import ReconstructOptions
from edgeship.calibration.observing.collect import Progress, Statistic
from edgeship.calibration.refine import Refinement
from edgeship.calibration.types import Array, QuantPlan, QuantRules, WeightScheme


class Kept:
    """At most `most` of the batches it is shown, evenly spread over all of them, as they are."""

    def __init__(self, most: int) -> None:
        self._most, self._stride, self._seen = max(most, 1), 1, 0
        self.batches: list[Array] = []

    def update(self, values: Array) -> None:
        """Takes in one batch."""
        if self._seen % self._stride == 0:
            self.batches.append(values.copy())
        self._seen += 1
        if len(self.batches) > self._most:
            self.batches = self.batches[::2]
            self._stride *= 2


class Reconstruct(Refinement):
    """The refinement: keeps inputs during calibration, then walks through the layers with them."""

    step = "weights"
    settles_biases = True

    def __init__(self, options: ReconstructOptions | None = None, progress: Progress | None = None) -> None:
        self._options = options or ReconstructOptions()
        self._progress = progress
        self._report: dict[str, Any] = {}

    def configured(self, options: object, progress: Progress | None) -> Refinement:
        """One with these options. Raises InputError for options of another kind."""
        if options is not None and not isinstance(options, ReconstructOptions):
            raise InputError(f"refinement reconstruct takes ReconstructOptions, not {type(options).__name__}")
        return Reconstruct(options, progress)

    def statistics(self, model: ir.Model, rules: QuantRules) -> dict[str, Statistic]:
        """Something that keeps samples of every input, as many as half of the memory holds."""
        require_torch('refine = ["reconstruct"]')
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        most = self._options.memory_mb * 2**20 // 2 // max(sum(map(_bytes, inputs)), 1)
        return {value_name(value): Kept(most) for value in inputs}

    def refine(
        self, model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic], weights: WeightScheme
    ) -> QuantPlan:
        """The plan with reconstructed layers: other integers, scales where pairs are limited, and biases."""
        from edgeship.calibration.learned.reconstruction import reconstruct

        kept = {name: statistic for name, statistic in seen.items() if isinstance(statistic, Kept)}
        if not kept or not all(each.batches for each in kept.values()):
            raise StageError("no inputs were kept, which layer reconstruction needs")
        count = min(len(each.batches) for each in kept.values())
        samples = [{name: each.batches[i] for name, each in kept.items()} for i in range(count)]
        refined, layers = reconstruct(model, plan, samples, weights, self._options, self._progress)
        self._report[weights] = [layer.to_json() for layer in layers]
        return refined

    def report(self) -> Mapping[str, Any]:
        """Each layer's error on held-out samples before and after, by weight scheme."""
        return self._report


def _bytes(value: ir.Value) -> int:
    sides = [side if isinstance(side, int) else 1 for side in value.shape or ()]
    size = 4
    for side in sides:
        size *= side
    return size


REFINEMENT = Reconstruct()
