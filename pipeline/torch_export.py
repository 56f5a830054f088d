"""Returns a PyTorch module as an ONNX model: torch's dynamo exporter first, its TorchScript exporter where that fails.

Both are made to agree on names: the input's is the recipe's or the argument's of `forward`, the outputs' are "output",
"output_0" ... or the keys of the dictionary that `forward` returns.
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
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.types import Array, TensorInfo
from edgeship.pipeline.float_check import check_sessions, random_feeds
from edgeship.pipeline.models import require_torch
from edgeship.pipeline.onnx_form import BATCH, IR_VERSION, check_batch, parse, plain_form

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

OPSET = 18
_DYNAMIC_EXAMPLE = 2
"""torch.export takes a size of 1 for a constant, so a dynamic batch is traced with 2."""


@dataclass(frozen=True)
class Exported:
    """The ONNX model, the exporter that made it, why not the first one, and how far it is from torch."""

    model: ir.Model
    exporter: str
    reason: str = ""
    largest_error: float = 0.0


@dataclass(frozen=True, eq=False)
class TorchSession:
    """A PyTorch module (or exported program) behind the Session protocol, with the names that its export gets."""

    module: torch.nn.Module
    input: TensorInfo
    output_names: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    program: ExportedProgram | None = field(default=None, repr=False)

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The one input."""
        return (self.input,)

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs; -1 for a dynamic batch."""
        float32 = np.dtype(np.float32)
        shapes = zip(self.output_names, self.output_shapes, strict=True)
        return tuple(TensorInfo(name, shape, float32) for name, shape in shapes)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for one batch. Raises StageError when the model fails on it."""
        torch = require_torch()
        if set(feeds) != {self.input.name}:
            raise InputError(f"the PyTorch model takes the input {self.input.name!r}; given: {sorted(feeds)}")
        data = torch.from_numpy(np.array(feeds[self.input.name]))  # a copy: modules may write into their input
        try:
            with torch.inference_mode(), quiet():
                flat = _flatten(self.module(data))
        except Exception as error:
            raise StageError(
                f"the PyTorch model failed on an input of shape {tuple(data.shape)}: {_short(error)}"
            ) from error
        return {
            name: value.detach().cpu().numpy() for name, value in zip(self.output_names, flat.values(), strict=True)
        }


def open_torch(
    source: torch.nn.Module | ExportedProgram, shape: Sequence[int | str] | None, input_name: str | None = None
) -> TorchSession:
    """The module in eval mode, tried on one input of `shape` (batch first; the batch may be "dynamic").

    `shape` None takes the shape an exported program was made with. Raises InputError where the module takes other
    inputs than one tensor of that shape, or returns other things than tensors.
    """
    torch = require_torch()
    program: Any = None if isinstance(source, torch.nn.Module) else source
    module: Any = source if program is None else _program_module(program)
    if program is not None:
        shape = shape or _example_shape(program)
        argument = _only(_program_inputs(program), "the exported program")
    else:
        argument = _only(_required_arguments(module), f"{type(source).__name__}.forward")
    if shape is None:
        raise InputError(
            "input.shape is not set, and a PyTorch module does not tell it; accepted: such as [1, 3, 224, 224]"
        )
    check_batch(shape[0], input_name or argument)
    dynamic = shape[0] == "dynamic"
    sizes = (-1 if dynamic else int(shape[0]), *(int(size) for size in shape[1:]))
    info = TensorInfo(input_name or argument, sizes, np.dtype(np.float32))
    example = torch.zeros([_DYNAMIC_EXAMPLE if dynamic else sizes[0], *sizes[1:]])
    try:
        with torch.inference_mode(), quiet():
            flat = _flatten(module(example))
    except EdgeshipError:
        raise
    except Exception as error:
        raise InputError(
            f"the PyTorch model does not take an input of shape {list(example.shape)}: {_short(error)}"
        ) from error
    shapes = tuple((-1, *value.shape[1:]) if dynamic else tuple(value.shape) for value in flat.values())
    names = tuple(f"{name}_output" if name == info.name else name for name in flat)
    return TorchSession(module, info, names, shapes, program)


def _program_module(program: ExportedProgram) -> torch.nn.Module:
    """The program as a module, without the Python code that guards its sizes (the shape is checked here)."""
    unguarded = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**unguarded)


def _program_inputs(program: ExportedProgram) -> list[str]:
    return [str(name) for name in program.graph_signature.user_inputs]


