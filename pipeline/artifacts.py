"""Returns where a target's artifacts lie in a run folder, and what their inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.calibration.errors import StageError
from edgeship.targets.base import load

if TYPE_CHECKING:
    import onnx_ir as ir


def artifact_path(target: str, kind: str = "model") -> str:
    """Where the target's artifact ("model", int8) or its twin ("fp32") lies in the convert stage's folder."""
    return f"{target}/{kind}{load(target).suffix}"


def release_name(target: str, targets: Sequence[str]) -> str:
    """The artifact's name in a release: model<suffix>, or with the target's name where two share the suffix."""
    suffix = load(target).suffix
    alone = sum(load(name).suffix == suffix for name in targets) == 1
    return f"model{suffix}" if alone else f"model-{target}{suffix}"


def input_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """The inputs of an ONNX file by name: their shapes, -1 where dynamic."""
    from edgeship.calibration.graph.onnx_file import load_onnx

    return shapes_of(load_onnx(model))


def shapes_of(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """The inputs of a model by name: their shapes, -1 where dynamic."""
    shapes = {}
    for value in model.graph.inputs:
        if value.shape is None or value.name is None:
            raise StageError(f"input {value.name!r} of the model has no shape")
        shapes[value.name] = tuple(side if isinstance(side, int) else -1 for side in value.shape.dims)
    return shapes
