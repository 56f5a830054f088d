"""Returns the weights in a file: a state dict, alone or inside what a training run saved beside it.

Nothing in the file is run: `torch.load(weights_only=True)` makes tensors, plain containers, and the few other types
named in `_HARMLESS`, which are data and which training scripts save with their weights.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.file_kind import is_lfs_pointer, looks_like
from edgeship.pipeline.models import require_torch

if TYPE_CHECKING:
    import torch

_SAVE = "torch.save(model.state_dict(), 'weights.pt')"
_NUMPY_SCALAR = np.float64().__reduce__()[0]
"""What numpy's numbers are made with when they are read; it has no public name."""
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 calls it
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),  # a number such as the best accuracy so far
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy before 2 called it
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
)
_COUNTER = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside the average: how many weights went into it."""


def load_weights(model: torch.nn.Module, path: Path, key: str | None = None) -> None:
    """Puts the state dict in `path` (.safetensors, or torch's format) into `model`, every key and shape matching.

    Of a checkpoint with several state dicts, `key` says which. A prefix that wrappers put before every key ("module.",
    "_orig_mod.", "model.") is taken off. Raises InputError for a file that is missing, damaged or no state dict, and
    with the first keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    loaded = _plain(read_state_dict(path, key), own)
    problems = _mismatches(own, loaded)
    if problems:
        raise InputError(f"{path} does not fit the model: {'; '.join(problems)}")
    check_finite(loaded, path)
    model.load_state_dict({name: loaded[name] for name in own if name in loaded}, strict=False)


def read_state_dict(path: Path, key: str | None = None) -> Mapping[str, torch.Tensor]:
    """The tensors by name in a weights file, as they were saved. Raises InputError as `load_weights` does."""
    torch = require_torch()
    if not path.is_file():
        raise InputError(f"the weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(list(_HARMLESS)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise what they like on damaged files
        raise InputError(_unreadable(path, error)) from error
    return _state_dict(content, path, key)


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if is_lfs_pointer(start):
        return f"{path} holds no weights: {looks_like(start)}"
    text = str(error)
    if "weights_only" in text or "Unsupported" in text or "GLOBAL" in text:
        unknown = re.search(r"GLOBAL ([\w.]+)", text)
        return (
            f"{path} holds Python objects besides tensors, which could run code when read, so it is refused"
            f"{f' ({unknown[1]})' if unknown else ''}; save the state dict alone: {_SAVE}"
        )
    first = (text.splitlines() or ["the file ends too early" if isinstance(error, EOFError) else "no reason given"])[0]
    return f"{path} cannot be read as weights (damaged or another format): {type(error).__name__}: {first[:200]}"


def _state_dict(content: Any, path: Path, key: str | None) -> Mapping[str, torch.Tensor]:
    """The one state dict that the content is, or holds under `key`, or holds at all."""
    torch = require_torch()
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} holds {type(content).__name__}, not a state dict; save one: {_SAVE}")
    held = [name for name, value in content.items() if _is_state_dict(value)]
    if key is not None:
        if key not in held:
            there = _few(held) or "none"
            raise InputError(f"{path} holds no state dict under {key!r} (weights_key); there are: {there}")
        content = content[key]
    elif len(held) > 1:
        raise InputError(f"{path} holds several state dicts: {_few(held, 8)}; say which one with model.weights_key")
    elif held:
        content = content[held[0]]
    odd = [f"{name!r}: {type(each).__name__}" for name, each in content.items() if not isinstance(each, torch.Tensor)]
    if odd:
        raise InputError(f"{path} is not a state dict: {_few(odd)} are not tensors; save one: {_SAVE}")
    return {str(name): value for name, value in content.items()}


def _is_state_dict(value: Any) -> bool:
    torch = require_torch()
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, torch.Tensor) for each in value.values())


def _plain(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without what wrappers put before every key: the first part of the names, where `own` has none."""
    plain = {name: value for name, value in state.items() if name != _COUNTER or name in own}
    for prefix in _common_prefixes(plain):
        if any(name.startswith(prefix) for name in own):
            break
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _common_prefixes(names: Iterable[str]) -> Iterator[str]:
    """ "a." and then "b." for names that all begin with "a.b."."""
    parts = [name.split(".") for name in names]
    for together in zip(*(each[:-1] for each in parts), strict=False):
        if len(set(together)) != 1:
            return
        yield f"{together[0]}."


def _mismatches(own: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> list[str]:
    # num_batches_tracked counts training steps: weights saved before PyTorch 0.4.1 lack it, and inference ignores it
    missing = [key for key in own if key not in loaded and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in loaded if key not in own]
    shaped = [
        f"{key} {tuple(loaded[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in loaded and loaded[key].shape != own[key].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
    return [f"{len(keys)} {what}: {_few(keys)}" for what, keys in found if keys]


def check_finite(state: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Raises InputError naming the tensors of `state` that hold NaN or infinite values."""
    torch = require_torch()
    bad = [
        f"{key} ({int((~torch.isfinite(value)).sum())} of {value.numel()} values)"
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise InputError(f"{where} has weights that are NaN or infinite: {_few(bad)}; accepted: finite numbers")


def _few(items: Sequence[str], count: int = 3) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
