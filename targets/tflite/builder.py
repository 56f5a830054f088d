"""The bytes of a TFLite model: the only file that knows the flatbuffer schema.

Buffers are stored once per content; equal calls give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array
from edgeship.targets.tflite import versions
from edgeship.targets.tflite.halves import as_half

SCHEMA_VERSION = 3
SIGNATURE = "serving_default"
_OTHER_OPTIONS = {
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_POOL_2D"), "Pool2DOptions"),
    **dict.fromkeys(
        ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ANY", "REDUCE_ALL"), "ReducerOptions"
    ),
    **dict.fromkeys(("MAXIMUM", "MINIMUM"), "MaximumMinimumOptions"),
    "L2_NORMALIZATION": "L2NormOptions",
    "CONV_3D_TRANSPOSE": "Conv3DOptions",
}
"""Operators whose options are not called after them."""


@dataclass(frozen=True)
class Signature:
    """The model's inputs and outputs: name -> tensor index, in order."""

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


class Builder:
    """Collects tensors and operators, and packs them.

    `halves`: float32 constants whose values float16 has too are stored in it, and dequantized. `integer_only`: what is
    written into it, subgraphs too, is in integer kernels wherever there are such.
    """

    def __init__(self, *, halves: bool = False, integer_only: bool = False) -> None:
        self._halves, self.integer_only = halves, integer_only
        self._schema = _schema()
        self._buffers: dict[bytes, int] = {b"": 0}
        self._digests = [b""]
        self._contents: list[Array] = [np.zeros(0, np.uint8)]
        self._tensors: list[Any] = []
        self._kinds: list[versions.Kind] = []
        self._codes: dict[tuple[str, int], int] = {}
        self._operators: list[Any] = []
        self._border: tuple[Sequence[int], Sequence[int]] = ((), ())
        self._nested: list[tuple[str, Builder]] = []

    def nested(self, name: str) -> tuple[Builder, int]:
        """Another subgraph of the same file: what writes it, and its index."""
        other = Builder(halves=self._halves, integer_only=self.integer_only)
        other._buffers, other._digests, other._contents = self._buffers, self._digests, self._contents
        other._codes, other._nested = self._codes, self._nested
        self._nested.append((name, other))
        return other, len(self._nested)

    def begin_and_end(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Says which tensors a nested subgraph takes and gives."""
        self._border = inputs, outputs

    def tensor(  # noqa: PLR0913 - the fields of the schema's Tensor, given by name
        self,
        name: str,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        *,
        data: Array | None = None,
        scale: Array | None = None,
        zero_point: Array | None = None,
        axis: int = 0,
        signature: Sequence[int] = (),
    ) -> int:
        """The index of a new tensor; `data` makes it a constant, `scale` (1-D) a quantized one with channel axis
        `axis`.
        """
        half = as_half(data) if self._halves else None
        if half is not None:
            stored = self.tensor(f"{name}/float16", shape, half.dtype, data=half)
            real = self.tensor(name, shape, dtype)
            self.operator("DEQUANTIZE", [stored], [real], {})
            return real
        schema = self._schema
        tensor = schema.TensorT(name=name, shape=np.asarray(shape, np.int32), hasRank=True)
        tensor.type = _element_type(dtype)
        if -1 in signature:
            tensor.shapeSignature = np.asarray(signature, np.int32)
        if data is not None:
            tensor.buffer = self._buffer(np.asarray(data, dtype))
        if scale is not None and zero_point is not None:
            tensor.quantization = schema.QuantizationParametersT(
                scale=np.asarray(scale, np.float32), zeroPoint=np.asarray(zero_point, np.int64), quantizedDimension=axis
            )
        self._tensors.append(tensor)
        kind = versions.Kind(_type_names()[tensor.type], tuple(int(s) for s in shape), scale)
        self._kinds.append(kind)
        return len(self._tensors) - 1

    def operator(self, name: str, inputs: Sequence[int], outputs: Sequence[int], fields: Mapping[str, Any]) -> None:
        """Adds an operator at the lowest version that does it; -1 among `inputs` is one left out, strings name enum
        members.
        """
        kinds = [self._kinds[index] if index >= 0 else None for index in inputs]
        version = versions.version_of(name, kinds, [self._kinds[index] for index in outputs], fields)
        operator = self._schema.OperatorT(
            opcodeIndex=self._codes.setdefault((name, version), len(self._codes)),
            inputs=np.asarray(inputs, np.int32),
            outputs=np.asarray(outputs, np.int32),
        )
        options = _options_name(name)
        if options:
            operator.builtinOptionsType = getattr(self._schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(self._schema, options + "T")()
            for key, value in fields.items():
                _set(operator.builtinOptions, key, value)
        elif fields:
            raise ValueError(f"{name} has no options, {list(fields)} given")
        self._operators.append(operator)

    def rename(self, index: int, name: str) -> None:
        """Gives a tensor another name."""
        self._tensors[index].name = name

    @property
    def count(self) -> int:
        """The number of operators so far."""
        return len(self._operators)

    @property
    def size(self) -> int:
        """The bytes of the constants so far."""
        return sum(content.nbytes for content in self._contents)

    @property
    def written(self) -> list[tuple[Any, ...]]:
        """Each operator as values that are equal where operators do the same; shapes do not count."""
        return [
            (
                list(self._codes)[operator.opcodeIndex],
                tuple(self._content_of(int(index)) for index in operator.inputs),
                tuple(operator.outputs),
                str(sorted(vars(operator.builtinOptions).items())) if operator.builtinOptionsType else "",
            )
            for operator in self._operators
        ]

    def _content_of(self, index: int) -> tuple[int, bytes]:
        buffer = self._tensors[index].buffer if index >= 0 else 0
        return index, self._digests[buffer]

    def finish(self, signature: Signature, metadata: Mapping[str, bytes]) -> bytes:
        """The file's bytes. Raises StageError when they would not fit a flatbuffer (2 GB)."""
        from edgeship.targets.tflite.packing import pack

        schema = self._schema
        model = schema.ModelT(version=SCHEMA_VERSION, description="edgeship")
        model.operatorCodes = [self._code(name, version) for name, version in self._codes]
        oldest = versions.newest([versions.runtime_of(name, version) for name, version in self._codes])
        stored = {"min_runtime_version": oldest.encode().ljust(16, b"\0"), **metadata}
        model.metadata = [
            schema.MetadataT(name=name, buffer=self._buffer(np.frombuffer(content, np.uint8)))
            for name, content in stored.items()
        ]
        self.begin_and_end(list(signature.inputs.values()), list(signature.outputs.values()))
        model.subgraphs = [self._subgraph("main"), *(other._subgraph(name) for name, other in self._nested)]
        model.signatureDefs = [self._signature(signature)]
        return pack(schema, model, self._contents)

    def _subgraph(self, name: str) -> Any:
        graph = self._schema.SubGraphT(tensors=self._tensors, operators=self._operators, name=name)
        graph.inputs, graph.outputs = (np.asarray(places, np.int32) for places in self._border)
        return graph

    def _buffer(self, content: Array) -> int:
        digest = hashlib.sha256(np.ascontiguousarray(content).data).digest() if content.size else b"empty"
        if digest not in self._buffers:
            self._buffers[digest] = len(self._contents)
            self._digests.append(digest)
            self._contents.append(content)
        return self._buffers[digest]

    def _code(self, name: str, version: int) -> Any:
        code = getattr(self._schema.BuiltinOperator, name)
        placeholder = self._schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES
        return self._schema.OperatorCodeT(
            deprecatedBuiltinCode=min(code, placeholder), builtinCode=code, version=version
        )

    def _signature(self, signature: Signature) -> Any:
        schema = self._schema
        inputs = [schema.TensorMapT(name=name, tensorIndex=index) for name, index in signature.inputs.items()]
        outputs = [schema.TensorMapT(name=name, tensorIndex=index) for name, index in signature.outputs.items()]
        return schema.SignatureDefT(inputs=inputs, outputs=outputs, signatureKey=SIGNATURE, subgraphIndex=0)


def _schema() -> Any:
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise StageError(
            "writing TFLite needs ai-edge-litert, which is not installed; pip install 'edgeship[tflite]'"
        ) from error
    return schema_py_generated


@cache
def _type_names() -> dict[int, str]:
    return {value: name for name, value in vars(_schema().TensorType).items() if not name.startswith("_")}


def _element_type(dtype: np.dtype[Any]) -> int:
    name = "BOOL" if dtype == np.bool_ else dtype.name.upper()
    value = getattr(_schema().TensorType, name, None)
    if value is None:
        raise ValueError(f"TFLite has no tensors of type {dtype}")
    return int(value)


@cache
def _options_name(operator: str) -> str | None:
    """The schema's name of the operator's options, or None when it has none."""
    if operator in _OTHER_OPTIONS:
        return _OTHER_OPTIONS[operator]
    wanted = operator.replace("_", "").lower() + "options"
    return next((name for name in vars(_schema().BuiltinOptions) if name.lower() == wanted), None)


_ENUMS = {
    "padding": "Padding",
    "fusedActivationFunction": "ActivationFunctionType",
    "mode": "MirrorPadMode",
    "inDataType": "TensorType",
    "outDataType": "TensorType",
    "outType": "TensorType",
    "outputType": "TensorType",
    "quantizedBiasType": "TensorType",
}


def _set(options: Any, key: str, value: Any) -> None:
    head, *rest = key.split("_")
    name = head + "".join(part[:1].upper() + part[1:] for part in rest)
    if not hasattr(options, name):
        raise ValueError(f"{type(options).__name__} has no field {name}")
    setattr(options, name, getattr(getattr(_schema(), _ENUMS[name]), value) if isinstance(value, str) else value)
