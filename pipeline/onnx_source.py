"""Returns a user's ONNX file in the pipeline's form: constants apart from inputs, a known shape, opset 17 or later.

Old exporters list the weights among the inputs (ONNX IR 3 demands it); many leave the batch symbolic. The upgraded
model must compute what the file does, in ONNX Runtime, before anything else happens to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeship.calibration.errors import EdgeshipError, InputError, StageError
from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
from edgeship.calibration.types import Array, Finding
from edgeship.pipeline.float_check import check_sessions, random_feeds
from edgeship.pipeline.isolation import run_isolated
from edgeship.pipeline.onnx_form import BATCH, IR_VERSION, check_batch, forget_shapes, parse, plain_form, run_passes
from edgeship.pipeline.quantized_source import check_is_float
from edgeship.pipeline.source_types import take_floats, widen

OLDEST_OPSET, SMALLEST_OPSET, TARGET_OPSET = 7, 17, 18


@dataclass(frozen=True)
class OnnxSource:
    """A user's model in float32, how many of its values were float16, and which of its inputs were of uint8."""

    model: ir.Model
    half: int
    pixels: Sequence[str]


def read_source(
    path: Path,
    shape: Sequence[int | str] | None = None,
    input_name: str | None = None,
    others: Mapping[str, Sequence[int | str]] | None = None,
) -> OnnxSource:
    """The model in the file with `shape` (batch first; "dynamic" keeps it symbolic) for its input, its own opset kept.

    `others`: shapes of further inputs, by name. What is float16 in the file is float32 here, and so are inputs of uint8
    that the model itself makes floats.
    Without a shape a symbolic batch becomes 1. Raises InputError where the file is no usable model or does not fit.
    """
    model = load_onnx(path)
    check_is_float(model, str(path))
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise InputError(f"{path} has opset {opset}; accepted: {OLDEST_OPSET} or later; export it again")
    run_passes(model, passes.InlinePass(), passes.RemoveInitializersFromInputsPass())
    _check_training(model, path)
    half, pixels = widen(model), take_floats(model, str(path))
    shapes = _shapes(model, path, _main_input(model, path, input_name), shape, others or {})
    for value in model.graph.inputs:
        _fix_shape(value, *shapes[str(value.name)], path)
    forget_shapes(model)
    return OnnxSource(model, half, pixels)


def notes_on(source: OnnxSource, rounding: float) -> list[Finding]:
    """What a reader should know of types that were changed; `rounding`: by how much float16 outputs differ."""
    notes = []
    if source.half:
        rule = "the file is float16, and float32 here, which artifacts are compared with"
        seen = f"its outputs differ from the file's by up to {100 * rounding:.2g} % of the largest"
        notes.append(Finding("model", rule, seen, "", "note"))
    for name in source.pixels:
        rule = "pixels of uint8 in the file, and the same numbers as float32 here"
        cure = 'io_dtype = "uint8" in [targets.NAME] for an artifact that takes and gives uint8'
        notes.append(Finding(f"input {name}", rule, "", cure, "note"))
    return notes


def upgrade(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Array]] = (),
    *,
    smallest: int = SMALLEST_OPSET,
    target: int = TARGET_OPSET,
) -> tuple[ir.Model, float]:
    """The model in plain form, and its largest relative error against `model` in ONNX Runtime.

    A model older than opset `smallest` becomes one of opset `target`.
    Raises StageError when no converter upgrades it to a model that computes the same.
    """
    from edgeship.targets.onnxruntime import open_reference

    original = to_bytes(model)
    every = [*feeds, *random_feeds(model, 2)]
    reference = open_reference(original, 1)
    reasons: list[str] = []
    opset = model.opset_imports[""]
    converters = (_unchanged,) if opset >= smallest else (convert_with_onnx, convert_with_onnxscript)
    for convert in converters:
        try:
            content = run_isolated(convert, original, target) if opset < smallest else convert(original, target)
            upgraded = parse(content)
            upgraded.ir_version = IR_VERSION if upgraded.opset_imports[""] <= 23 else model.ir_version
            upgraded.metadata_props.update(model.metadata_props)
            plain_form(upgraded)
            return upgraded, check_sessions(
                reference, open_reference(to_bytes(upgraded), 1), every, "the opset's upgrade"
            )
        except EdgeshipError as error:
            reasons.append(f"{convert.__name__}: {error}")
    raise StageError(f"the model cannot be brought from opset {opset} to {target}: {'; '.join(reasons)}")


def _unchanged(content: bytes, _target: int) -> bytes:
    return content


