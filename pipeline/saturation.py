"""Returns which layers of a target's artifact can clip on x86 without VNNI, and how often they do on real samples.

Proof and count are `edgeship.calibration.saturation`'s; they do not depend on the CPU of this machine. A target whose
kernels add pairs of products in 16 bits says so by asking for pair-limited weights; no other target is looked at.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.targets.base import load

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Samples

MOST_SAMPLES = 16
"""Samples the emulation runs on: what can clip is proved without any, and a layer that clips does so on most images."""


def saturation_facts(target: str, quantized: Path, samples: Samples) -> dict[str, Any] | None:
    """The layers that can clip, with counts, for the QDQ model an artifact was made from; None where nothing clips."""
    if load(target).weights != "pair_limited":
        return None
    from edgeship.calibration.onnx_file import load_onnx
    from edgeship.calibration.saturation import saturation
    from edgeship.targets.onnxruntime import open_float

    model = load_onnx(quantized)
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
