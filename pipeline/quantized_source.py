"""Refuses to quantize what is quantized already, and says what to do with it."""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.readback.quantized import find_quantized, form


def check_is_float(model: ir.Model, what: str) -> None:
    """Raises InputError where the model called `what` has quantized operators: its parameters are never replaced."""
    found = find_quantized(model)
    if not found:
        return
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found.items(), key=lambda item: -item[1])[:3])
    raise InputError(
        f"{what} is quantized already ({form(model)}: {counts}) and is not quantized again: it keeps its own scales "
        f"and zero points. Make each artifact with `edgeship convert {what} -o FILE --target NAME`, and judge it with "
        "`edgeship compare`, `evaluate` and `bench`; accepted here: a float model"
    )
