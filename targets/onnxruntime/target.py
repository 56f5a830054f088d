"""Returns the target `onnxruntime`. Importing this file does not import the runtime."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.readback import AXIS_OPSET, read_back, with_operators
from edgeship.calibration.types import Finding, QuantRules, WeightForm, WeightScheme
from edgeship.calibration.writing.qdq import WEIGHTS_KEY
from edgeship.targets.base import Availability, ConvertOptions, IntegerShare, OperatorTime
from edgeship.targets.onnxruntime.border import change_border, check_border
from edgeship.targets.onnxruntime.dynamic import make_dynamic, simulated
from edgeship.targets.onnxruntime.float_layers import keep_float
from edgeship.targets.onnxruntime.operators import without_kernel
from edgeship.targets.onnxruntime.rules import RULES
from edgeship.targets.onnxruntime.session import OnnxSession, session_options, start
from edgeship.targets.onnxruntime.unsigned import make_unsigned


class OnnxRuntime:
    """ONNX Runtime on CPUs: QDQ ONNX with unsigned activations, weights that no x86 CPU clips."""

    @property
    def name(self) -> str:
        """The folder's name, and what `--target` takes."""
        return "onnxruntime"

    @property
    def suffix(self) -> str:
        """The artifact's file suffix."""
        return ".onnx"

    @property
    def rules(self) -> QuantRules:
        """What the int8 kernels demand."""
        return RULES

    @property
    def weights(self) -> WeightScheme:
        """Pair-limited: x86 without VNNI adds two products in 16 bits (docs: saturation)."""
        return "pair_limited"

    @property
    def forms(self) -> Sequence[WeightForm]:
        """All: int8 weights of the full range, pair-limited ones, and uint8 ones."""
        return ("pair_limited", "unsigned", "full")

    @property
    def refused(self) -> Mapping[str, str]:
        """What a recipe cannot ask of it."""
        return {
            "integer_only": "ONNX Runtime chooses its kernels by itself",
            "c_array": "ONNX Runtime reads files, and has no form in C",
        }

    def availability(self) -> Availability:
        """Whether ONNX Runtime is installed here."""
        install = "pip install onnxruntime"
        try:
            return Availability(True, importlib.metadata.version("onnxruntime"), install)
        except importlib.metadata.PackageNotFoundError:
            return Availability(False, "", install)

    def check(self, model: ir.Model) -> list[Finding]:
        """Every node without a kernel; or, when all have one, what ONNX Runtime says on loading the model."""
        return without_kernel(model) or _refused(to_bytes(model))

    def notes(self, model: ir.Model) -> list[Finding]:
        """None: which kernels run is ONNX Runtime's choice at load, `integer_share` reads it off."""
        del model
        return []

    def convert(self, model: ir.Model, options: ConvertOptions) -> bytes:
        """The artifact's bytes: activations unsigned, the border as asked for, facts in the metadata.

        Raises UnsupportedError with all findings, InputError for options that the model or the runtime does not allow.
        """
        unfit = [*check_border(model.graph, options), *_unknown(options)]
        if unfit:
            raise InputError(f"onnxruntime cannot take this model so: {'; '.join(str(finding) for finding in unfit)}")
        findings = without_kernel(model)
        if not findings:
            content = _converted(model, options)
            findings = _refused(content)
        if findings:
            raise UnsupportedError("onnxruntime cannot take this model:", findings)
        return content

    def reference(self, model: ir.Model) -> ir.Model:
        """The model, with the activations of layers whose weights alone are int8 rounded at run time, and with the
        operators that the artifact has where a QDQ model computes them in single operations.
        """
        return simulated(with_operators(model))

    def open(self, artifact: Path, threads: int = 1) -> OnnxSession:
        """The artifact with all of ONNX Runtime's optimisations, on the CPU."""
        return OnnxSession(artifact, threads)

    def integer_share(self, artifact: Path) -> IntegerShare:
        """Who executes the multiply-accumulates in the optimised graph."""
        from edgeship.targets.onnxruntime.share import integer_share

        return integer_share(artifact)

    def profile(self, artifact: Path, threads: int = 1, runs: int = 50) -> list[OperatorTime]:
        """The time of each kernel, from ONNX Runtime's profiler."""
        from edgeship.targets.onnxruntime.profile import profile

        return profile(artifact, threads, runs)


def _read_back(model: ir.Model) -> ir.Model:
    """QOperator models as QDQ, which ONNX Runtime fuses better; scales per channel need opset 13 there."""
    return read_back(model) if model.opset_imports.get("", 0) >= AXIS_OPSET else model


def _converted(model: ir.Model, options: ConvertOptions) -> bytes:
    model = _read_back(model).clone()
    make_unsigned(model, weights=model.metadata_props.get(WEIGHTS_KEY) == "unsigned")
    make_dynamic(model)
    keep_float(model)
    change_border(model, options)
    model.metadata_props.update(options.metadata)
    ordered = sorted(model.metadata_props.items())
    model.metadata_props.clear()
    model.metadata_props.update(ordered)
    model.producer_name, model.producer_version = "edgeship", ""
    return to_bytes(model)


def _unknown(options: ConvertOptions) -> list[Finding]:
    if not options.integer_only:
        return []
    return [Finding("integer_only", TARGET.refused["integer_only"], "true", "false, or left out")]


def _refused(content: bytes) -> list[Finding]:
    try:
        start(content, "the model", session_options(1, optimise=False))
    except InputError as error:
        return [Finding("model", str(error))]
    return []


TARGET = OnnxRuntime()
