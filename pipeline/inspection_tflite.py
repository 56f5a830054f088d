"""Returns what a .tflite file says of itself, in the words of `inspection`."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.inspection import FLOAT16_WEIGHTS, ModelFacts, PortFacts, QuantizationFacts
from edgeship.targets.tflite.flatfile import description, element_types, operator_names, text
from edgeship.targets.tflite.reader import read_model
from edgeship.targets.tflite.share import COUNTED

_EIGHT_BITS = frozenset({"INT8", "UINT8"})
_PARAMETERS = frozenset({"FLOAT16", "FLOAT32", "FLOAT64", "INT8", "UINT8", "INT16", "INT32"})


def inspect_tflite(path: Path, content: bytes) -> ModelFacts:
    """The facts of the first subgraph. Raises InputError for a damaged file."""
    reader = _Reader(read_model(content, str(path)))
    try:
        return _facts(reader, path, content)
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path} is a damaged TFLite model: an operator lacks what it needs ({error})") from error


def _facts(reader: _Reader, path: Path, content: bytes) -> ModelFacts:
    layers = [operator for operator in reader.operators if reader.kind(operator) in COUNTED]
    macs = [reader.macs(operator) for operator in layers]
    integer = [reader.is_integer(operator) for operator in layers]
    names = [reader.name(reader.tensors[operator.outputs[0]]) for operator in layers]
    weights = [
        reader.scales(reader.weight(operator))
        for operator, is_integer in zip(layers, integer, strict=True)
        if is_integer
    ]
    total = sum(macs)
    return ModelFacts(
        path=str(path),
        format="tflite",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        version=", ".join(_versions(reader.model)),
        inputs=tuple(reader.port(place) for place in reader.subgraph.inputs),
        outputs=tuple(reader.port(place) for place in reader.subgraph.outputs),
        operators=dict(Counter(reader.kind(operator) for operator in reader.operators).most_common()),
        parameters=reader.parameters(),
        macs=total,
        int8_share=sum(count for count, is_integer in zip(macs, integer, strict=True) if is_integer) / total
        if total
        else None,
        quantization=QuantizationFacts(
            layers=len(layers),
            integer_layers=sum(integer),
            float_layers=tuple(name for name, is_integer in zip(names, integer, strict=True) if not is_integer),
            per_channel_weights=sum(count > 1 for count in weights),
            per_tensor_weights=sum(count == 1 for count in weights),
            activation_dtypes=reader.activation_dtypes(),
            form=reader.small_weights(layers),
        ),
        metadata=reader.metadata(),
    )


def _versions(model: Any) -> list[str]:
    """The schema, who wrote the file, and the oldest TensorFlow Lite that runs it, as far as the file says so."""
    runtimes = [
        bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode("ascii", "replace")
        for entry in model.metadata or ()
        if text(entry.name) == "min_runtime_version" and model.buffers[entry.buffer].data is not None
    ]
    said = [f"schema {model.version}", text(model.description)]
    return [part for part in said if part] + [f"runtime {version} or newer" for version in runtimes if version]


class _Reader:
    """A verified ModelT, asked by operator and tensor."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.subgraph = model.subgraphs[0]
        self.tensors = list(self.subgraph.tensors)
        self.operators = list(self.subgraph.operators if self.subgraph.operators is not None else ())
        self._types = element_types()
        self._kinds = operator_names(model)
        self._signature_names = {
            (place, int(entry.tensorIndex)): text(entry.name)
            for signature in model.signatureDefs or ()
            for place, entries in (("in", signature.inputs or ()), ("out", signature.outputs or ()))
            for entry in entries
        }

    def kind(self, operator: Any) -> str:
        """The operator's name; custom ones by their own."""
        name = self._kinds[operator.opcodeIndex]
        return f"CUSTOM {text(self.model.operatorCodes[operator.opcodeIndex].customCode)}" if name == "CUSTOM" else name

    def dtype(self, tensor: Any) -> str:
        """The schema's name of the tensor's type."""
        return str(self._types[tensor.type])

    def name(self, tensor: Any) -> str:
        """The tensor's name."""
        return text(tensor.name)

    def shape(self, tensor: Any) -> tuple[int, ...]:
        """The tensor's static shape; a dynamic side is kept as 1 by the format."""
        return tuple(int(side) for side in tensor.shape) if tensor.shape is not None else ()

    def sides(self, tensor: Any) -> tuple[int | str, ...]:
        """The tensor's shape with "?" for a side that the runtime leaves open."""
        signature = tensor.shapeSignature
        if signature is None or len(signature) != len(self.shape(tensor)):
            return self.shape(tensor)
        return tuple("?" if side < 0 else int(side) for side in signature)

    def port(self, place: int) -> PortFacts:
        """An input or output, by its name in the signature where there is one."""
        tensor = self.tensors[place]
        names = [name for (_, index), name in self._signature_names.items() if index == place]
        quantization = tensor.quantization
        text = ""
        if quantization is not None and quantization.scale is not None and len(quantization.scale) == 1:
            zero_point = int(quantization.zeroPoint[0]) if quantization.zeroPoint is not None else 0
            text = f"scale {float(quantization.scale[0]):.6g}, zero point {zero_point}"
        return PortFacts(names[0] if names else self.name(tensor), self.sides(tensor), self.dtype(tensor).lower(), text)

    def weight(self, operator: Any) -> Any:
        """The tensor that a layer multiplies with."""
        return self.tensors[operator.inputs[1]]

    def source(self, operator: Any) -> Any:
        """The activation that a layer multiplies."""
        place, _ = COUNTED[self.kind(operator)]
        return self.tensors[operator.inputs[place]]

    def is_integer(self, operator: Any) -> bool:
        """Whether both operands of a layer are 8-bit integers."""
        return {self.dtype(self.weight(operator)), self.dtype(self.source(operator))} <= _EIGHT_BITS

    def small_weights(self, layers: Sequence[Any]) -> str:
        """What the weights of layers with float activations are, where that is not float32; "" where they are."""
        floats = [layer for layer in layers if self.dtype(self.source(layer)) == "FLOAT32"]
        if any(self.dtype(self.weight(layer)) in _EIGHT_BITS for layer in floats):
            return "int8 weights, activations rounded at run time (hybrid kernels)"
        halves = {
            operator.outputs[0]
            for operator in self.operators
            if self.kind(operator) == "DEQUANTIZE" and self.dtype(self.tensors[operator.inputs[0]]) == "FLOAT16"
        }
        return FLOAT16_WEIGHTS if any(layer.inputs[1] in halves for layer in floats) else ""

    def scales(self, tensor: Any) -> int:
        """How many scales a tensor has."""
        quantization = tensor.quantization
        return 0 if quantization is None or quantization.scale is None else len(quantization.scale)

    def macs(self, operator: Any) -> int:
        """Multiply-accumulates of a layer."""
        _, count = COUNTED[self.kind(operator)]
        inputs = [self.shape(self.tensors[place]) for place in operator.inputs if place >= 0]
        return count(inputs, self.shape(self.tensors[operator.outputs[0]]))

    def parameters(self) -> int:
        """The numbers that training made: constants of number types, without shapes and indices."""
        total = 0
        for tensor in self.tensors:
            data = self.model.buffers[tensor.buffer].data
            plain = self.dtype(tensor) == "INT32" and not self.scales(tensor)
            if data is not None and len(data) and self.dtype(tensor) in _PARAMETERS and not plain:
                total += math.prod(self.shape(tensor))
        return total

    def activation_dtypes(self) -> tuple[str, ...]:
        """The 8-bit types of tensors that operators compute."""
        computed = {self.dtype(self.tensors[place]) for operator in self.operators for place in operator.outputs}
        return tuple(sorted(name.lower() for name in computed & _EIGHT_BITS))

    def metadata(self) -> dict[str, str]:
        """The facts that edgeship wrote."""
        try:
            found = (description(self.model) or {}).get("metadata", {})
        except ValueError:  # damaged JSON in a file that is whole otherwise
            return {}
        return {str(key): str(value) for key, value in sorted(found.items())} if isinstance(found, dict) else {}
