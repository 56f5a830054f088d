"""Returns the sizes that `--shape` gives to what a model leaves open."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from edgeship.calibration.errors import InputError


class Given(NamedTuple):
    """One `--shape`: of the input of this name, or of the first one."""

    name: str | None
    sizes: tuple[int, ...]


class Shape(click.ParamType[Given]):
    """Sizes with x or commas between them, batch first; an input's name and = before them."""

    name = "[NAME=]1x3x224x224"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Given:
        """The input's name, if one is given, and the sizes."""
        if isinstance(value, Given):
            return value
        name, _, text = str(value).rpartition("=")
        parts = re.split(r"[x,]", text)
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r}; accepted: sizes, batch first, such as 1x3x224x224 or image=1x3x224x224", param, ctx)
        return Given(name or None, tuple(int(part) for part in parts))


def shape_option(text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option `--shape`, of which there may be one for each input."""
    return click.option("--shape", "shapes", type=Shape(), multiple=True, help=text)


def by_input(shapes: Sequence[Given], inputs: Sequence[str], what: str) -> dict[str, tuple[int, ...]]:
    """The sizes by input. Raises InputError for an input that the model called `what` has not."""
    found = {}
    for given in shapes:
        name = inputs[0] if given.name is None else given.name
        if name not in inputs:
            raise InputError(f"--shape {name}=...: {what} has no such input; there are: {', '.join(inputs)}")
        found[name] = given.sizes
    return found


def open_inputs(inputs: Mapping[str, Sequence[Any]]) -> str:
    """The inputs that leave other sizes open than the batch's, in words; empty where none does."""
    found = [
        f"{name}: {' x '.join(str(size) if _is_size(size) else '?' for size in sizes)}"
        for name, sizes in inputs.items()
        if not all(_is_size(size) for size in sizes[1:])
    ]
    return "; ".join(found)


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and size > 0
