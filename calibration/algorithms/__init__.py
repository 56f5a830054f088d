"""Range algorithms, one per file: values of a tensor -> the interval its integers represent.

A file `<name>.py` here is an algorithm called `<name>`: it ends in `ALGORITHM = <a callable that returns a new
Observer>`. It is found by its file name, so a new algorithm is a new file and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import cast

from edgeship.calibration.errors import InputError, nearest
from edgeship.calibration.types import Observer

ObserverFactory = Callable[[], Observer]


def names() -> Sequence[str]:
    """The names of all algorithms, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ObserverFactory:
    """The factory of observers of the algorithm called `name`. Raises InputError with the names there are."""
    if name not in names():
        raise InputError(f"unknown range algorithm {name!r}{nearest(name, names())}")
    return cast(ObserverFactory, importlib.import_module(f"{__name__}.{name}").ALGORITHM)
