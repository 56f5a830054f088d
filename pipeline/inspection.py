"""Returns what a model file says of itself: inputs, outputs, operators, size, work, and how much of it is int8.

The int8 share here is the file's claim. Who really executes a layer, only the runtime knows: `Target.integer_share`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.macs import WEIGHT_INPUT, count_macs
from edgeship.calibration.graph.onnx_file import load_onnx, read_bytes
from edgeship.calibration.readback.quantized import form
from edgeship.pipeline.source_files import model_bytes

_INTEGER_OPERATORS = frozenset(
    set(WEIGHT_INPUT) - {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
)
_LISTED = 20
FLOAT16_WEIGHTS = "float16 weights"


@dataclass(frozen=True)
class PortFacts:
    """An input or output; `quantization` is "scale 0.1, zero point 3" for integers, else empty."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    quantization: str = ""


@dataclass(frozen=True)
class QuantizationFacts:
    """What a file holds in int8: layers that multiply, those left in float, how weights and activations are stored."""

    layers: int = 0
    integer_layers: int = 0
    float_layers: tuple[str, ...] = ()
    per_channel_weights: int = 0
    per_tensor_weights: int = 0
    activation_dtypes: tuple[str, ...] = ()
    form: str = ""
    """How the file says it: QDQ, QOperator ...; "" for a float model, and for integer layers of TFLite."""


@dataclass(frozen=True)
class ModelFacts:
    """A model file's facts. `macs` is None, with the reason in `note`, where shapes leave it open."""

    path: str
    format: Literal["onnx", "tflite"]
    bytes: int
    sha256: str
    version: str
    inputs: tuple[PortFacts, ...]
    outputs: tuple[PortFacts, ...]
    operators: Mapping[str, int]
    parameters: int
    macs: int | None
    int8_share: float | None
    quantization: QuantizationFacts
    metadata: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same facts as JSON-able values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The same facts as lines of a table: what, value."""
        rows = [("file", self.path), ("format", f"{self.format}, {self.version}"), ("size", f"{self.bytes:,} bytes")]
        rows += [("input", port_line(port)) for port in self.inputs]
        rows += [("output", port_line(port)) for port in self.outputs]
        rows.append(("parameters", f"{self.parameters:,}"))
        rows.append(("multiply-accumulates", self.note if self.macs is None else f"{self.macs:,}"))
        rows.append(("operators", ", ".join(f"{name} {count}" for name, count in self.operators.items())))
        facts = self.quantization
        if not facts.integer_layers:
            return [*rows, ("quantization", facts.form or "none: float")]
        if facts.form:
            rows.append(("quantization", facts.form))
        share = "" if self.int8_share is None else f", {self.int8_share:.1%} of the work"
        rows.append(("int8 layers (file)", f"{facts.integer_layers} of {facts.layers}{share}"))
        rows.append(("int8 weights", f"{facts.per_channel_weights} per channel, {facts.per_tensor_weights} per tensor"))
        rows.append(("int8 activations", ", ".join(facts.activation_dtypes) or "none"))
        if facts.float_layers:
            more = f" and {len(facts.float_layers) - _LISTED} more" if len(facts.float_layers) > _LISTED else ""
            rows.append(("float layers", ", ".join(facts.float_layers[:_LISTED]) + more))
        return rows


def inspect_model(path: str | Path) -> ModelFacts:
    """The facts of an .onnx or .tflite file. Raises InputError for any other file, and for a damaged one."""
    path = Path(path)
    if path.suffix.lower() == ".tflite":
        from edgeship.pipeline.inspection_tflite import inspect_tflite

        return inspect_tflite(path, read_bytes(path))
    if path.suffix.lower() == ".onnx":
        return _inspect_onnx(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; accepted: an .onnx or .tflite file")
    raise InputError(f"{path} has the suffix {path.suffix!r}; accepted: .onnx, .tflite")


def port_line(port: PortFacts) -> str:
    """An input or output in a line: its name, type, shape, and how integers stand for its values."""
    text = f"{port.name}: {port.dtype} {' x '.join(str(side) for side in port.shape) or 'scalar'}"
    return f"{text} ({port.quantization})" if port.quantization else text


def _inspect_onnx(path: Path) -> ModelFacts:
    model = load_onnx(path)
    content = read_bytes(path)
    counts, note = _macs(model)
    quantization, integer = _quantization(model, counts)
    total = None if counts is None else sum(counts.values())
    opset = ", ".join(
        f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.graph.opset_imports.items())
    )
    constants = set(model.graph.initializers)
    return ModelFacts(
        path=str(path),
        format="onnx",
        bytes=model_bytes(path),
        sha256=hashlib.sha256(content).hexdigest(),
        version=f"opset {opset}" + (f", by {model.producer_name}" if model.producer_name else ""),
        inputs=tuple(_port(value) for value in model.graph.inputs if value.name not in constants),
        outputs=tuple(_port(value) for value in model.graph.outputs),
        operators=dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common()),
        parameters=_parameters(model),
        macs=total,
        int8_share=None if not total or integer is None else integer / total,
        quantization=quantization,
        metadata={key: value for key, value in sorted(model.metadata_props.items()) if key.startswith("edgeship.")},
        note=note,
    )


def _macs(model: ir.Model) -> tuple[dict[str, int] | None, str]:
    try:
        return count_macs(model), ""
    except InputError as error:
        return None, str(error)


def _port(value: ir.Value) -> PortFacts:
    shape = tuple(side if isinstance(side, int) else str(side.value or "?") for side in value.shape or ())
    dtype = str(value.dtype.name).lower() if value.dtype is not None else "unknown"
    return PortFacts(str(value.name), shape, dtype)


def _parameters(model: ir.Model) -> int:
    """The numbers that training made: constants without scales, zero points, shapes and indices."""
    total = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            uses = tuple(value.uses())
            describes = uses and all(_describes(node, place) for node, place in uses)
            if value.const_value is not None and value.const_value.dtype not in _COUNTERS and not describes:
                total += value.const_value.size
    return total


_COUNTERS = frozenset({ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING})


def _describes(node: ir.Node, place: int) -> bool:
    """Whether an input tells how integers are meant: a scale or a zero point."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return place > 0
    if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm"):
        return place not in (0, 3, 6 if node.op_type == "QGemm" else 8)
    return node.op_type.startswith("QLinear") and place % 3 != 0


