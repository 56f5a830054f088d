"""Returns where a PyTorch module takes Python values out of tensors that depend on its input.

A trace records operations on tensors. What Python does with a value, such as an `if` on a mean, happens while tracing
and is not in the trace: the traced network does for every input what the module did for one. Sizes are Python values
too, which no fixed shape changes, and so are values of weights and buffers; torch warns of all of them alike. Here
every storage that an operation wrote from the input is marked, views and writes in place included, and the functions
that turn a tensor into a Python value are watched for marked ones.
"""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.types import Array
from edgeship.pipeline.models import require_torch

if TYPE_CHECKING:
    import torch

_TO_PYTHON = {
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
}
"""Functions of torch and methods of its tensors whose result is not traced; torch.tensor's is a constant, too."""
_SHAPE_ONLY = ("_like", "new_")
"""Operators that read a tensor's shape and not its values end or begin so."""
_CODE = 100
"""Characters of a line of code that a message shows."""


@dataclass(frozen=True)
class FrozenValue:
    """Where something depends on the input, as "file.py:12", and the line of code there."""

    place: str
    code: str

    def __str__(self) -> str:
        return f"{self.place} (`{self.code}`)"


@dataclass(frozen=True)
class InputDependence:
    """Where values are taken of tensors that depend on the input, and where tensors get a size that depends on it."""

    values: tuple[FrozenValue, ...] = ()
    sizes: tuple[FrozenValue, ...] = ()


def input_dependence(module: torch.nn.Module, inputs: Iterable[Sequence[Array]]) -> InputDependence:
    """What of `module`, run on each of `inputs` (its arguments), depends on their values besides tensors."""
    torch = require_torch()
    watch = _watch()
    values: list[FrozenValue] = []
    sizes: list[FrozenValue] = []
    for each in inputs:
        tensors = [torch.tensor(array) for array in each]
        marks, calls = watch(tensors)
        with torch.no_grad(), calls, marks:
            module(*tensors)
        values += calls.found
        sizes += marks.sizes
    return InputDependence(tuple(dict.fromkeys(values)), tuple(dict.fromkeys(sizes)))


def _watch() -> Any:
    """What makes the two modes for some inputs; their bases are torch's, which is imported late."""
    torch = require_torch()
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
        def __init__(self, inputs: Sequence[Any]) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # torch's own
            self.storages = {_storage(each) for each in inputs}
            self.sizes: list[FrozenValue] = []

        def holds(self, values: Any) -> bool:
            return any(_storage(each) in self.storages for each in _tensors_in(values))

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            shape_only = name.endswith(_SHAPE_ONLY[0]) or name.startswith(_SHAPE_ONLY[1])
            if not shape_only and self.holds((args, kwargs)):
                self.storages.update(_storage(each) for each in _tensors_in(result))
                if torch.Tag.dynamic_output_shape in function.tags and self.holds(_choosers(name, args)):
                    self.sizes.append(_here())
            return result

    class Calls(TorchFunctionMode):
        def __init__(self, marks: Marks) -> None:
            super().__init__()
            self.marks = marks
            self.found: list[FrozenValue] = []

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            if (name in _TO_PYTHON or function is torch.tensor) and self.marks.holds((args, kwargs)):
                self.found.append(_here())
            return function(*args, **(kwargs or {}))

    def watch(inputs: Sequence[Any]) -> tuple[Marks, Calls]:
        marks = Marks(inputs)
        return marks, Calls(marks)

    return watch


def _choosers(operator: str, args: Any) -> list[torch.Tensor]:
    """The arguments that decide how large the result is, of an operator that can give any size.

    An index of numbers gives as many values as there are numbers, and a mask as many as it has ones.
    """
    if operator not in ("index", "masked_select"):
        return _tensors_in(args)
    return [each for each in _tensors_in(args[1:]) if not each.dtype.is_signed]


def _tensors_in(values: Any) -> list[torch.Tensor]:
    """The dense tensors in what a function takes or returns."""
    torch = require_torch()
    from torch.utils._pytree import tree_leaves

    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor) and each.layout is torch.strided]


def _storage(tensor: torch.Tensor) -> Any:
    """What tells the tensor's memory, which its views share, from all other; it does not keep it alive."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's own


def _here() -> FrozenValue:
    """The innermost line that is being run outside torch, or in it where there is none, below `input_dependence`."""
    own, libraries = __file__, str(Path(str(require_torch().__file__)).parent) + os.sep
    stack = traceback.extract_stack()
    begun = next(place for place, frame in enumerate(stack) if frame.filename == own)
    inner = [frame for frame in stack[begun:] if frame.filename != own]
    frame = [each for each in inner if not each.filename.startswith(libraries) or each is inner[0]][-1]
    return frozen_at(frame.filename, frame.lineno or 0)


def frozen_at(file: str, line: int) -> FrozenValue:
    """The place with its code."""
    return FrozenValue(f"{Path(file).name}:{line}", linecache.getline(file, line).strip()[:_CODE])
