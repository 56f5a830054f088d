"""A small project of a user: model, recipe, images and arrays, and the check every bad input has to pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeship.calibration.types import Array
from edgeship.pipeline.report import RENDERED
from projects import TINY, run

RECIPE = f"""{TINY}
[quantize]
samples = 8
[targets.onnxruntime]
[targets.tflite]
"""


@dataclass(frozen=True)
class Refusal:
    """How a command ended: its exit code, the last line on stderr, and everything on stderr."""

    code: int
    sentence: str
    stderr: str


def _contents(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


@dataclass(frozen=True)
class Project:
    """The folder of a user."""

    folder: Path

    def set(self, old: str, new: str) -> None:
        """Replaces a piece of the recipe."""
        recipe = self.folder / "recipe.toml"
        text = recipe.read_text()
        assert old in text
        recipe.write_text(text.replace(old, new))

    def refuse(self, *args: str | Path, kept: Sequence[str] = (), gone: Sequence[str] = ()) -> Refusal:
        """Runs a command that must fail with one sentence, and leave the folder's files as they were.

        `kept`: folders of finished stages that may be left, complete as they are. `gone`: files that must be removed.
        """
        before = _contents(self.folder)
        result = run(*args)
        after = _contents(self.folder)
        pages = [f"run/{name}" for name in RENDERED]  # they say how the run failed
        allowed = (*(f"run/{name}/" for name in (".edgeship", *kept)), *pages)
        left = {name for name in after if name not in before and not name.startswith(allowed)}
        assert not left
        assert not [name for name in after if "/tmp-" in name or "/old-" in name]
        assert not set(gone) & set(after)
        untouched = {name: content for name, content in before.items() if name not in gone}
        assert {name: after.get(name) for name in untouched} == untouched, "an input was changed"
        assert result.exit_code in (1, 2), result.output
        assert result.stdout == ""
        lines = result.stderr.strip().splitlines()
        assert "Traceback" not in result.stderr
        assert lines[-1].startswith(("edgeship: ", "Error: "))
        assert "unexpected" not in lines[-1]
        return Refusal(result.exit_code, lines[-1], result.stderr)

    def refuse_deploy(self, *more: str, kept: Sequence[str] = (), gone: Sequence[str] = ()) -> Refusal:
        """Deploys the recipe into the folder `run`, which must fail."""
        return self.refuse("deploy", "recipe.toml", "--out", "run", *more, kept=kept, gone=gone)


@pytest.fixture
def project(
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_images: Array, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """A project that would deploy as it is; the test breaks one thing. Commands run in its folder."""
    (tmp_path / "model.onnx").write_bytes(tiny_models["plain"])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    np.savez(tmp_path / "tiny.npz", image=tiny_images, label=np.arange(len(tiny_images)) % 5)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


@pytest.fixture
def images(project: Project) -> Callable[..., Path]:
    """Makes the project calibrate on a folder of four images, and returns it."""

    def make() -> Path:
        folder = project.folder / "images"
        folder.mkdir()
        rng = np.random.default_rng(3)
        for index in range(4):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        project.set('calibration = "tiny.npz"', 'calibration = "images"')
        project.set('name = "image"', 'name = "image"\nshape = [1, 3, 12, 12]\nresize = [12, 12]')
        return folder

    return make