def _quantization(model: ir.Model, counts: Mapping[str, int] | None) -> tuple[QuantizationFacts, int | None]:
    """The facts, and the multiply-accumulates of integer layers."""
    layers = [node for node in model.graph if node.op_type in WEIGHT_INPUT]
    names = list(counts) if counts is not None else [node.name or node.op_type for node in layers]
    integer = [_is_integer(node) for node in layers]
    weights = [_weight_scale(node) for node, is_integer in zip(layers, integer, strict=True) if is_integer]
    activations = {_quantized_dtype(node) for node in model.graph if node.op_type == "QuantizeLinear"}
    facts = QuantizationFacts(
        layers=len(layers),
        integer_layers=sum(integer),
        float_layers=tuple(name for name, is_integer in zip(names, integer, strict=True) if not is_integer),
        per_channel_weights=sum(size > 1 for size in weights),
        per_tensor_weights=sum(size == 1 for size in weights),
        activation_dtypes=tuple(sorted(activations)),
        form=form(model) or (FLOAT16_WEIGHTS if any(_has_half_weights(node) for node in layers) else ""),
    )
    if counts is None:
        return facts, None
    return facts, sum(macs for macs, is_integer in zip(counts.values(), integer, strict=True) if is_integer)


def _quantized_dtype(node: ir.Node) -> str:
    """The integer type that a QuantizeLinear writes: its zero point's, the one its attribute names, else uint8."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype.name.lower()
    attribute = node.attributes.get("output_dtype")
    return ir.DataType(attribute.as_int()).name.lower() if attribute is not None and attribute.as_int() else "uint8"


def _is_integer(node: ir.Node) -> bool:
    """Whether the file claims that a layer multiplies integers: an integer operator, or both operands dequantized."""
    if node.op_type in _INTEGER_OPERATORS:
        return True
    return all(_dequantizer(value) is not None for value in node.inputs[:2])


def _has_half_weights(node: ir.Node) -> bool:
    value = node.inputs[WEIGHT_INPUT[node.op_type]]
    cast = value.producer() if value is not None else None
    return (
        cast is not None
        and cast.op_type == "Cast"
        and (
            cast.inputs[0] is not None and cast.inputs[0].dtype == ir.DataType.FLOAT16 and not cast.inputs[0].producer()
        )
    )


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _weight_scale(node: ir.Node) -> int:
    """How many scales a layer's weight has."""
    place = WEIGHT_INPUT[node.op_type]
    dequantize = _dequantizer(node.inputs[place])
    scale = (
        dequantize.inputs[1]
        if dequantize is not None
        else node.inputs[place + 1]
        if len(node.inputs) > place + 1
        else None
    )
    tensor = ir.convenience.get_const_tensor(scale) if scale is not None else None
    return 1 if tensor is None else int(tensor.size)
