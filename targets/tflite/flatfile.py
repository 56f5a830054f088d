"""What a TFLite file says of itself: its operators' names, and what edgeship wrote about its inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeship.calibration.errors import InputError
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
