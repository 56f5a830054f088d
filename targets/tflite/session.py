"""The TFLite interpreter behind the Session protocol: ONNX names, ONNX layout and real numbers outside, whatever is
inside.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array, TensorInfo
from edgeship.targets.tflite.flatfile import description, load

Kernels = Literal["default", "builtin", "reference"]
"""default: as users run it, XNNPACK where it applies; builtin: TFLite's optimized kernels alone; reference: the plain
ones.
"""


@dataclass(frozen=True)
class Port:
    """One input or output: the interpreter's tensor, and how it differs from the caller's."""

    info: TensorInfo
    index: int
    axes: tuple[int, ...]
    scale: float
    zero_point: int
    dtype: np.dtype[Any]
    dynamic: bool

    def inward(self, values: Array) -> Array:
        """The caller's values as the artifact takes them."""
        values = np.transpose(values, self.axes)
        if self.scale:
            limits = np.iinfo(self.dtype)
            values = np.clip(np.rint(values / np.float32(self.scale)) + self.zero_point, limits.min, limits.max)
        return np.asarray(values, self.dtype, order="C")  # ascontiguousarray would make a scalar a vector

    def outward(self, values: Array) -> Array:
        """The artifact's values as the caller knows them."""
        if self.scale:
            values = (values.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)
        return np.asarray(np.transpose(values, np.argsort(self.axes)), order="C")


class TFLiteSession:
    """A TFLite model, loaded and ready."""

    def __init__(
        self, path: Path, threads: int = 1, kernels: Kernels = "default", *, engine: str | None = None
    ) -> None:
        """Loads `path`; `engine` names the package whose interpreter is used (default: the first that is installed).

        Raises InputError for a file that is not a TFLite model or that the interpreter refuses, StageError without a
        runtime.
        """
        described = description(load(path))
        try:
            with _without_chatter():
                self._interpreter = _interpreter(path, threads, kernels, engine)
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: the TFLite interpreter cannot run it: {_first_line(error)}") from error
        ins, outs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._inputs = _ports(ins, described["inputs"] if described else None)
        self._outputs = _ports(outs, described["outputs"] if described else None)
        self.metadata: Mapping[str, str] = described["metadata"] if described else {}

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The inputs, as the caller sees them."""
        return [port.info for port in self._inputs]

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs, as the caller sees them."""
        return [port.info for port in self._outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises InputError for a missing input or a shape the model does not take."""
        values = self.enter(feeds)
        self._fit(values)
        for port, value in zip(self._inputs, values, strict=True):
            self._interpreter.set_tensor(port.index, value)
        self.invoke()
        return self.leave([self._value(port.index) for port in self._outputs])

    def invoke(self) -> None:
        """Computes once more from the inputs of the last `run`; its outputs stay inside."""
        try:
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise StageError(f"the TFLite interpreter failed: {_first_line(error)}") from error

    def enter(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The artifact's own inputs. Raises InputError for a missing input or a shape the model does not take."""
        return [self._fed(port, feeds) for port in self._inputs]

    def leave(self, results: Sequence[Array]) -> dict[str, Array]:
        """The outputs by name of the artifact's own."""
        return {port.info.name: port.outward(value) for port, value in zip(self._outputs, results, strict=True)}

    def _value(self, index: int) -> Array:
        """The content of an output; the interpreter cannot read a tensor without elements, such as boxes not found."""
        try:
            value: Array = self._interpreter.get_tensor(index)
        except ValueError:
            found = next(detail for detail in self._interpreter.get_output_details() if detail["index"] == index)
            if 0 not in found["shape"]:
                raise
            return np.zeros(found["shape"], found["dtype"])
        return value

    def _fed(self, port: Port, feeds: Mapping[str, Array]) -> Array:
        name, shape = port.info.name, port.info.shape
        if name not in feeds:
            raise InputError(f"input {name!r} is missing; given: {', '.join(feeds) or 'nothing'}")
        values = np.asarray(feeds[name])
        if values.ndim != len(shape) or any(
            want not in (-1, size) for want, size in zip(shape, values.shape, strict=True)
        ):
            raise InputError(f"input {name!r} has shape {list(values.shape)}; the model takes {list(shape)}")
        return port.inward(values)

    def _fit(self, values: Sequence[Array]) -> None:
        """Resizes inputs of dynamic shape where the values need it."""
        sizes = {detail["index"]: tuple(detail["shape"]) for detail in self._interpreter.get_input_details()}
        changed = [
            (port, value.shape)
            for port, value in zip(self._inputs, values, strict=True)
            if port.dynamic and sizes[port.index] != value.shape
        ]
        for port, shape in changed:
            self._interpreter.resize_tensor_input(port.index, shape)
        if changed:
            self._interpreter.allocate_tensors()


def _ports(details: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]] | None) -> list[Port]:
    """The artifact's inputs or outputs, with the layout and meaning that its metadata gives; without, as they are."""
    if described is None or len(described) != len(details):
        return [_port(detail, detail["name"], tuple(range(len(detail["shape"]))), 0.0, 0) for detail in details]
    return [
        _port(
            detail, entry["name"], tuple(entry["axes"]), float(entry.get("scale", 0.0)), int(entry.get("zero_point", 0))
        )
        for detail, entry in zip(details, described, strict=True)
    ]


def _port(detail: Mapping[str, Any], name: str, axes: tuple[int, ...], scale: float, zero_point: int) -> Port:
    signature = [int(s) for s in detail.get("shape_signature", detail["shape"])]
    dtype = np.dtype(detail["dtype"])
    shape = tuple(signature[axes.index(axis)] for axis in range(len(axes)))
    info = TensorInfo(name, shape, np.dtype(np.float32) if scale else dtype)
    return Port(info, int(detail["index"]), axes, scale, zero_point, dtype, -1 in signature)


def _interpreter(path: Path, threads: int, kernels: Kernels, engine: str | None) -> Any:
    module = _engine(engine)
    resolvers = module.OpResolverType
    resolver = {
        "default": resolvers.AUTO,
        "builtin": resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        "reference": resolvers.BUILTIN_REF,
    }[kernels]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(?s).*tf\.lite\.Interpreter is deprecated")
            return module.Interpreter(model_path=str(path), num_threads=threads, experimental_op_resolver_type=resolver)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: the TFLite interpreter cannot load it: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps what the runtime's C++ logger writes while it loads a model off stderr; failures arrive as exceptions."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _engine(name: str | None) -> Any:
    """The interpreter module of `name`; by default ai-edge-litert's, and TensorFlow's where that is not installed."""
    import importlib

    modules = {"ai-edge-litert": "ai_edge_litert.interpreter", "tensorflow": "tensorflow.lite.python.interpreter"}
    for package, module in modules.items():
        if name in (None, package):
            try:
                return importlib.import_module(module)
            except ImportError:
                continue
    raise StageError(f"no TFLite runtime ({name or ' or '.join(modules)}) is installed; pip install 'edgeship[tflite]'")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
