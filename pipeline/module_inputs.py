"""Returns what a PyTorch module, or an exported program, takes: its inputs in order, each with a name and a shape.

`shape` is that of the main input, which the recipe's [input] is about; `others` are further arguments by name. A module
does not tell the shapes of its arguments, a program does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

Shape = Sequence[int | str]
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def module_arguments(
    module: torch.nn.Module, shape: Shape | None, others: Mapping[str, Shape], input_name: str | None
) -> list[tuple[str, Shape]]:
    """What `forward` is called with, in its order: the arguments that it needs, and those that `others` names.

    Raises InputError where that is not one argument besides the others, or a shape is missing.
    """
    what = f"{type(module).__name__}.forward"
    parameters = [each for each in inspect.signature(module.forward).parameters.values() if each.kind in _POSITIONAL]
    names = [each.name for each in parameters]
    needed = [each.name for each in parameters if each.default is inspect.Parameter.empty] or names[:1]
    _check_names(others, names, what)
    given = [name for name in names if name in needed or name in others]
    left_out = [name for name in names[: len(given)] if name not in given]
    if left_out:
        raise InputError(
            f"input.others: {what} takes {left_out[0]} before {given[-1]}, and nothing is given for it; accepted: "
            f"{left_out[0]} in input.others, too"
        )
    main = [name for name in given if name not in others]
    if len(main) > 1:
        listed = ", ".join(f"{name} = [1, ...]" for name in main[1:])
        raise InputError(
            f"{what} takes {len(given)} inputs ({', '.join(given)}), and input.shape is about one; accepted: the "
            f"shapes of the others in [input], such as others = {{ {listed} }}"
        )
    if not main:
        raise InputError(f"input.others names every input of {what}; accepted: all but the one of input.shape")
    if shape is None:
        raise InputError(
            "input.shape is not set, and a PyTorch module does not tell it; accepted: such as [1, 3, 224, 224]"
        )
    return _named({**dict.fromkeys(given, shape), **others}, given, main[0], input_name)


def program_arguments(
    program: ExportedProgram, shape: Shape | None, others: Mapping[str, Shape], input_name: str | None
) -> list[tuple[str, Shape]]:
    """What the program is called with, in its order, in the shapes it was made with where none is given.

    The main input is the one called `input_name`, or else the first that `others` does not name.
    """
    names = [str(name) for name in program.graph_signature.user_inputs]
    _check_names(others, names, "the exported program")
    free = [name for name in names if name not in others]
    if not free:
        raise InputError("input.others names every input of the exported program; accepted: all but one")
    main = input_name if input_name in free else free[0]
    given = {**others, **({} if shape is None else {main: shape})}
    shapes = {name: given.get(name) or _example_shape(program, name, name == main) for name in names}
    return _named(shapes, names, main, input_name)


def _check_names(others: Mapping[str, Shape], names: Sequence[str], what: str) -> None:
    for name in others:
        if name not in names:
            raise InputError(f"input.others: {what} has no input {name!r}{nearest(name, names)}")


def _named(
    shapes: Mapping[str, Shape], order: Sequence[str], main: str, input_name: str | None
) -> list[tuple[str, Shape]]:
    """Names and shapes in order, the main input under the recipe's name for it."""
    if input_name is not None and input_name != main and input_name in order:
        raise InputError(
            f"input.name = {input_name!r} is the name of another input; accepted: {main!r}, or a name that is free"
        )
    return [(input_name or name if name == main else name, shapes[name]) for name in order]


def _example_shape(program: ExportedProgram, name: str, is_main: bool) -> Shape:
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    sizes: list[int | str] = [size if isinstance(size, int) else "dynamic" for size in value.shape]
    if "dynamic" in sizes[1:]:
        key = "input.shape" if is_main else f"input.others.{name}"
        raise InputError(f"the exported program's input {name!r} has the shape {list(value.shape)}; set {key}")
    return sizes
