"""Returns the state of a training run from one file of tensors and numbers, which is read without running code.

Written in one rename: a run killed at any time leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.workspace import write_atomically

FORMAT = 1
FILE = "checkpoint.pt"


@dataclass
class Position:
    """How far a run is: the epoch and the steps done in it, what these summed up to, and the finished epochs."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Replaces the folder's checkpoint by `state`: nested dicts and lists of tensors, numbers and text."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(folder / FILE, buffer.getvalue())


def read_checkpoint(folder: Path, model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The folder's checkpoint; None where there is none.

    Raises InputError where it is damaged, or of another model or other settings.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"], dict(state["model"]), dict(state["settings"])
    except Exception as error:  # torch raises what it likes on damaged files
        raise InputError(
            f"the checkpoint {path} cannot be read: {_first_line(error)}; remove it to start anew"
        ) from error
    if found[0] != FORMAT:
        raise InputError(
            f"the checkpoint {path} has the format {found[0]}; accepted: {FORMAT}; remove it to start anew"
        )
    _check_model(path, found[1], model)
    changed = [
        f"{key} = {found[2].get(key)!r} instead of {settings.get(key)!r}"
        for key in sorted({*found[2], *settings})
        if found[2].get(key) != settings.get(key)
    ]
    if changed:
        raise InputError(
            f"the checkpoint {path} is of a run with other settings: {'; '.join(changed[:3])}; remove it to start anew"
        )
    return dict(state)


def _check_model(path: Path, found: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in found.items()}
    differing = [name for name in sorted({*own, *other}) if own.get(name) != other.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"the checkpoint {path} is of another model: {len(differing)} tensors differ, such as {name} "
            f"({other.get(name, 'absent')} instead of {own.get(name, 'absent')}); remove it to start anew"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0][:200]}"


def random_state() -> dict[str, Any]:
    """The state of every generator that a model or a user's loader may draw from."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # the global generator is what users draw from
    version, numbers, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), [int(key) for key in keys], int(place), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts every generator back to where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))  # as above
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int, epoch: int) -> None:
    """Seeds every generator that a model or a user's loader may draw from, for one epoch."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)  # the global generator is what users draw from
    random.seed(mixed)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """A while in which every generator starts at `seed`, so that a loader gone through draws the same numbers each
    time; the state from before comes back.
    """
    before = random_state()
    seed_everything(seed, 0)
    try:
        yield
    finally:
        restore_random_state(before)
