"""Pair-limited weights: the plan without pairs that overflow 16 bits; `planning/pair_limit.py` has the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeship.calibration.observing.collect import Statistic
from edgeship.calibration.planning.pair_limit import limit_pairs
from edgeship.calibration.refine import Refinement
from edgeship.calibration.types import QuantPlan, WeightScheme


class PairLimit(Refinement):
    """The refinement: needs nothing but the weights."""

    step = "weights"

    def refine(
        self, model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic], weights: WeightScheme
    ) -> QuantPlan:
        """The plan with pair-limited weights."""
        return limit_pairs(model, plan)


REFINEMENT = PairLimit()
