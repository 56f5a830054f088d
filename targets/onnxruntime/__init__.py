"""Returns the target `onnxruntime`: ONNX files that ONNX Runtime's CPU provider executes with integer kernels."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the runtime loads: models are nobody else's business

from edgeship.targets.onnxruntime.session import OnnxSession, open_float, open_reference, open_simulation
from edgeship.targets.onnxruntime.target import TARGET

__all__ = ["TARGET", "OnnxSession", "open_float", "open_reference", "open_simulation"]
