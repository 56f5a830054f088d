"""Returns a PyTorch module as an ONNX model: torch's dynamo exporter first, its TorchScript exporter where that fails.

Both are made to agree on names: an input's is that of the argument of `forward` (the main one's the recipe's, where it
gives one), the outputs' are "output", "output_0" ... or the keys of the dictionary that `forward` returns.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import EdgeshipError, InputError, StageError
from edgeship.calibration.types import Array, Finding, TensorInfo
from edgeship.pipeline.data_dependence import frozen_at, input_dependence
from edgeship.pipeline.float_check import check_agreement, random_feeds
from edgeship.pipeline.index_outputs import IndexOutputs
from edgeship.pipeline.models import require_torch
from edgeship.pipeline.module_inputs import module_arguments, program_arguments
from edgeship.pipeline.onnx_form import BATCH, IR_VERSION, check_batch, parse, plain_form
from edgeship.pipeline.standard_output import closed_output

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

OPSET = 18
_DYNAMIC_EXAMPLE = 2
"""torch.export takes a size of 1 for a constant, so a dynamic batch is traced with 2."""
_SPREAD_AND_MEAN = ((1.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.5, -1.0))
"""The random inputs that an export is tried on: normal values, two of them as bright and dark images have them."""
_HEADINGS = ("Failed to", "<class", "##", "- ")
"""How lines of torch's messages begin that say nothing of the cause."""
_TO_PYTHON = "Converting a tensor to a Python"
"""How torch's warnings begin of a value or size that a trace does not follow."""
_WATCHED = 2
"""On how many of the given inputs values are looked for that a trace would freeze, besides zeros."""


@dataclass(frozen=True)
class Exported:
    """The ONNX model, the exporter that made it, why not the first one, and how far it is from torch."""

    model: ir.Model
    exporter: str
    reason: str = ""
    largest_error: float = 0.0

    def notes(self) -> list[Finding]:
        """That the model was traced, and why, where it was: a person may want to look at it."""
        if not self.reason:
            return []
        rule = f"exported with torch's {self.exporter} exporter"
        return [Finding("model", rule, self.reason, "", "note")]


@dataclass(frozen=True, eq=False)
class TorchSession:
    """A PyTorch module (or exported program) behind the Session protocol, with the names that its export gets."""

    module: torch.nn.Module
    inputs: tuple[TensorInfo, ...]
    output_names: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    program: ExportedProgram | None = field(default=None, repr=False)

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs; -1 for a dynamic batch."""
        float32 = np.dtype(np.float32)
        shapes = zip(self.output_names, self.output_shapes, strict=True)
        return tuple(TensorInfo(name, shape, float32) for name, shape in shapes)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for one batch. Raises StageError when the model fails on it."""
        torch = require_torch()
        names = [info.name for info in self.inputs]
        if set(feeds) != set(names):
            raise InputError(f"the PyTorch model takes the inputs {', '.join(names)}; given: {sorted(feeds)}")
        data = [torch.from_numpy(np.array(feeds[name])) for name in names]  # copies: modules may write into their input
        try:
            with torch.inference_mode(), quiet():
                flat = _flatten(self.module(*data))
        except Exception as error:
            raise StageError(f"the PyTorch model failed on {_shapes(data)}: {_short(error)}") from error
        return {
            name: value.detach().cpu().numpy() for name, value in zip(self.output_names, flat.values(), strict=True)
        }


def open_torch(
    source: torch.nn.Module | ExportedProgram,
    shape: Sequence[int | str] | None,
    input_name: str | None = None,
    others: Mapping[str, Sequence[int | str]] | None = None,
) -> TorchSession:
    """The module in eval mode, tried on one input of `shape` (batch first; the batch may be "dynamic").

    `input_name` is what the export calls that input, `others` has the shapes of further arguments by name. An exported
    program knows its shapes where none is given. Raises InputError where the module takes other inputs than such
    tensors, or returns other things than tensors.
    """
    torch = require_torch()
    program: Any = None if isinstance(source, torch.nn.Module) else source
    module: Any = source if program is None else _program_module(program)
    if program is not None:
        arguments = program_arguments(program, shape, others or {}, input_name)
    else:
        arguments = module_arguments(module, shape, others or {}, input_name)
    inputs = tuple(_info(name, sizes) for name, sizes in arguments)
    examples = [_example(info) for info in inputs]
    try:
        with torch.inference_mode(), quiet():
            flat = _flatten(module(*examples))
    except EdgeshipError:
        raise
    except Exception as error:
        raise InputError(f"the PyTorch model does not take {_shapes(examples)}: {_short(error)}") from error
    dynamic = any(info.shape[0] < 0 for info in inputs)
    shapes = tuple((-1, *value.shape[1:]) if dynamic else tuple(value.shape) for value in flat.values())
    taken = {info.name for info in inputs}
    names = tuple(f"{name}_output" if name in taken else name for name in flat)
    return TorchSession(module, inputs, names, shapes, program)


