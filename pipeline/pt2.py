"""Returns a PyTorch exported program from a `.pt2` archive, once it is sure that reading it runs no code of its author.

torch.export.load trusts its file ("never load data from an untrusted source"). Read in torch 2.13's source, it
unpickles example inputs, weights and constants marked as pickled, and custom objects with weights_only=False, loads
AOTInductor's compiled libraries, walks attributes from dotted names of call targets
(`torch.serialization.os.system`), and evaluates symbolic sizes as expressions (sympy.sympify). So before it sees the
file, everything in it must be of the harmless kind: pickles that weights_only=True takes, call targets among
PyTorch's operators, expressions of symbols and plain functions; the guards' Python code, which `module()` would run,
is dropped. Whatever else is in the archive is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.file_kind import looks_like
from edgeship.pipeline.models import require_torch
from edgeship.pipeline.state_dict import check_finite
from edgeship.pipeline.torch_export import quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_SAFE_FOLDERS = ("data/weights/", "data/constants/", "data/sample_inputs/", "models/", "extra/", ".data/")
_SAFE_FILES = ("archive_format", "archive_version", "byteorder", "version", ".format_version", ".storage_alignment")
_PLAIN_OPERATORS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "neg",
        "pos",
        "abs",
        "getitem",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
        "xor",
        "not_",
        "lshift",
        "rshift",
    ]
)
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision|higher_order)(\.[A-Za-z_]\w*){1,2}"
    r"|torch\.(sym_\w+|_sym_\w+)|torch\._check\w*|math\.[a-z]\w*"
)
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_NUMBER = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?")
_FUNCTIONS = frozenset(
    [
        "Symbol",
        "Integer",
        "Rational",
        "Float",
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "And",
        "Or",
        "Not",
        "Abs",
        "Mod",
        "FloorDiv",
        "ModularIndexing",
        "CleanDiv",
        "CeilDiv",
        "IntTrueDiv",
        "FloatTrueDiv",
        "ToFloat",
        "TruncToInt",
        "CeilToInt",
        "FloorToInt",
        "PythonMod",
        "PowByNatural",
        "FloatPow",
        "Where",
    ]
)
_CONSTANTS = frozenset(("true", "false", "oo", "int_oo"))
_ASSUMPTIONS = frozenset(
    ("precision", "integer", "positive", "nonnegative", "negative", "real", "zero", "nonzero", "finite")
)
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop)
_LOOKS_UP_CODE = ("default_factory_module", "__enum__")
_LARGEST_GRAPH = 256 << 20


def load_exported(path: Path) -> ExportedProgram:
    """The exported program in `path`, whose weights are finite.

    Raises InputError for a file that is missing, damaged, from an old PyTorch, or holds what could run code.
    """
    torch = require_torch()
    if not path.is_file():
        raise InputError(f"the model {path} does not exist")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_archive(archive, path)
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError) as error:
        reason = looks_like(content) or f"damaged or another format: {error}"
        raise InputError(f"{path} is not a .pt2 archive: {reason}") from error
    with quiet():
        try:
            program = torch.export.load(io.BytesIO(content))
        except Exception as error:  # whatever a half-understood archive makes torch raise
            raise InputError(f"{path} cannot be read by torch {torch.__version__}: {_first_line(error)}") from error
    program._guards_code = []
    check_finite(program.state_dict, path)
    return program  # type: ignore[no-any-return]  # torch is imported late, as Any


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    names = archive.namelist()
    root = names[0].split("/", 1)[0] + "/" if names else ""
    members = {name.removeprefix(root): name for name in names}
    if len(members) != len(names) or any(not name.startswith(root) for name in names):
        raise InputError(f"{path} is not a .pt2 archive: its members have no folder, or the same name, in common")
    if "archive_format" not in members:
        raise InputError(f"{path} was written by PyTorch 2.7 or older; write it again with torch.export.save")
    for short, name in members.items():
        if archive.getinfo(name).file_size > _LARGEST_GRAPH and short.endswith(".json"):
            raise InputError(f"{path}: {short} is larger than {_LARGEST_GRAPH} bytes")
        if short not in _SAFE_FILES and not short.startswith(_SAFE_FOLDERS):
            raise InputError(f"{path} holds {short!r}, which may be executable code, so it is refused")
    for short, name in members.items():
        if short.startswith("models/") and short.endswith(".json"):
            _check_graph(json.loads(archive.read(name)), path)
        elif short.startswith("data/") and short.endswith("_config.json"):
            _check_payloads(json.loads(archive.read(name)), path)
        elif short.startswith("data/sample_inputs/") or (short.startswith("data/") and short.endswith(".pt")):
            _check_pickle(archive.read(name), short, path)


def _check_payloads(config: Any, path: Path) -> None:
    """Weights and constants must be plain tensors: pickled ones would be read with weights_only=False."""
    for name, payload in config["config"].items():
        file = str(payload["path_name"])
        if payload["use_pickle"] or file.startswith(("custom_obj", "opaque_obj")):
            raise InputError(
                f"{path}: {name!r} is stored as a pickled object, which could run code when read, so it is refused; "
                "accepted: tensors with storage of their own"
            )


def _check_pickle(content: bytes, member: str, path: Path) -> None:
    torch = require_torch()
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # any failure is a refusal
        raise InputError(
            f"{path}: {member} holds Python objects besides tensors, which could run code when read, so it is refused"
        ) from error


def _check_graph(graph: Any, path: Path) -> None:
    for key, value in _strings(graph):
        if key in ("target", "as_operator") and not _is_operator(value):
            raise InputError(f"{path} calls {value!r}, which is not one of PyTorch's operators, so it is refused")
        if key == "expr_str" and not _is_expression(value):
            raise InputError(f"{path} has the symbolic size {value!r}; accepted: symbols such as s0, and arithmetic")
        if any(word in value for word in _LOOKS_UP_CODE):
            raise InputError(f"{path} describes its arguments with Python types of other modules, so it is refused")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value with the key that it is under."""
    stack: list[tuple[str, Any]] = [(key, value)]
    while stack:
        where, each = stack.pop()
        if isinstance(each, str):
            yield where, each
        elif isinstance(each, dict):
            stack.extend((str(name), part) for name, part in each.items())
        elif isinstance(each, list):
            stack.extend((where, part) for part in each)


