"""All operators the converter knows, by their ONNX names; one family of them per file, found by its name.

A family has `OPS`, operators with a conversion of their own, or `EXPANSIONS`, operators written as other ONNX
operators, or both. A file with neither is what several families share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType

from edgeship.targets.tflite.expansion import Expansion
from edgeship.targets.tflite.op import Op

FAMILIES: tuple[ModuleType, ...] = tuple(
    importlib.import_module(f"{__name__}.{module.name}")
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
)
REGISTRY: Mapping[str, Op] = {op.onnx: op for family in FAMILIES for op in getattr(family, "OPS", ())}
EXPANSIONS: Mapping[str, Expansion] = {
    item.onnx: item for family in FAMILIES for item in getattr(family, "EXPANSIONS", ())
}