def convert_with_onnx(content: bytes, target: int) -> bytes:
    """The model at opset `target` by onnx's own converter, which is native code: run it in a child process."""
    import onnx
    import onnx.version_converter

    model = onnx.load_model_from_string(content)
    model.ir_version = max(model.ir_version, 4)  # from 4 on initializers need not be inputs
    return bytes(onnx.version_converter.convert_version(model, target).SerializeToString(deterministic=True))


def convert_with_onnxscript(content: bytes, target: int) -> bytes:
    """The model at opset `target` by onnxscript's converter."""
    from onnxscript import version_converter

    model = parse(content)
    version_converter.convert_version(model, target)
    return to_bytes(model)


def _check_training(model: ir.Model, path: Path) -> None:
    training = [
        f"{node.name or node.outputs[0].name} ({node.op_type})"
        for node in model.graph.all_nodes()
        if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) == 1
    ]
    if training:
        raise InputError(f"{path} was exported in training mode: {', '.join(training[:3])}; export it in eval mode")


def _main_input(model: ir.Model, path: Path, wanted: str | None) -> str:
    """The name of the input that the recipe's [input] is about."""
    names = [str(value.name) for value in model.graph.inputs]
    if not names:
        raise InputError(f"{path} has no inputs; accepted: a model with one image input")
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise InputError(f"{path} has no input {wanted!r} (input.name); there are: {', '.join(names)}")
    return wanted


def _shapes(
    model: ir.Model,
    path: Path,
    main: str,
    shape: Sequence[int | str] | None,
    others: Mapping[str, Sequence[int | str]],
) -> dict[str, tuple[Sequence[int | str] | None, str]]:
    """The recipe's shape of each input, by name, and where the recipe says it."""
    names = [str(value.name) for value in model.graph.inputs]
    for name in others:
        if name not in names or name == main:
            free = [each for each in names if each != main]
            raise InputError(
                f"{path} has no further input {name!r} (input.others); there are: {', '.join(free) or 'none'}"
            )
    places = {name: (others.get(name), f"input.others.{name}") for name in names}
    return {**places, main: (shape, "input.shape")}


def _cure(dtype: ir.DataType | None) -> str:
    """What to do about an input of a type that a float model has not."""
    if dtype is not None and dtype.is_floating_point():
        return "; export the model in float32"
    if dtype == ir.DataType.INT8:
        return '; export it with a float32 input, and io_dtype = "int8" gives its artifacts such an input'
    return ""


def _fix_shape(value: ir.Value, shape: Sequence[int | str] | None, key: str, path: Path) -> None:
    """Sets the sizes of one input from the recipe's `key`; a size that both give must be the same."""
    if value.dtype != ir.DataType.FLOAT:
        raise InputError(
            f"{path}: input {value.name!r} is {value.dtype}; accepted: FLOAT, FLOAT16, UINT8{_cure(value.dtype)}"
        )
    if value.shape is None:
        if shape is None:
            raise InputError(f"{path}: input {value.name!r} has no shape; set {key}")
        value.shape = ir.Shape([None] * len(shape))
    own = [size if isinstance(size, int) and size > 0 else None for size in value.shape]
    wanted = _wanted(own, shape)
    where = f"{path}: input {value.name!r} has the shape [{', '.join(str(size) for size in value.shape)}]"
    if len(wanted) != len(own):
        raise InputError(f"{where}; the recipe's is {list(shape or ())}")
    for place, (given, size) in enumerate(zip(own, wanted, strict=True)):
        if size is None:
            raise InputError(f"{where}; set {key} to the sizes it is meant for, such as {_such_as(own)}")
        if given is not None and given != size:
            accepted = f"{given} at place {place}, or a model with a dynamic size there"
            raise InputError(f"{where}; the recipe's is {list(shape or ())}; accepted: {accepted}")
    if wanted:
        check_batch(wanted[0] or 1, str(value.name))
    value.shape = ir.Shape([BATCH if size == "dynamic" else size for size in wanted if size is not None])


def _such_as(own: Sequence[int | None]) -> list[int]:
    """The shape with numbers for what is open: a batch of 1, and 224 for a height or width."""
    return [size if size is not None else 224 if place else 1 for place, size in enumerate(own)]


def _wanted(own: Sequence[int | None], shape: Sequence[int | str] | None) -> list[int | str | None]:
    """The recipe's sizes, or the file's own with 1 for a dynamic batch; None where neither says."""
    if shape is not None:
        return list(shape)
    return [1 if place == 0 and size is None else size for place, size in enumerate(own)]
