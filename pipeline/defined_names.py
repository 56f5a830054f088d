"""Returns which names a Python file defines, read off its text: nothing of it runs."""

from __future__ import annotations

import ast
import symtable
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeship.calibration.errors import InputError, nearest

_MAKERS = frozenset({"__getattr__", "eval", "exec", "globals", "locals", "setattr", "vars"})
"""Functions with which a module defines what its text does not show."""


@dataclass(frozen=True)
class Defined:
    """The names that a file's text gives to its module, those of functions and classes among them, and whether it may
    give others as it runs.
    """

    names: frozenset[str]
    callables: frozenset[str]
    and_others: bool


def check_factory(path: Path, factory: str) -> str | None:
    """A note where the file may define `factory`, but not in its text; None where its text does.

    Raises InputError where it cannot, and for a file that is not Python.
    """
    defined = defined_in(path)
    if factory in defined.names:
        return None
    if defined.and_others:
        return f"the text of {path.name} does not define {factory!r}; it may do so as it runs"
    there = nearest(factory, defined.callables) if defined.callables else "; it has no functions or classes"
    raise InputError(f"{path} defines no {factory!r}{there}")


def defined_in(path: Path) -> Defined:
    """The names that the Python file at `path` defines. Raises InputError for a file that is not Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the user's code: importing it will tell them
            tree = ast.parse(path.read_bytes(), str(path))
        table = symtable.symtable(ast.unparse(tree), str(path), "exec")
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as Python: {error}") from error
    symbols = list(_given(table))
    return Defined(
        frozenset(symbol.get_name() for symbol in symbols),
        frozenset(symbol.get_name() for symbol in symbols if symbol.is_namespace()),
        any(_makes_names(node) for node in ast.walk(tree)),
    )


def _given(table: symtable.SymbolTable) -> Iterator[symtable.Symbol]:
    """What the module's own code assigns, imports or defines, and what functions give to its `global` names."""
    for symbol in table.get_symbols():
        own = table.get_type() == "module" or symbol.is_declared_global()
        if own and (symbol.is_assigned() or symbol.is_imported()):
            yield symbol
    for inner in table.get_children():
        yield from _given(inner)


def _makes_names(node: ast.AST) -> bool:
    """Whether names may come from here that no text shows: a star import, a function for it, the module's own dict."""
    match node:
        case ast.ImportFrom(names=[ast.alias(name="*")]):
            return True
        case ast.Name(id=name) | ast.FunctionDef(name=name):
            return name in _MAKERS
        case ast.Attribute(value=ast.Name(id="sys"), attr="modules") | ast.Attribute(attr="__dict__"):
            return True
        case _:
            return False
