"""Returns ONNX graphs in the plain form of the pipeline: unique names, inferred shapes, no notes of whoever wrote them.

Exporters write file paths and stack traces into nodes; they would tell of the author's machine and differ between
machines.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeship.calibration.errors import InputError

_PASSES_LOG = logging.getLogger("onnx_ir")
BATCH = "batch"
"""What a dynamic batch is called in shapes."""
IR_VERSION = 10
"""Read by every runtime of the last years; opset 23 is the newest operator set that goes with it."""


def run_passes(model: ir.Model, *steps: ir.passes.InPlacePass) -> None:
    """Applies onnx_ir's passes to `model` in place, without their remarks on standard error: results are checked."""
    before = _PASSES_LOG.level
    _PASSES_LOG.setLevel(logging.ERROR)
    try:
        ir.passes.Sequential(*steps)(model)
    finally:
        _PASSES_LOG.setLevel(before)


def parse(content: bytes) -> ir.Model:
    """The model in `content`, which holds its own weights."""
    import onnx

    return ir.from_proto(onnx.load_model_from_string(content))


def check_batch(size: int | str, name: str) -> None:
    """Raises InputError for a fixed batch of several: samples are fed one by one."""
    if size not in (1, "dynamic"):
        raise InputError(f'input {name!r} has a batch of {size}; accepted: 1, or "dynamic"')


def plain_form(model: ir.Model) -> ir.Model:
    """`model` (changed in place) without anybody's notes, its values all named and shaped."""
    model.doc_string = None
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            _strip(value)
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _strip(value)
            if not node.name:
                node.name = f"{node.op_type}_{node.outputs[0].name}" if node.outputs else node.op_type
    run_passes(
        model,
        passes.TopologicalSortPass(),
        passes.NameFixPass(),
        passes.ShapeInferencePass(strict_mode=False, data_prop=True),
    )
    return model


def _strip(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()
    tensor = value.const_value
    if tensor is not None and (tensor.doc_string or tensor.metadata_props):
        value.const_value = ir.tensor(tensor.numpy(), name=tensor.name)


def fix_batch(model: ir.Model, size: int) -> None:
    """Makes the dynamic batch of `model` (changed in place) `size`, wherever its dimension stands.

    Raises InputError when no input has one.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    batches = {value: first for value in inputs if isinstance(first := _first_dimension(value), ir.SymbolicDim)}
    if not batches:
        shapes = "; ".join(f"{value.name}: {value.shape}" for value in inputs)
        raise InputError(f"no input has a dynamic batch to fix ({shapes}); accepted: a symbolic first dimension")
    names = {dimension.value for dimension in batches.values()} - {None}
    for value in (*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)):
        if value.shape is None:
            continue
        shape = [size if isinstance(d, ir.SymbolicDim) and d.value in names else d for d in value.shape]
        value.shape = ir.Shape([size, *shape[1:]] if value in batches else shape)


def fix_shapes(model: ir.Model, sizes: Mapping[str, Sequence[int]]) -> None:
    """Gives the named inputs of `model` (changed in place) these sizes, and infers all other shapes anew.

    Raises InputError for a size that the model has otherwise, or another number of them.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    for name, given in sizes.items():
        own = inputs[name].shape
        if own is not None and (
            len(own) != len(given)
            or any(isinstance(has, int) and has != size for has, size in zip(own, given, strict=True))
        ):
            raise InputError(
                f"input {name!r} has the shape {own}; seen: {list(given)}; accepted: sizes where it is open"
            )
        inputs[name].shape = ir.Shape(given)
    forget_shapes(model)


def forget_shapes(model: ir.Model) -> None:
    """Lets every shape but the inputs' be inferred anew: those in the file were for symbolic or other sizes."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    infer_shapes(model)


def infer_shapes(model: ir.Model) -> None:
    """Gives the values of `model` (changed in place) the shapes that follow from its inputs."""
    run_passes(model, passes.ShapeInferencePass(strict_mode=False, data_prop=True))


def _first_dimension(value: ir.Value) -> int | ir.SymbolicDim | None:
    return value.shape[0] if value.shape is not None and len(value.shape) else None
