"""TensorFlow Lite (LiteRT): ONNX written straight into its flatbuffer, and its interpreter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.targets.base import Availability, ConvertOptions, IntegerShare, OperatorTime

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.types import Finding, QuantRules, Session, WeightForm, WeightScheme
    from edgeship.targets.tflite.micro import CSource

INSTALL = "pip install 'edgeship[tflite]'"
RUNTIMES = ("ai-edge-litert", "tensorflow")


class TFLiteTarget:
    """The Target protocol for TFLite."""

    name = "tflite"
    suffix = ".tflite"
    weights: WeightScheme = "full"
    forms: Sequence[WeightForm] = ("full",)

    @cached_property
    def rules(self) -> QuantRules:
        """What TFLite's int8 kernels demand, assembled from the operators' entries."""
        from edgeship.targets.tflite.rules import rules

        return rules()

    def availability(self) -> Availability:
        """Whether a runtime is installed: ai-edge-litert, else TensorFlow."""
        for package in RUNTIMES:
            if importlib.util.find_spec(package.replace("-", "_")) is not None:
                return Availability(True, f"{package} {_version(package)}", INSTALL)
        return Availability(False, "", INSTALL)

    def check(self, model: ir.Model) -> list[Finding]:
        """Every node that cannot be converted, with the reason."""
        from edgeship.targets.tflite.convert import check

        return check(model)

    def notes(self, model: ir.Model) -> list[Finding]:
        """The nodes between quantized tensors that have no kernel for these, with the reason."""
        from edgeship.targets.tflite.convert import notes

        return notes(model)

    def convert(self, model: ir.Model, options: ConvertOptions) -> bytes:
        """The TFLite file's bytes, NHWC unless the options say otherwise.

        The model is let go once it is read, so that its memory is free for the file if the caller keeps no reference.
        """
        from edgeship.targets.tflite.convert import written

        conversion = written(model, options)
        del model
        return conversion.finish()

    def reference(self, model: ir.Model) -> ir.Model:
        """The model, with the activations of layers whose weights alone are int8 rounded at run time."""
        from edgeship.targets.tflite.hybrid import simulated

        return simulated(model)

    def c_source(self, content: bytes, name: str) -> CSource:
        """The artifact as C for TensorFlow Lite Micro; raises UnsupportedError where that cannot run it."""
        from edgeship.targets.tflite.micro import c_source

        return c_source(content, name)

    def open(self, artifact: Path, threads: int = 1) -> Session:
        """The artifact in the interpreter, with the kernels users get by default."""
        from edgeship.targets.tflite.session import TFLiteSession

        return TFLiteSession(artifact, threads)

    def integer_share(self, artifact: Path) -> IntegerShare:
        """The share of multiply-accumulates on integer tensors."""
        from edgeship.targets.tflite.share import integer_share

        return integer_share(artifact)

    def profile(self, artifact: Path, threads: int = 1, runs: int = 50) -> list[OperatorTime]:
        """The time of each operator, timed alone."""
        from edgeship.targets.tflite.profile import profile

        return profile(artifact, threads, runs)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


TARGET = TFLiteTarget()