def _info(name: str, sizes: Sequence[int | str]) -> TensorInfo:
    check_batch(sizes[0], name)
    batch = -1 if sizes[0] == "dynamic" else int(sizes[0])
    return TensorInfo(name, (batch, *(int(size) for size in sizes[1:])), np.dtype(np.float32))


def _shapes(tensors: Sequence[torch.Tensor]) -> str:
    listed = " and ".join(str(list(each.shape)) for each in tensors)
    return f"an input of shape {listed}" if len(tensors) == 1 else f"inputs of the shapes {listed}"


def _program_module(program: ExportedProgram) -> torch.nn.Module:
    """The program as a module, without the Python code that guards its sizes (the shape is checked here)."""
    unguarded = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**unguarded)


def _flatten(value: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """The tensors in what a module returns, by output name."""
    torch = require_torch()
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        parts = [(str(key) if name == "output" else f"{name}_{key}", part) for key, part in value.items()]
    elif isinstance(value, tuple | list):
        parts = [(name if len(value) == 1 else f"{name}_{place}", part) for place, part in enumerate(value)]
    else:
        raise InputError(
            f"the PyTorch model returns {type(value).__name__}; accepted: tensors, in tuples or dictionaries"
        )
    return {key: tensor for each, part in parts for key, tensor in _flatten(part, each).items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' progress, warnings and log off the user's screen, and torch to one thread.

    A few samples gain nothing from more threads, which wait for each other on a busy machine, and sums keep their
    order.
    """
    torch = require_torch()
    before, threads = logging.root.manager.disable, torch.get_num_threads()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(before)


def export_torch(session: TorchSession, feeds: Sequence[Mapping[str, Array]] = ()) -> Exported:
    """The ONNX model (opset 18, weights inside), which computes what torch does on `feeds` and on random inputs.

    Raises StageError with both exporters' reasons when neither makes such a model, and with the place in the module's
    code where the first one fails and a trace would keep a value that depends on the input.
    """
    exporters: dict[str, Callable[[], bytes]] = {"dynamo": lambda: _dynamo(session)}
    if session.program is None:  # the TorchScript exporter traces modules
        exporters["torchscript"] = lambda: _traced(session, feeds, reasons[0])
    reasons: list[str] = []
    for name, exporter in exporters.items():
        try:
            with quiet(), closed_output():
                content = exporter()
            model = _named(parse(content), session)
            error = _verify(model, session, feeds, name)
        except EdgeshipError as failure:
            reasons.append(f"{name}: {failure}")
        except Exception as failure:  # exporters raise whatever their parts do
            reasons.append(f"{name}: {_short(failure)}")
        else:
            return Exported(model, name, "; ".join(reasons), error)
    raise StageError(f"the PyTorch model cannot be exported to ONNX: {'; '.join(reasons)}")


def _traced(session: TorchSession, feeds: Sequence[Mapping[str, Array]], first_reason: str) -> bytes:
    """What the TorchScript exporter makes; `first_reason`: why the first exporter made nothing.

    Raises StageError where a trace would compute for all inputs what the module does for one.
    """
    torch = require_torch()
    names = [info.name for info in session.inputs]
    zeros = {info.name: _example(info).numpy() for info in session.inputs}
    watched = [[each[name] for name in names] for each in (zeros, *feeds[:_WATCHED])]
    found = input_dependence(session.module, watched)
    frozen = list(map(str, found.values[:3]))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", torch.jit.TracerWarning)
        content = b"" if frozen else _torchscript(session)
    if found.sizes and "data-dependent" in first_reason:  # fixed sizes alone are warned of as well
        places = [(each.filename, each.lineno) for each in heard if str(each.message).startswith(_TO_PYTHON)]
        frozen += [str(frozen_at(*place)) for place in dict.fromkeys(places)][:3]
    if frozen:
        raise StageError(
            f"{' and '.join(frozen)} makes a Python value of a tensor that depends on the input, and a trace would "
            "keep for all inputs what it is for one; accepted: tensor operations, such as torch.where instead of if"
        )
    return content


def _example(info: TensorInfo) -> torch.Tensor:
    torch = require_torch()
    batch, *rest = info.shape
    return torch.zeros([_DYNAMIC_EXAMPLE if batch < 0 else batch, *rest])  # type: ignore[no-any-return]  # torch is imported late, as Any


def _dynamo(session: TorchSession) -> bytes:
    torch = require_torch()
    options: dict[str, Any] = {
        "dynamo": True,
        "input_names": [info.name for info in session.inputs],
        "output_names": list(session.output_names),
        "opset_version": OPSET,
        "verbose": False,
        "external_data": False,
    }
    if session.program is not None:
        program = torch.onnx.export(session.program, (), **options)
    else:
        if any(info.shape[0] < 0 for info in session.inputs):
            batch = torch.export.Dim(BATCH)
            options["dynamic_shapes"] = tuple({0: batch} if info.shape[0] < 0 else None for info in session.inputs)
        program = torch.onnx.export(session.module, tuple(map(_example, session.inputs)), **options)
    if program is None:
        raise StageError("the exporter returned nothing")
    return bytes(program.model_proto.SerializeToString())


def _torchscript(session: TorchSession) -> bytes:
    torch = require_torch()
    names = [info.name for info in session.inputs]
    dynamic = [info.name for info in session.inputs if info.shape[0] < 0]
    axes = {name: {0: BATCH} for name in (*dynamic, *session.output_names)} if dynamic else None
    buffer = io.BytesIO()
    torch.onnx.export(
        session.module,
        tuple(map(_example, session.inputs)),
        buffer,
        dynamo=False,
        input_names=names,
        output_names=list(session.output_names),
        opset_version=OPSET,
        dynamic_axes=axes,
        do_constant_folding=True,
    )
    return buffer.getvalue()


def _named(model: ir.Model, session: TorchSession) -> ir.Model:
    """The model in plain form with exactly the session's inputs and outputs."""
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    names = [*(info.name for info in session.inputs), *session.output_names]
    if len(inputs) != len(session.inputs) or len(outputs) != len(session.output_names):
        raise StageError(
            f"the exporter wrote {len(inputs)} inputs and {len(outputs)} outputs; "
            f"the module has {len(session.inputs)} and {len(session.output_names)}"
        )
    for value, name in zip([*inputs, *outputs], names, strict=True):
        value.name = name
    for value, shape in zip(outputs, session.output_shapes, strict=True):
        value.shape = ir.Shape([BATCH if size < 0 else size for size in shape])
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    return plain_form(model)


def _verify(model: ir.Model, session: TorchSession, feeds: Sequence[Mapping[str, Array]], exporter: str) -> float:
    """The largest relative error on `feeds` and varied random inputs; an index may be that of an equal value."""
    candidate = IndexOutputs(model)
    worst, what = 0.0, f"the {exporter} exporter"
    for each in [*feeds, *_varied(model)]:
        expected = session.run(each)
        found = candidate.run(each, expected)
        candidate.check(expected, found, what)
        worst = max(worst, check_agreement(expected, found, what))
    return worst


def _varied(model: ir.Model) -> Iterator[dict[str, Array]]:
    for (spread, mean), feeds in zip(_SPREAD_AND_MEAN, random_feeds(model, len(_SPREAD_AND_MEAN)), strict=True):
        yield {name: (values * spread + mean).astype(values.dtype) for name, values in feeds.items()}


def _short(error: BaseException) -> str:
    """The kind of the first cause that has a message, and the line of it that says something."""
    causes = [error]
    while causes[-1].__cause__ is not None and causes[-1].__cause__ not in causes:
        causes.append(causes[-1].__cause__)
    told = [(each, line) for each in reversed(causes) if (line := _telling_line(each))]
    cause, line = told[0] if told else (error, "")
    return f"{type(cause).__name__}: {line[:300]}"


def _telling_line(error: BaseException) -> str:
    """The message's first line of words that is not about what the exporter's own developers should do."""
    lines = [line.strip() for line in str(error).splitlines()]
    wordy = [line for line in lines if " " in line and any(map(str.isalpha, line))]
    return next((line for line in wordy if not line.startswith(_HEADINGS)), "") or next(iter(wordy), "")
