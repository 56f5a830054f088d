"""Returns the target `onnxruntime`: ONNX files that ONNX Runtime's CPU provider executes with integer kernels."""

from __future__ import annotations

from edgeship.targets.onnxruntime.session import OnnxSession, open_float, open_reference
from edgeship.targets.onnxruntime.target import TARGET

__all__ = ["TARGET", "OnnxSession", "open_float", "open_reference"]
