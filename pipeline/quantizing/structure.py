"""Returns what in a model's structure int8 suffers from, and the model with the fixes that the recipe accepts."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.quantizing.calibrated import Quantized, planned

if TYPE_CHECKING:
    from edgeship.calibration.diagnosis.structure import Trouble
    from edgeship.calibration.observing.collect import Statistic
    from edgeship.calibration.planning.overrides import Override
    from edgeship.calibration.samples.data import Samples

LOOKED_AT = 64
"""Samples that the outputs are looked at on."""


def with_fixes(result: Quantized, samples: Samples, accepted: Sequence[str]) -> tuple[Quantized, Mapping[str, Any]]:
    """The quantized models with the `accepted` fixes, and what plan.json says of the structure."""
    from edgeship.calibration.diagnosis.structure import (
        ChannelSpans,
        TopGaps,
        quantizable_outputs,
        summed_up,
        troubles,
    )
    from edgeship.calibration.observing.collect import observe
    from edgeship.calibration.samples.checks import to_json
    from edgeship.calibration.types import Finding
    from edgeship.targets.onnxruntime import open_float

    seen = result.calibration
    outputs = {name: ChannelSpans() for name in quantizable_outputs(seen.model)}
    gaps = {name: TopGaps() for name in outputs}
    statistics: dict[str, list[Statistic]] = {name: [spans, gaps[name]] for name, spans in outputs.items()}
    observe(seen.model, samples.take(min(LOOKED_AT, len(samples))), statistics, open_float)
    found = troubles(seen.model, result.plan, seen.observers, outputs, gaps)
    fixed = [trouble for trouble in found if trouble.fix in accepted]
    if fixed:
        result = planned(
            seen.with_overrides([wish for trouble in fixed for wish in _overrides(trouble)]), tuple(result.plans)
        )
    left = summed_up(trouble for trouble in found if trouble.fix not in accepted)
    left += [
        Finding("quantize.fixes", f'"{fix}" changes nothing', "nothing that it would mend", "leaving it out", "note")
        for fix in accepted
        if not any(trouble.fix == fix for trouble in found)
    ]
    return result, {
        "findings": to_json(left),
        "fixed": [{"fix": trouble.fix, "nodes": list(trouble.nodes)} for trouble in fixed],
    }


def _overrides(trouble: Trouble) -> list[Override]:
    from edgeship.calibration.diagnosis.structure import WIDE_FIXES
    from edgeship.calibration.planning.overrides import Override

    reason = f"quantize.fixes accepts {trouble.fix}"
    wide = trouble.fix in WIDE_FIXES
    return [Override(glob.escape(node), stays_float=not wide, wide=wide, reason=reason) for node in trouble.nodes]
