"""What a TFLite file says of itself: its operators' names, and what edgeship wrote about its inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array
from edgeship.targets.tflite.reader import read_model, schema_module

METADATA = "edgeship"
METADATA_VERSION = 1


def load(path: Path) -> Any:
    """The file as the schema's ModelT, its structure checked. Raises InputError where it is not a whole model."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return read_model(content, str(path))


def description(model: Any) -> dict[str, Any] | None:
    """What edgeship wrote about the model's inputs and outputs; None for a model that others made."""
    for entry in model.metadata or []:
        if text(entry.name) == METADATA:
            data = model.buffers[entry.buffer].data
            found = json.loads(bytes(data)) if data is not None else None
            return found if isinstance(found, dict) and found.get("version") == METADATA_VERSION else None
    return None


def in_onnx_order(described: dict[str, Any] | None, values: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors by name, those whose axes lie torn in memory as the ONNX model has them; the others as they are."""
    torn = (described or {}).get("torn", {})
    return {name: _joined(array, *torn[name]) if name in torn else array for name, array in values.items()}


def _joined(values: Array, shape: Sequence[int], digits: Sequence[Sequence[int]]) -> Array:
    """The tensor of `shape` whose memory is `values`: digits are sizes, and steps in the tensor's flat index."""
    whole = np.empty(values.size, values.dtype)
    sizes, steps = ([digit[place] for digit in digits] for place in (0, 1))
    view = np.lib.stride_tricks.as_strided(whole, sizes, [step * whole.itemsize for step in steps])
    view[...] = values.reshape(sizes)
    return whole.reshape(shape)


def element_types() -> dict[int, str]:
    """Element type number -> name."""
    return _members(schema_module().TensorType)


def operator_names(model: Any) -> list[str]:
    """The name of each operator code of the model."""
    names = _members(schema_module().BuiltinOperator)
    return [names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN") for code in model.operatorCodes]


def text(value: Any) -> str:
    """A string of the schema, which flatbuffers gives as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _members(enum: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if not name.startswith("_")}
