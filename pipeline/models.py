"""Returns the trained model that a recipe names: a PyTorch module with its weights, or a file that holds both.

A `.py` file is the user's own program and runs; a file of weights or a `.pt2` archive is data and must not. Weights are
read as tensors only (torch.load(weights_only=True), or safetensors); see `pt2.py` for what a `.pt2` may hold.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgeship.calibration.types import Session
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.torch_export import TorchSession


def require_torch() -> ModuleType:
    """The torch module. Raises InputError with the command that installs it."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"a PyTorch model needs PyTorch, which cannot be imported ({error}); pip install edgeship[torch]"
        ) from error
    return torch


def require_training() -> None:
    """Raises InputError with the command that installs what training needs, where it is missing."""
    require_torch()
    missing = [name for name in ("accelerate", "matplotlib", "torch_pruning") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"training needs {', '.join(missing)}, not installed here; pip install edgeship[train]")


def open_source_session(recipe: Recipe) -> Session:
    """The recipe's model as its own framework runs it, with the names and shapes that its export has."""
    path = recipe.source_path
    if path is not None and path.suffix == ".onnx":
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.pipeline.onnx_source import read_source
        from edgeship.targets.onnxruntime import open_reference

        source = read_source(path, recipe.input.shape, recipe.input.name, recipe.input.others)
        return open_reference(to_bytes(source.model), 1)
    return open_torch_source(recipe)


def open_torch_source(recipe: Recipe) -> TorchSession:
    """The recipe's PyTorch model: a factory's module with its weights, or an exported program."""
    from edgeship.pipeline.pt2 import load_exported
    from edgeship.pipeline.torch_export import open_torch

    path, factory = recipe.source_path, recipe.source_factory
    if path is not None and path.suffix == ".pt2":
        if recipe.weights_path is not None:
            raise InputError(f"{recipe.path.name}: model.weights is set, but {path.name} holds its own weights")
        source: Any = load_exported(path)
    elif factory is None:
        raise InputError(
            f"{recipe.path.name}: model.source = {recipe.model.source!r} names no factory; "
            "accepted: PATH.py:factory, package.module:factory, model.onnx or model.pt2"
        )
    else:
        place = path if path is not None else recipe.model.source.rpartition(":")[0]
        source = build_module(place, factory, recipe.model.args, recipe.weights_path, recipe.model.weights_key)
    return open_torch(source, recipe.input.shape, recipe.input.name, recipe.input.others)


def build_module(
    source: Path | str,
    factory: str,
    args: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    key: str | None = None,
) -> torch.nn.Module:
    """The module that `factory(**args)` of a `.py` file (Path) or module (str) builds, with `weights`, in eval mode.

    `key` says where in the file of `weights` the state dict is. Raises InputError when the code cannot be imported, has
    no such factory, fails, or builds something else, and as `load_weights` does.
    """
    from edgeship.pipeline.state_dict import check_finite, load_weights

    torch = require_torch()
    model = call_factory(source, factory, args or {})
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{source}:{factory} returned {type(model).__name__}; accepted: a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights, key)
    check_finite(model.state_dict(), weights or source)
    return model.cpu().float().eval()  # type: ignore[no-any-return]  # torch is imported late, as Any


def call_factory(source: Path | str, factory: str, args: Mapping[str, Any]) -> Any:
    """What the function of a user's `.py` file (Path) or module (str) returns.

    Raises InputError when the code cannot be imported, has no such function, or fails.
    """
    with _imported(source) as module:
        build = _attribute(module, factory, source)
        try:
            return build(**args)
        except Exception as error:
            raise InputError(f"{source}:{factory} failed: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _imported(source: Path | str) -> Iterator[ModuleType]:
    """The user's module; sys.path and sys.modules are afterwards as they were, and no bytecode is written."""
    if isinstance(source, str):
        yield _import(lambda: importlib.import_module(source), source)
        return
    if not source.is_file():
        raise InputError(f"the model's source {source} is not a file; accepted: PATH.py:factory")
    name = f"edgeship_model_{hashlib.sha256(bytes(source)).hexdigest()[:12]}"
    before, path, writes = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(source.parent))
    sys.dont_write_bytecode = True
    try:
        yield _import(lambda: _run_file(name, source), source)
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = writes
        for each in set(sys.modules) - before:
            if each == name or _lies_in(sys.modules[each], source.parent):
                del sys.modules[each]


def _run_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import(load: Any, source: Path | str) -> ModuleType:
    try:
        return load()  # type: ignore[no-any-return]  # both loaders return modules
    except (Exception, SystemExit) as error:
        raise InputError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error


def _lies_in(module: ModuleType | None, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(folder.resolve())


def _attribute(module: ModuleType, name: str, source: Path | str) -> Any:
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    close = difflib.get_close_matches(name, own, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(sorted(own)) or 'none'}"
    raise InputError(f"{source} has no function {name!r}; {hint}")
