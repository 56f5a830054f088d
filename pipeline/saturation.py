"""Returns which layers of a target's artifact can clip on x86 without VNNI, and how often they do on real samples.

Proof and count are `edgeship.calibration.diagnosis.saturation`'s; they do not depend on the CPU of this machine. A
target whose kernels add pairs of products in 16 bits says so by asking for pair-limited weights; no other target is
looked at.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeship.targets.base import load

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples

MOST_SAMPLES = 16
"""Samples the emulation runs on: what can clip is proved without any, and a layer that clips does so on most images."""


def saturation_facts(target: str, model: ir.Model, samples: Samples) -> dict[str, Any] | None:
    """The layers that can clip, with counts, of the QDQ model an artifact was made from; None where nothing clips.

    uint8 weights go through kernels that add in 32 bits: none of their layers clips.
    """
    if load(target).weights != "pair_limited":
        return None
    from edgeship.calibration.diagnosis.saturation import saturation
    from edgeship.calibration.writing.qdq import WEIGHTS_KEY
    from edgeship.targets.onnxruntime import open_float

    if model.metadata_props.get(WEIGHTS_KEY) == "unsigned":
        return {"samples": 0, "layers_clipping": 0, "layers": []}
    found = saturation(model, islice(samples, MOST_SAMPLES), open_float)
    return {
        "samples": min(len(samples), MOST_SAMPLES),
        "layers_clipping": sum(layer.clipped > 0 for layer in found),
        "layers": [
            {
                "layer": layer.node,
                "channels": len(layer.channels),
                "pairs": layer.pairs,
                "clipped": layer.clipped,
                "sums": layer.sums,
            }
            for layer in found
        ],
    }
