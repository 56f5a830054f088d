"""docs/recipe.md: every table and key of a recipe with its type, default and meaning, from the types that read it.

python -m edgeship.pipeline.recipe_manual > docs/recipe.md
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgeship.pipeline.recipe import Recipe
from edgeship.pipeline.recipe_sections import GATES

HEAD = """\
# The recipe

A recipe is one TOML file. Unknown keys are errors that name what was probably meant; nothing has a default that is not
on this page. `--set KEY=VALUE` overrides any key by its dotted path. A path is relative to the recipe's folder;
`${NAME}` in it is an environment variable, `${data.root}` the data's folder. `edgeship init` writes a commented recipe
to start from.

This page is generated from the types that read recipes.
"""


def manual() -> str:
    """The page."""
    parts = [HEAD]
    for title, section in _tables():
        lines = [f"## {title}", "", _sentence(section)]
        rows = [_row(name, field) for name, field in section.model_fields.items() if not _section_of(field)]
        lines += ["", "| key | type | default | meaning |", "|---|---|---|---|", *rows] if rows else []
        parts.append("\n".join(lines) + "\n")
    gates = [f"| `{name}` | {_cell(text)} |" for name, text in GATES.items()]
    head = ["## `[gates]`", "", "A gate nobody sets is not a gate.", "", "| gate | limit |", "|---|---|"]
    parts.append("\n".join([*head, *gates]) + "\n")
    return "\n".join(parts)


def _tables() -> Iterator[tuple[str, type[BaseModel]]]:
    """Each table's heading and its class, as they stand in a recipe."""
    yield "Top level", Recipe
    yield from _inside(Recipe, "")


def _inside(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is None:
            continue
        kind = typing.get_origin(field.annotation)
        place = f"{path}{field.alias or name}" + (".NAME" if kind is dict else "")
        yield (f"`[[{place}]]`" if kind is tuple else f"`[{place}]`"), inner
        yield from _inside(inner, f"{place}.")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the table that the field is, or holds."""
    for kind in (field.annotation, *_arguments(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _arguments(annotation: Any) -> Iterator[Any]:
    for argument in typing.get_args(annotation):
        yield argument
        yield from _arguments(argument)


def _row(name: str, field: FieldInfo) -> str:
    shown = f"`{field.alias or name}`"
    return f"| {shown} | {_cell(_kind(name, field))} | {_cell(_default(field))} | {_cell(field.description or '')} |"


def _kind(name: str, field: FieldInfo) -> str:
    """The type in words."""
    if name == "gates":
        return "table"
    return _words(field.annotation)


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _words(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if origin in (tuple, list):
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return "table"
    if arguments:
        return " or ".join(_words(each) for each in arguments if each is not type(None))
    return {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}.get(
        annotation, getattr(annotation, "__name__", str(annotation)).lower()
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _sentence(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").strip().splitlines()[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(manual())
