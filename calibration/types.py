"""The words the three packages share: tensors, quantization parameters, rules, plans, findings and sessions.

Affine quantization (Jacob et al., 2018, eq. 1): real = scale * (integer - zero_point).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]
EXACT_ROW = 4096
"""Elements of a row of 8-bit integers whose squares float32 adds up exactly at a root mean square of 64, half of what 8
bits hold: 2^24.
"""
WeightScheme = Literal["full", "pair_limited"]
WeightForm = Literal["full", "pair_limited", "unsigned"]
Mode = Literal["static", "dynamic", "float16", "int16", "none"]
"""What becomes integers: docs/quantization.md, "Modes"."""


@dataclass(frozen=True)
class TensorSpec:
    """The integer format of a tensor: `bits` wide; `axis` is the channel axis of per-channel parameters, or None."""

    bits: int = 8
    signed: bool = True
    symmetric: bool = False
    axis: int | None = None

    @property
    def qmin(self) -> int:
        """The smallest integer used; symmetric formats leave out the extra negative value: [-127, 127] for 8 bits."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        """The largest integer used."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype that holds the integers."""
        return np.dtype(f"{'int' if self.signed else 'uint'}{self.bits}")


@dataclass(frozen=True, eq=False)
class QuantParams:
    """Scale (float32) and zero point (int64), both of shape () per tensor or (channels,) along `spec.axis`."""

    scale: Array
    zero_point: Array
    spec: TensorSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", np.asarray(self.scale, np.float32))
        object.__setattr__(self, "zero_point", np.asarray(self.zero_point, np.int64))
        if self.scale.shape != self.zero_point.shape:
            raise ValueError(
                f"scale has shape {self.scale.shape}, zero point {self.zero_point.shape}; they must be equal"
            )
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(
                f"scales must be finite and positive, seen: min {self.scale.min()}, max {self.scale.max()}"
            )

    def _along_axis(self, values: Array, rank: int) -> Array:
        if self.spec.axis is None or values.ndim == 0:
            return values
        shape = [1] * rank
        shape[self.spec.axis] = values.size
        return values.reshape(shape)

    def quantize(self, values: Array) -> Array:
        """Integers of `values` (any shape): rounded half to even, as ONNX QuantizeLinear does, and saturated."""
        scale = self._along_axis(self.scale, values.ndim)
        zero_point = self._along_axis(self.zero_point, values.ndim)
        integers = np.rint(np.asarray(values, np.float32) / scale).astype(np.float64) + zero_point
        return np.clip(integers, self.spec.qmin, self.spec.qmax).astype(self.spec.dtype)

    def dequantize(self, integers: Array) -> Array:
        """float32 values of `integers`, same shape."""
        scale = self._along_axis(self.scale, integers.ndim)
        zero_point = self._along_axis(self.zero_point, integers.ndim)
        return np.asarray((integers.astype(np.int64) - zero_point).astype(np.float32) * scale, np.float32)

    def same_as(self, other: QuantParams) -> bool:
        """Whether both give the same integers for every value."""
        return (
            self.spec == other.spec
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True, eq=False)
class QuantizedConstant:
    """A weight or bias as it ships: its integers and what they mean."""

    params: QuantParams
    integers: Array


@dataclass(frozen=True)
class FixedOutput:
    """The output parameters that a kernel insists on, for signed 8-bit integers."""

    scale: float
    zero_point: int


def _always(_: ir.Node) -> str | None:
    return None


def _never(_: ir.Node) -> bool:
    return False


@dataclass(frozen=True)
class OperatorRule:
    """What a runtime's int8 kernel of one ONNX operator demands.

    `shares_scale`: activations in and out have one scale (the kernel only moves, selects or averages integers).
    `fixed_output`: the output's parameters are the kernel's, not the data's.
    `check`: why the kernel cannot take this very node in int8, or None when it can.
    `symmetric`: the inputs that want the zero point 0 where they are computed (the fast kernel takes no other).
    `misses`: of a kernel of one input, how many of its input integers it may map to another integer than the rounded
    function, given the parameters of input and output; None: none, ties aside.
    `rescales`: whether the kernel of this very node takes two scales though others of its operator share one.
    `real`: a runtime computes the operator in real numbers between the integers.
    """

    op_type: str
    shares_scale: bool = False
    fixed_output: FixedOutput | None = None
    check: Callable[[ir.Node], str | None] = _always
    symmetric: frozenset[int] = frozenset()
    misses: Callable[[ir.Node, QuantParams, QuantParams], int] | None = None
    rescales: Callable[[ir.Node], bool] = _never
    real: bool = False


@dataclass(frozen=True)
class QuantRules:
    """What one runtime (or, after `strictest`, several) demands of an int8 graph."""

    name: str
    operators: Mapping[str, OperatorRule]
    activation: TensorSpec = TensorSpec(bits=8, signed=True)
    weight: TensorSpec = TensorSpec(bits=8, signed=True, symmetric=True, axis=0)
    bias: TensorSpec = TensorSpec(bits=32, signed=True, symmetric=True, axis=0)


