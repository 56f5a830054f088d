"""Importing edgeship is cheap, and imports go one way: frameworks are loaded where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("calibration", "pipeline", "targets")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
HEAVY = ("ai_edge_litert", "sklearn", "tensorflow", "torch")
TRAINING = [path for path in FILES if {"compression", "learned"} & set(path.parts)]
OPERATORS = sorted((ROOT / "targets" / "tflite" / "ops").glob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("edgeship", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute, so that they can be searched"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_no_module_loads_a_framework_or_an_optional_runtime_when_imported() -> None:
    code = f"""
import importlib, json, sys
blame = {{}}
for name in {[module_name(path) for path in FILES if path not in TRAINING]!r}:
    importlib.import_module(name)
    for heavy in {HEAVY!r}:
        if heavy in sys.modules:
            blame.setdefault(heavy, name)
print(json.dumps(blame))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{}", "a module loads these when it is imported"


@pytest.mark.parametrize("path", [path for path in FILES if path not in TRAINING], ids=module_name)
def test_the_training_side_is_imported_only_when_a_recipe_asks_for_it(path: Path) -> None:
    """Its modules import torch at their top; so nobody may import them at theirs."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in top for alias in node.names]
    names += [str(node.module) for node in top if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("edgeship.pipeline.compression")]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_use_the_package_name(path: Path) -> None:
    bare = {name for name in imported(path) if name.split(".")[0] in PACKAGES}
    assert not bare, "the bare names make a second copy of every class"


@pytest.mark.parametrize("path", OPERATORS, ids=module_name)
def test_operators_see_the_tflite_target_and_the_shared_types_only(path: Path) -> None:
    own = {name for name in imported(path) if name.startswith("edgeship.")}
    allowed = ("edgeship.targets.tflite", "edgeship.calibration.types", "edgeship.calibration.errors")
    assert not {name for name in own if not name.startswith(allowed)}
