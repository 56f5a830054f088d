"""Returns two ONNX models with every tensor that both have as an output, to see where they begin to differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.types import Session


def open_layers(a: Path, b: Path) -> tuple[Session, Session]:
    """Both models, opened without graph optimisations, with the same outputs in the order of `a`.

    Raises InputError for other files than ONNX, and for models that share no tensor.
    """
    from edgeship.calibration.onnx_file import load_onnx, to_bytes
    from edgeship.targets.onnxruntime import open_reference

    for path in (a, b):
        if path.suffix != ".onnx":
            raise InputError(f"--layers compares ONNX models, whose tensors have names; seen: {path}")
    first, second = load_onnx(a), load_onnx(b)
    mine, theirs = _float_values(first), _float_values(second)
    shared = [name for name in mine if name in theirs]
    if not shared:
        raise InputError(f"{a} and {b} have no tensor name in common; compare them without --layers")
    for model, values in ((first, mine), (second, theirs)):
        model.graph.outputs.clear()
        model.graph.outputs.extend(values[name] for name in shared)
    return open_reference(to_bytes(first), 1), open_reference(to_bytes(second), 1)


def _float_values(model: ir.Model) -> Mapping[str, ir.Value]:
    import onnx_ir as ir

    return {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value.name and value.dtype in (None, ir.DataType.FLOAT)
    }


def steps_of(model: Path) -> dict[str, float]:
    """The quantization step of each output of a QDQ model; empty for any other file."""
    if model.suffix != ".onnx":
        return {}
    from edgeship.calibration.onnx_file import load_onnx
    from edgeship.calibration.qdq import output_steps

    return output_steps(load_onnx(model))