def _example_shape(program: ExportedProgram) -> list[int | str]:
    name = _only(_program_inputs(program), "the exported program")
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    sizes: list[int | str] = [size if isinstance(size, int) else "dynamic" for size in value.shape]
    if "dynamic" in sizes[1:]:
        raise InputError(f"the exported program's input {name!r} has the shape {list(value.shape)}; set input.shape")
    return sizes


def _required_arguments(module: torch.nn.Module) -> list[str]:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    parameters = [each for each in inspect.signature(module.forward).parameters.values() if each.kind in kinds]
    needed = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    return needed or [each.name for each in parameters[:1]]


def _only(names: Sequence[str], what: str) -> str:
    if len(names) != 1:
        raise InputError(
            f"{what} takes {len(names)} inputs ({', '.join(names)}); accepted: one image tensor; with several, export "
            "it to ONNX (torch.onnx.export) and give that file as model.source"
        )
    return names[0]


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

    Raises StageError with both exporters' reasons when neither makes such a model.
    """
    exporters: dict[str, Callable[[TorchSession], bytes]] = {"dynamo": _dynamo}
    if session.program is None:  # the TorchScript exporter traces modules
        exporters["torchscript"] = _torchscript
    reasons: list[str] = []
    for name, exporter in exporters.items():
        try:
            with quiet():
                content = exporter(session)
            model = _named(parse(content), session)
            error = _verify(model, session, feeds, name)
        except EdgeshipError as failure:
            reasons.append(f"{name}: {failure}")
        except Exception as failure:  # exporters raise whatever their parts do
            reasons.append(f"{name}: {_short(failure)}")
        else:
            return Exported(model, name, "; ".join(reasons), error)
    raise StageError(f"the PyTorch model cannot be exported to ONNX: {'; '.join(reasons)}")


def _example(session: TorchSession) -> torch.Tensor:
    torch = require_torch()
    batch, *rest = session.input.shape
    return torch.zeros([_DYNAMIC_EXAMPLE if batch < 0 else batch, *rest])  # type: ignore[no-any-return]  # torch is imported late, as Any


def _dynamo(session: TorchSession) -> bytes:
    torch = require_torch()
    dynamic = session.input.shape[0] < 0
    options: dict[str, Any] = {
        "dynamo": True,
        "input_names": [session.input.name],
        "output_names": list(session.output_names),
        "opset_version": OPSET,
        "verbose": False,
        "external_data": False,
    }
    if session.program is not None:
        program = torch.onnx.export(session.program, (), **options)
    else:
        if dynamic:
            options["dynamic_shapes"] = ({0: torch.export.Dim(BATCH)},)
        program = torch.onnx.export(session.module, (_example(session),), **options)
    if program is None:
        raise StageError("the exporter returned nothing")
    return bytes(program.model_proto.SerializeToString())


def _torchscript(session: TorchSession) -> bytes:
    torch = require_torch()
    names = [session.input.name, *session.output_names]
    axes = {name: {0: BATCH} for name in names} if session.input.shape[0] < 0 else None
    buffer = io.BytesIO()
    torch.onnx.export(
        session.module,
        (_example(session),),
        buffer,
        dynamo=False,
        input_names=names[:1],
        output_names=names[1:],
        opset_version=OPSET,
        dynamic_axes=axes,
        do_constant_folding=True,
    )
    return buffer.getvalue()


def _named(model: ir.Model, session: TorchSession) -> ir.Model:
    """The model in plain form with exactly the session's input and outputs."""
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    if len(inputs) != 1 or len(outputs) != len(session.output_names):
        raise StageError(
            f"the exporter wrote {len(inputs)} inputs and {len(outputs)} outputs; "
            f"the module has 1 and {len(session.output_names)}"
        )
    for value, name in zip([*inputs, *outputs], [session.input.name, *session.output_names], strict=True):
        value.name = name
    for value, shape in zip(outputs, session.output_shapes, strict=True):
        value.shape = ir.Shape([BATCH if size < 0 else size for size in shape])
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    return plain_form(model)


def _verify(model: ir.Model, session: TorchSession, feeds: Sequence[Mapping[str, Array]], exporter: str) -> float:
    from edgeship.targets.onnxruntime import open_reference

    every = [*feeds, *random_feeds(model, 2)]
    return check_sessions(session, open_reference(to_bytes(model), 1), every, f"the {exporter} exporter")


def _short(error: Exception) -> str:
    """The exception's kind and the first line that says something, without addresses of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wordy = next(
        (line for line in lines if not line.startswith(("Failed to", "<class", "##", "- "))), lines[0] if lines else ""
    )
    return f"{type(error).__name__}: {wordy[:300]}"
