"""Returns TFLite models read from bytes that nobody vouches for.

The interpreters trust a flatbuffer's offsets; a damaged file can end the process. Here every table is read once with
bounds checked, and every index followed, before a runtime sees the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.file_kind import looks_like

IDENTIFIER = b"TFL3"
ITEM_BYTES = {
    "FLOAT32": 4, "FLOAT16": 2, "INT32": 4, "UINT8": 1, "INT64": 8, "BOOL": 1, "INT16": 2, "COMPLEX64": 8, "INT8": 1,
    "FLOAT64": 8, "UINT64": 8, "UINT32": 4, "UINT16": 2,
}  # fmt: skip
_DAMAGE = (
    struct.error,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def read_model(content: bytes, where: str) -> Any:
    """The model as the schema's `ModelT`, its structure verified.

    Raises InputError when the bytes are no TFLite model, are cut short, or refer to what is not there; also when the
    schema (ai-edge-litert) is not installed.
    """
    schema = schema_module()
    if len(content) < 16 or content[4:8] != IDENTIFIER:
        reason = looks_like(content) or f"it has {len(content)} bytes and no identifier {IDENTIFIER.decode()}"
        raise InputError(f"{where} is not a TFLite model: {reason}")
    try:
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        problem = _problem(
            model, {value: name for name, value in vars(schema.TensorType).items() if name[0] != "_"}, len(content)
        )
    except _DAMAGE as error:
        raise InputError(f"{where} is a damaged TFLite model: {error}") from error
    if problem:
        raise InputError(f"{where} is a damaged TFLite model: {problem}")
    return model


def schema_module() -> Any:
    """The TFLite schema's Python module: ai-edge-litert's, or TensorFlow's where that is missing.

    Raises InputError when neither is installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        try:
            from tensorflow.lite.python import schema_py_generated  # type: ignore[import-untyped]  # has no types
        except ImportError as error:
            raise InputError("reading TFLite needs ai-edge-litert; pip install 'edgeship[tflite]'") from error
    return schema_py_generated


def _problem(model: Any, types: dict[int, str], size: int) -> str | None:
    """What refers to something that is not there, or None."""
    if not model.subgraphs or not model.buffers or model.operatorCodes is None:
        return "it has no subgraph, no buffers or no operator codes"
    for place, buffer in enumerate(model.buffers):
        if buffer.offset and buffer.offset > 1 and buffer.offset + (buffer.size or 0) > size:
            return f"buffer {place} ends behind the file"
    problems = (_subgraph_problem(model, subgraph, types) for subgraph in model.subgraphs)
    return next((problem for problem in problems if problem), None)


def _subgraph_problem(model: Any, subgraph: Any, types: dict[int, str]) -> str | None:
    tensors = _all(subgraph.tensors)
    problems = (_tensor_problem(tensor, model.buffers, types) for tensor in tensors)
    problem = next((problem for problem in problems if problem), None)
    if problem:
        return problem
    if not _within(subgraph.inputs, len(tensors)) or not _within(subgraph.outputs, len(tensors)):
        return f"an input or output of a subgraph is not among its {len(tensors)} tensors"
    for place, operator in enumerate(_all(subgraph.operators)):
        if not 0 <= operator.opcodeIndex < len(model.operatorCodes):
            return f"operator {place} has the code {operator.opcodeIndex} of {len(model.operatorCodes)}"
        if not _within(operator.inputs, len(tensors), first=-1) or not _within(operator.outputs, len(tensors)):
            return f"operator {place} reads or writes a tensor that is not there"
    return None


def _tensor_problem(tensor: Any, buffers: Sequence[Any], types: dict[int, str]) -> str | None:
    name = (tensor.name or b"").decode("utf-8", "replace")
    if tensor.type not in types:
        return f"tensor {name!r} has the unknown type {tensor.type}"
    if not 0 <= tensor.buffer < len(buffers):
        return f"tensor {name!r} has the buffer {tensor.buffer} of {len(buffers)}"
    shape = [int(side) for side in _all(tensor.shape)]
    if any(side < 0 for side in shape):
        return f"tensor {name!r} has the shape {shape}"
    data = buffers[tensor.buffer].data
    item = ITEM_BYTES.get(types[tensor.type])
    if data is not None and len(data) and item and tensor.sparsity is None and len(data) != math.prod(shape) * item:
        return f"tensor {name!r} of shape {shape} and type {types[tensor.type]} has {len(data)} bytes"
    return None


def _within(indices: Any, count: int, first: int = 0) -> bool:
    """Whether all indices are from `first` (-1 where an input may be absent) to `count`."""
    return all(first <= int(index) < count for index in _all(indices))


def _all(items: Any) -> list[Any]:
    return [] if items is None else list(items)
