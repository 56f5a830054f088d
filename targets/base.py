"""What a target is: a runtime that edgeship writes artifacts for, and how targets are found by name."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast, runtime_checkable

import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array, Finding, QuantRules, Session, WeightForm, WeightScheme

IoLayout = Literal["nchw", "nhwc"]
IoDtype = Literal["float32", "int8", "uint8"]
ENTRY_POINTS = "edgeship.targets"


@dataclass(frozen=True)
class ConvertOptions:
    """How an artifact meets the world; `io_layout` None is the target's own habit, `metadata` is written into it.

    `integer_only`: integer kernels wherever the runtime has one, for hardware without floating point; else quantized
    operators that its CPU kernels compute faster in real numbers are, between the same integers. None: for models that
    are integers from end to end, with inputs or outputs of integers, or out of a TFLite file.
    """

    io_layout: IoLayout | None = None
    io_dtype: IoDtype = "float32"
    metadata: Mapping[str, str] = field(default_factory=dict)
    integer_only: bool | None = None


@dataclass(frozen=True)
class Availability:
    """Whether a target's runtime can be imported here, its version, and the command that installs it."""

    installed: bool
    version: str
    install: str


@dataclass(frozen=True)
class IntegerShare:
    """Multiply-accumulates by who executes them in the graph the runtime really runs, and the layers left in float."""

    integer_macs: int
    total_macs: int
    float_layers: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The integer part, 0..1; 0 for a model without multiply-accumulates."""
        return self.integer_macs / self.total_macs if self.total_macs else 0.0


@runtime_checkable
class BorderSession(Session, Protocol):
    """A Session that also says what its artifact's own inputs and outputs mean, so that others can run the artifact:
    a timing loop without the adaptation, or a device that has nothing but the runtime.
    """

    def enter(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The artifact's inputs in its own order, layout and element types. Raises InputError for unfit feeds."""

    def leave(self, results: Sequence[Array]) -> dict[str, Array]:
        """The outputs by name, NCHW and float32, of what the artifact gave in its own order."""


@dataclass(frozen=True)
class OperatorTime:
    """How long one operator of an artifact takes, in microseconds, as the runtime executes it."""

    name: str
    operator: str
    us: float

    def to_json(self) -> dict[str, str | float]:
        """Plain values."""
        return {"name": self.name, "operator": self.operator, "us": round(self.us, 3)}


@runtime_checkable
class Profiler(Protocol):
    """A Target that can also tell where an artifact's time goes."""

    def profile(self, artifact: Path, threads: int = 1, runs: int = 50) -> list[OperatorTime]:
        """The time of each operator in the order they run. Raises InputError for an unusable file."""


@runtime_checkable
class Restricted(Protocol):
    """A Target whose runtime has no such thing as some option of a recipe's target table."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Why, by the option's name."""


class Target(Protocol):
    """A runtime that artifacts are made for. Importing a target's module must not import its runtime."""

    @property
    def name(self) -> str:
        """The file name of the module, and what `--target` takes."""

    @property
    def suffix(self) -> str:
        """The artifact's file suffix, with the dot."""

    @property
    def rules(self) -> QuantRules:
        """What the runtime's int8 kernels demand."""

    @property
    def weights(self) -> WeightScheme:
        """The weight scheme an artifact needs to run without saturation on every CPU the target names."""

    @property
    def forms(self) -> Sequence[WeightForm]:
        """The forms of weights that artifacts can have, which `quantize.scheme = "auto"` tries."""

    def availability(self) -> Availability:
        """Whether the runtime is installed here."""

    def check(self, model: ir.Model) -> list[Finding]:
        """Every node of a float or QDQ model that `convert` cannot take, with the reason."""

    def notes(self, model: ir.Model) -> list[Finding]:
        """Every node of a quantized model that the artifact computes in real numbers, with the reason."""

    def convert(self, model: ir.Model, options: ConvertOptions) -> bytes:
        """The artifact's bytes for a float or QDQ model, the same for the same arguments.

        Raises UnsupportedError with all findings of `check`, InputError for options that the model or the runtime does
        not allow. The model is not modified.
        """

    def reference(self, model: ir.Model) -> ir.Model:
        """What an artifact made of `model` must compute, as ONNX in float arithmetic: a static QDQ model itself.

        Of a model with int8 weights alone, with what the runtime rounds on its own put in.
        """

    def open(self, artifact: Path, threads: int = 1) -> Session:
        """The artifact, loaded in its real runtime with its real kernels. Raises InputError for an unusable file."""

    def integer_share(self, artifact: Path) -> IntegerShare:
        """Who executes the multiply-accumulates, read off the graph that the runtime executes."""


def names() -> Sequence[str]:
    """The names of all targets, own ones (files and folders beside this one) and installed ones, sorted."""
    import edgeship.targets as package

    own = {module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in {"base"}}
    own = {name for name in own if not name.startswith("_")}
    return sorted(own | {point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)})


def load(name: str) -> Target:
    """The target called `name`. Raises InputError with the names there are."""
    if name not in names():
        raise InputError(f"unknown target {name!r}; there are: {', '.join(names())}")
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return cast(Target, point.load())
    return cast(Target, importlib.import_module(f"edgeship.targets.{name}").TARGET)
