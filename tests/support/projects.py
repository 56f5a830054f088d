"""Small projects as users have them, and the command line that runs in this process.

Test files import this one by its name: `pythonpath` of pytest's settings leads here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner, Result

from edgeship.pipeline.cli import cli

TINY = """
name = "tiny"
[model]
source = "model.onnx"
[input]
name = "image"
[data]
calibration = "tiny.npz"
"""
"""The beginning of a recipe for one of the tiny models; what is put behind it may begin with more of `[data]`."""
TRAINABLE = """
name = "tiny"
[model]
source = "model.py:build"
[input]
name = "image"
shape = [1, 3, 8, 8]
"""
"""The beginning of a recipe for a network as code, with small images."""


def run(*arguments: str | Path) -> Result:
    """What `edgeship ARGUMENTS...` prints, and its exit code."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="edgeship")


def write_project(folder: Path, model: bytes, data: Path, more: str) -> Path:
    """The recipe, which ends in `more`, in a folder with its model and data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    shutil.copyfile(data, folder / "tiny.npz")
    recipe = folder / "recipe.toml"
    recipe.write_text(TINY + more)
    return recipe
