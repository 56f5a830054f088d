"""Training data behind a user's own function: what is refused beside it, and what says that they changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgeship.calibration.errors import InputError
from edgeship.pipeline.cli import cli
from edgeship.pipeline.recipe import load_recipe
from projects import TRAINABLE

MODEL = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 4))
"""
LOADERS = """
from pathlib import Path
import numpy as np
def loaders():
    arrays = np.load(Path(__file__).parent / "own" / "train.npz")
    return [(arrays["image"][at : at + 16], arrays["label"][at : at + 16]) for at in range(0, 64, 16)]
"""
RECIPE = f"""{TRAINABLE}
[data]
loaders = "loaders.py:loaders"
calibration = "own/train.npz"
[compress.training]
epochs = 1
lr = 0.05
[targets.onnxruntime]
"""


@pytest.fixture
def folder(tmp_path: Path, striped: Any) -> Path:
    """A recipe with a loader that reads a file of its own."""
    (tmp_path / "own").mkdir()
    write_images(tmp_path, striped)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "loaders.py").write_text(LOADERS)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def write_images(folder: Path, striped: Any, turned: bool = False) -> None:
    batch = next(iter(striped(shuffle=False, batch_size=64).epoch(0)))
    labels = batch.labels.numpy()
    np.savez(folder / "own" / "train.npz", image=batch.inputs.numpy(), label=labels[::-1] if turned else labels)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="edgeship")


def sets(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["compress.training.flip=true"], "compress.training.flip: seen true; loaders.py:loaders varies its images"),
        (["compress.training.shift=2"], "compress.training.shift: seen 2; loaders.py:loaders varies its images itself"),
        (["compress.training.batch_size=64"], "compress.training.batch_size: seen 64; loaders.py:loaders makes batch"),
        (["data.training_samples=50"], "data.training_samples: seen 50; loaders.py:loaders says itself how many"),
        (['quantize.qat={data="training", flip=true}'], "quantize.qat.flip: seen true; loaders.py:loaders varies its"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "train", "deploy"])
def test_keys_that_a_loader_would_ignore_are_refused(
    command: str, changes: list[str], message: str, folder: Path
) -> None:
    done = run(command, folder / "recipe.toml", "--out", folder / "out", *sets(changes))
    assert done.exit_code == 2
    assert message in done.stderr
    assert "accepted beside data.loaders: " in done.stderr
    assert not (folder / "out").exists()


def test_what_has_an_effect_beside_a_loader_is_accepted(folder: Path) -> None:
    mixed = ["compress.training.mixup=0.2", "compress.training.flip=false", "compress.training.seed=3"]
    load_recipe(folder / "recipe.toml", [*mixed, "quantize.qat={flip=true, shift=1, batch_size=8}"])
    load_recipe(folder / "recipe.toml", ['quantize.qat={data="training", batch_size=8}'])  # judges' batches are ours


def test_files_that_loaders_read_are_asked_for_beside_loaders_alone(folder: Path) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace("loaders =", "training = 'own/train.npz'\n# "))
    with pytest.raises(InputError, match=r"data\.loader_files: there are no data\.loaders"):
        load_recipe(folder / "recipe.toml", ['data.loader_files=["own"]'])


@pytest.mark.parametrize("named", ['"own"', '"own/train.npz"', '"train.npz"'])
def test_training_starts_anew_when_a_file_that_loaders_read_has_changed(named: str, folder: Path, striped: Any) -> None:
    qat = 'quantize.qat={data="training", epochs=1, objective="labels"}'
    arguments = ("deploy", folder / "recipe.toml", "--out", folder / "run", "--to", "quantize", "--json")
    arguments += tuple(sets([f"data.loader_files=[{named}]", "data.root=own", "data.calibration=calibration.npz", qat]))
    (folder / "own" / "train.npz").rename(folder / "calibration.npz")
    write_images(folder, striped)

    def cached() -> dict[str, bool]:
        done = run(*arguments)
        assert done.exit_code == 0, done.stderr
        return {stage["name"]: stage["cached"] for stage in json.loads(done.stdout)["stages"]}

    assert not any(cached().values())
    assert all(cached().values())
    write_images(folder, striped, turned=True)
    now = cached()
    assert not now["compress"]
    assert not now["quantize"]


def test_a_file_moved_to_another_class_folder_is_a_change(folder: Path) -> None:
    from edgeship.pipeline.stages.compress import STAGE

    recipe = load_recipe(folder / "recipe.toml", ['data.loader_files=["own"]'])
    (folder / "own" / "a").mkdir()
    (folder / "own" / "a" / "1.png").write_bytes(b"1")
    before = STAGE.settings(recipe, ["onnxruntime"])
    (folder / "own" / "a").rename(folder / "own" / "b")
    assert STAGE.settings(recipe, ["onnxruntime"]) != before


def test_files_that_loaders_read_must_exist(folder: Path) -> None:
    done = run("train", folder / "recipe.toml", "-o", folder / "out", *sets(['data.loader_files=["nowhere"]']))
    assert done.exit_code == 2
    assert "data.loader_files: 'nowhere' does not exist; looked for" in done.stderr
    assert not (folder / "out").exists()
