"""Returns ONNX models loaded in ONNX Runtime behind the Session protocol; the only file that opens one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.calibration.errors import InputError, StageError, UnsupportedError
from edgeship.calibration.graph.onnx_file import read_proto
from edgeship.calibration.types import Array, Finding, TensorInfo
from edgeship.targets.onnxruntime.border import Port, read_ports

if TYPE_CHECKING:
    import onnxruntime

_DTYPES = {
    "tensor(bool)": np.bool_, "tensor(double)": np.float64, "tensor(float)": np.float32, "tensor(float16)": np.float16,
    "tensor(int16)": np.int16, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64, "tensor(uint8)": np.uint8,
}  # fmt: skip
_SOURCE = re.compile(r"/\S+\.(?:cc|h):\d+ .*?\) (?=[A-Z])")
"""The C++ file, line and function that ONNX Runtime puts before some of its messages."""
_SILENT = 4
"""ONNX Runtime's severity "fatal": what else it would print on stderr reaches the user as an error's sentence."""


def session_options(threads: int, *, optimise: bool) -> onnxruntime.SessionOptions:
    """Options that give the same results and bother nobody: `threads` without spinning, nothing printed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    return options


def start(model: bytes, where: str, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Raises UnsupportedError with all nodes whose operator ONNX Runtime lacks, InputError with its reason when it refuses
    the model for another one.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base than Exception
        findings = _unknown_operators(model)
        if findings:
            raise UnsupportedError(f"ONNX Runtime cannot load {where}", findings) from error
        raise InputError(f"ONNX Runtime cannot load {where}: {reason(error)}") from error


def _unknown_operators(model: bytes) -> list[Finding]:
    import onnx
    import onnx_ir as ir

    from edgeship.targets.onnxruntime.operators import without_kernel

    try:
        return without_kernel(ir.from_proto(onnx.load_model_from_string(model)))
    except Exception:  # a model that cannot even be read has its reason already
        return []


def reason(error: Exception) -> str:
    """ONNX Runtime's message in one line, without its error code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = _SOURCE.sub("", " ".join(lines)) or type(error).__name__
    return text.split(" : ", 2)[-1][:400] if text.startswith("[ONNXRuntimeError]") else text[:400]


def model_bytes(model: bytes | Path) -> tuple[bytes, str]:
    """The serialized model without external data, and its name. Raises InputError for a file that is no model."""
    if isinstance(model, bytes):
        return model, "the model"
    content: bytes = read_proto(model).SerializeToString(deterministic=True)
    return content, str(model)


class OnnxSession:
    """A model in ONNX Runtime, float32 NCHW outside whatever it is inside."""

    def __init__(
        self,
        model: bytes | Path,
        threads: int = 1,
        weights: Mapping[str, Array] | None = None,
        *,
        optimise: bool = True,
        integers: bool = True,
    ) -> None:
        """Raises as `start` does. `weights`: by name the values of initializers that are external data of `model`."""
        import onnxruntime

        content, self._where = model_bytes(model)
        options = session_options(threads, optimise=optimise)
        if weights:
            held = [onnxruntime.OrtValue.ortvalue_from_numpy(values) for values in weights.values()]
            options.add_external_initializers(list(weights), held)
        if not integers:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = start(content, self._where, options)
        self._ports = read_ports(self._session.get_modelmeta().custom_metadata_map)
        self._inputs = tuple(self._info(value) for value in self._session.get_inputs())
        self._outputs = tuple(self._info(value) for value in self._session.get_outputs())
        self._dtypes = {value.name: _dtype(value) for value in self._session.get_inputs()}

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The inputs, as the caller sees them."""
        return self._inputs

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs, as the caller sees them."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for one batch. Raises InputError for feeds that do not fit, StageError when running fails."""
        adapted = {info.name: values for info, values in zip(self._inputs, self.enter(feeds), strict=True)}
        try:
            results = self._session.run(None, adapted)
        except Exception as error:  # see `start`
            raise StageError(f"ONNX Runtime failed while running {self._where}: {reason(error)}") from error
        return self.leave(results)

    def enter(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The artifact's own inputs. Raises InputError for feeds that do not fit."""
        self._check(feeds)
        return [
            self._ports.get(info.name, Port())
            .enter(np.asarray(feeds[info.name]))
            .astype(self._dtypes[info.name], copy=False)
            for info in self._inputs
        ]

    def leave(self, results: Sequence[Array]) -> dict[str, Array]:
        """The outputs by name of the artifact's own."""
        return {
            info.name: self._ports.get(info.name, Port()).leave(np.asarray(values)).astype(info.dtype, copy=False)
            for info, values in zip(self._outputs, results, strict=True)
        }

    def _info(self, value: Any) -> TensorInfo:
        shape = tuple(side if isinstance(side, int) else -1 for side in value.shape)
        port = self._ports.get(value.name, Port())
        if port.layout == "nhwc":
            shape = tuple(shape[place] for place in (0, 3, 1, 2))
        dtype = _dtype(value)
        seen = np.dtype(np.float32) if port.dtype != "float32" or dtype.kind == "f" else dtype
        return TensorInfo(value.name, shape, seen)

    def _check(self, feeds: Mapping[str, Array]) -> None:
        names = [info.name for info in self._inputs]
        if set(feeds) != set(names):
            raise InputError(f"{self._where} takes the inputs {sorted(names)}; given: {sorted(feeds)}")
        for info in self._inputs:
            seen = np.shape(feeds[info.name])
            fits = len(seen) == len(info.shape) and all(
                want in (-1, got) for want, got in zip(info.shape, seen, strict=True)
            )
            if not fits or math.prod(seen) == 0:
                raise InputError(
                    f"{self._where}: input {info.name!r} has the shape {list(seen)}; accepted: {list(info.shape)}"
                )


def _dtype(value: Any) -> np.dtype[Any]:
    if value.type not in _DTYPES:
        raise InputError(f"{value.name!r} is a {value.type}; accepted: tensors of numbers")
    return np.dtype(_DTYPES[value.type])


def open_reference(model: bytes | Path, threads: int = 1, weights: Mapping[str, Array] | None = None) -> OnnxSession:
    """The model with graph optimisations off: a QDQ graph in float arithmetic with exact rounding points."""
    return OnnxSession(model, threads, weights, optimise=False)


def open_simulation(model: bytes) -> OnnxSession:
    """The model optimised as a float one, its QDQ pairs left alone: faster than the reference, and now and then a step
    off where a sum rounded otherwise lies on an integer's border.
    """
    return OnnxSession(model, 1, integers=False)


def open_float(model: bytes, weights: Mapping[str, Array] | None = None) -> OnnxSession:
    """A float model, optimised, for calibration to run over samples (an `OpenModel`)."""
    return OnnxSession(model, 1, weights)