@dataclass(frozen=True, eq=False)
class QuantPlan:
    """Every number of a quantized model, decided before the model is touched.

    `activations`: value name -> parameters. `weights`: initializer name -> integers. `biases`: node name -> integers (a
    bias belongs to its node, since its scale is `s_x * s_w`). `folded`: value name -> the value whose range it lives in
    (a Conv's output before its Relu). `stays_float`: value name -> why. `int8_nodes`: names of the nodes that run on
    integers, in order. `float_nodes`: name of each other node -> why.

    A constant operand that is not a weight (an Add's initializer) is under `weights` too, with the activations' format.

    `wide_nodes`: those of `int8_nodes` whose activations have 16 bits (the weights keep 8). `recast`: value name -> the
    parameters under which its readers of the other width see it; where a value has only readers of one width, none.
    """

    activations: Mapping[str, QuantParams]
    weights: Mapping[str, QuantizedConstant]
    biases: Mapping[str, QuantizedConstant]
    folded: Mapping[str, str] = field(default_factory=dict)
    stays_float: Mapping[str, str] = field(default_factory=dict)
    int8_nodes: tuple[str, ...] = ()
    float_nodes: Mapping[str, str] = field(default_factory=dict)
    wide_nodes: tuple[str, ...] = ()
    recast: Mapping[str, QuantParams] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over every name, scale, zero point and integer: equal plans give equal digests on any machine."""
        sha = hashlib.sha256()

        def add(kind: str, name: str, params: QuantParams, integers: Array | None) -> None:
            spec = params.spec
            head = [kind, name, spec.bits, spec.signed, spec.symmetric, spec.axis, list(params.scale.shape)]
            sha.update(json.dumps(head).encode())
            sha.update(np.ascontiguousarray(params.scale, "<f4").tobytes())
            sha.update(np.ascontiguousarray(params.zero_point, "<i8").tobytes())
            if integers is not None:
                sha.update(np.ascontiguousarray(integers, "<i8").tobytes())

        for name, params in sorted(self.activations.items()):
            add("activation", name, params, None)
        for name, params in sorted(self.recast.items()):
            add("recast", name, params, None)
        for kind, constants in (("weight", self.weights), ("bias", self.biases)):
            for name, constant in sorted(constants.items()):
                add(kind, name, constant.params, constant.integers)
        structure = [sorted(self.folded.items()), list(self.int8_nodes)]
        sha.update(json.dumps([*structure, list(self.wide_nodes)] if self.wide_nodes else structure).encode())
        return sha.hexdigest()


class Observer(Protocol):
    """Sees a tensor's values batch by batch in memory of fixed size."""

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values, any shape."""

    def merge(self, other: Observer) -> None:
        """Takes in what another observer of the same kind saw, as if it had seen it itself."""

    def range(self) -> tuple[float, float]:
        """The interval (low, high) to represent, chosen by the algorithm; low <= 0 <= high."""


@dataclass(frozen=True)
class Finding:
    """A rule that something breaks: where, what was seen, what would be accepted."""

    where: str
    rule: str
    seen: str = ""
    accepted: str = ""
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        text = f"{self.where}: {self.rule}"
        if self.seen:
            text += f"; seen: {self.seen}"
        if self.accepted:
            text += f"; accepted: {self.accepted}"
        return text


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape (-1 where dynamic) and NumPy dtype of a model's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Session(Protocol):
    """A loaded model: the reference, ONNX Runtime, TFLite and a device all look alike.

    Feeds and results are keyed by the ONNX names and have the ONNX layout (NCHW) and float32, whatever the artifact has
    inside; the session transposes and (de)quantizes as its artifact's own metadata says.
    """

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The inputs, as the caller sees them."""

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs, as the caller sees them."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for one batch of inputs by name."""


class OpenModel(Protocol):
    """Loads a serialized ONNX model for calibration, to be run from several threads; injected: no runtime is named."""

    def __call__(self, model: bytes, weights: Mapping[str, Array], /) -> Session:
        """`weights`: by name the values of the initializers that `model` has as external data."""


def strictest(rules: Iterable[QuantRules]) -> QuantRules:
    """The rules that satisfy all of `rules`: an operator is int8 only where every runtime has it, under every demand.

    Raises ValueError when two runtimes demand different fixed outputs or integer formats.
    """
    every = list(rules)
    if not every:
        raise ValueError("no rules to combine; at least one target is needed")
    first = every[0]
    for other in every[1:]:
        if (other.activation, other.weight, other.bias) != (first.activation, first.weight, first.bias):
            raise ValueError(f"{first.name} and {other.name} demand different integer formats")
    operators: dict[str, OperatorRule] = {}
    for op_type in sorted(set().union(*(r.operators for r in every))):
        operators[op_type] = _strictest_operator(op_type, every)
    return QuantRules("+".join(r.name for r in every), operators, first.activation, first.weight, first.bias)


def _strictest_operator(op_type: str, every: Sequence[QuantRules]) -> OperatorRule:
    present = [(r.name, r.operators[op_type]) for r in every if op_type in r.operators]
    absent = [r.name for r in every if op_type not in r.operators]
    fixed = {rule.fixed_output for _, rule in present if rule.fixed_output}
    if len(fixed) > 1:
        raise ValueError(f"{op_type}: runtimes demand different fixed outputs: {sorted(fixed, key=str)}")

    def check(node: ir.Node) -> str | None:
        if absent:
            return f"no int8 {op_type} kernel in {', '.join(absent)}"
        for name, rule in present:
            reason = rule.check(node)
            if reason:
                return f"{name}: {reason}"
        return None

    symmetric = frozenset[int]().union(*(rule.symmetric for _, rule in present))
    coarse = [rule.misses for _, rule in present if rule.misses is not None]

    def misses(node: ir.Node, x: QuantParams, y: QuantParams) -> int:
        return sum(each(node, x, y) for each in coarse)

    sharing = [rule for _, rule in present if rule.shares_scale]

    def rescales(node: ir.Node) -> bool:
        return all(rule.rescales(node) for rule in sharing)

    of_kernels = misses if coarse else None
    real = any(rule.real for _, rule in present)
    return OperatorRule(op_type, bool(sharing), next(iter(fixed), None), check, symmetric, of_kernels, rescales, real)