def _is_operator(target: str) -> bool:
    if "__" in target:
        return False
    if target.startswith("_operator."):
        return target.removeprefix("_operator.") in _PLAIN_OPERATORS
    # other strings name values and buffers of the graph (an output's target, a buffer's fully qualified name)
    return bool(_TARGET.fullmatch(target)) or not target.startswith(("torch", "math", "#", "_operator"))


def _is_expression(text: str) -> bool:
    """Whether `text` is arithmetic on symbols, numbers and functions of PyTorch; sympy would evaluate it."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _is_arithmetic(tree)


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Name():
            return node.id in _CONSTANTS or _SYMBOL.fullmatch(node.id) is not None
        case ast.Constant():
            return isinstance(node.value, int | float) or _NUMBER.fullmatch(str(node.value)) is not None
        case ast.Call():
            return _is_known_call(node)
        case ast.cmpop():
            return True
    return isinstance(node, _ARITHMETIC) and all(_is_arithmetic(child) for child in ast.iter_child_nodes(node))


def _is_known_call(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Name) or call.func.id not in _FUNCTIONS:
        return False
    if any(word.arg not in _ASSUMPTIONS or not isinstance(word.value, ast.Constant) for word in call.keywords):
        return False
    if call.func.id != "Symbol":
        return all(_is_arithmetic(argument) for argument in call.args)
    names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return len(call.args) == 1 and len(names) == 1 and _SYMBOL.fullmatch(str(names[0])) is not None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
