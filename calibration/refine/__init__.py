"""Refinements, one per file: a complete plan -> a better one of the same shape (other scales, integers or biases).

A file `<name>.py` here is a refinement called `<name>`: it ends in `REFINEMENT = <a Refinement>`. It says which
tensors it wants to see during calibration, so that all refinements and the range algorithm share one pass over the
samples.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import onnx_ir as ir

from edgeship.calibration.collect import Statistic
from edgeship.calibration.errors import InputError
from edgeship.calibration.types import QuantPlan, QuantRules


class Refinement(Protocol):
    """Improves a plan."""

    def statistics(self, model: ir.Model, rules: QuantRules) -> Mapping[str, Statistic]:
        """What to collect, new and empty, by tensor name."""

    def refine(self, model: ir.Model, plan: QuantPlan, seen: Mapping[str, Statistic]) -> QuantPlan:
        """The refined plan; `seen` is what `statistics` asked for, after all samples."""


def names() -> Sequence[str]:
    """The names of all refinements, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Refinement:
    """The refinement called `name`. Raises InputError with the names there are."""
    if name not in names():
        raise InputError(f"unknown refinement {name!r}; there are: {', '.join(names())}")
    return cast(Refinement, importlib.import_module(f"{__name__}.{name}").REFINEMENT)
