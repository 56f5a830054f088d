"""What `compress` and `train` leave behind: it is not made twice, and the command they print goes on from it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from edgeship.pipeline.cli import cli
from edgeship.pipeline.compression.outcome import finished_before
from edgeship.pipeline.pt2 import load_exported
from edgeship.pipeline.recipe import load_recipe

MODEL = """
import torch
from torch import nn

def build(channels=16):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, x):
        return self.inner(x) if x.shape[0] == 1 else torch.cat([self.inner(x[:1]) for _ in range(int(x.shape[0]))])

def fixed():
    return Fixed()
"""
RECIPE = """
name = "tiny"
model = { source = "model.py:build", weights = "weights.pt", args = { channels = 24 } }
input = { name = "image", shape = ["dynamic", 3, 8, 8] }
data = { training = "train.npz", calibration = "train.npz", evaluation = "test.npz" }
targets.onnxruntime = {}
benchmark = { runs = 5, warmup = 1, launches = 1 }
quantize.samples = 8
"""
TABLE = """
[compress]
training = { epochs = 1, batch_size = 16, lr = 0.05 }
"""
PRUNE = "prune = { max_bytes = 10000 }\n"


@pytest.fixture
def folder(tmp_path: Path, striped: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with its model and data, in the current folder."""
    batch = next(iter(striped(shuffle=False, batch_size=128).epoch(0)))
    images, labels = batch.inputs.numpy(), batch.labels.numpy()
    np.savez(tmp_path / "train.npz", image=images[:64], label=labels[:64])
    np.savez(tmp_path / "test.npz", image=images[96:], label=labels[96:])
    (tmp_path / "model.py").write_text(MODEL)
    made: dict[str, Any] = {}
    exec(MODEL, made)
    torch.save(made["build"](24).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "recipe.toml").write_text(RECIPE + TABLE + PRUNE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="edgeship")


def next_command(done: Result) -> list[str]:
    """The command that the last line of the output names."""
    name, *arguments = shlex.split(done.stdout.splitlines()[-1].split(" with: ")[1])
    assert name == "edgeship"
    return arguments


def test_what_is_finished_is_not_trained_again(folder: Path) -> None:
    first = run("compress", "recipe.toml", "-o", "out", "--json")
    assert first.exit_code == 0, first.stderr
    made = (folder / "out" / "made.json").read_bytes()
    seen = (folder / "out" / "model.pt2").stat().st_mtime_ns
    again = run("compress", "recipe.toml", "-o", "out", "--json")
    assert again.exit_code == 0
    assert "compress: out is up to date; --force trains again" in again.stderr
    assert (
        json.loads(again.stdout) == json.loads(first.stdout) == json.loads((folder / "out/compress.json").read_text())
    )
    assert (folder / "out" / "model.pt2").stat().st_mtime_ns == seen
    forced = run("compress", "recipe.toml", "-o", "out", "--force")
    assert "up to date" not in forced.stderr
    assert (folder / "out" / "model.pt2").stat().st_mtime_ns > seen
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "architecture.json", "compress.json", "made.json", "metrics.jsonl", "metrics.png", "model.pt2",
        "weights.safetensors",
    ]  # fmt: skip
    assert {**json.loads((folder / "out" / "made.json").read_text()), "outputs": []} == {
        **json.loads(made),
        "outputs": [],
    }


def change_weights(folder: Path) -> None:
    weights = torch.load(folder / "weights.pt", weights_only=True)
    torch.save({name: each + 0.01 for name, each in weights.items()}, folder / "weights.pt")


def change_data(folder: Path) -> None:
    os.replace(folder / "test.npz", folder / "train.npz")  # noqa: PTH105 - one line for both
    np.savez(folder / "test.npz", **dict(np.load(folder / "train.npz")))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "weights": change_weights,
    "data": change_data,
    "missing": lambda folder: (folder / "out" / "metrics.png").unlink(),
    "damaged": lambda folder: (folder / "out" / "weights.safetensors").write_bytes(b"\0" * 100),
    "record": lambda folder: (folder / "out" / "compress.json").write_text("{}"),
    "origin": lambda folder: (folder / "out" / "made.json").write_text('{"key": 1, "outputs": [{}]}'),
    "recipe": lambda folder: (folder / "recipe.toml").write_text(RECIPE + TABLE.replace("0.05", "0.04") + PRUNE),
    "code": lambda folder: (folder / "model.py").write_text(MODEL.replace("manual_seed(3)", "manual_seed(4)")),
}


def test_what_is_changed_or_damaged_is_made_again(folder: Path) -> None:
    assert run("compress", "recipe.toml", "-o", "out").exit_code == 0

    def is_finished(place: Path) -> bool:
        recipe = load_recipe(place / "recipe.toml")
        assert recipe.compress is not None
        return finished_before(recipe, recipe.compress, place / "out") is not None

    for name, change in CHANGES.items():
        place = Path(shutil.copytree(folder, folder.parent / f"{folder.name}-{name}"))
        assert is_finished(place)
        change(place)
        assert not is_finished(place), name
    CHANGES["damaged"](folder)
    again = run("compress", "recipe.toml", "-o", "out")
    assert again.exit_code == 0, again.stderr
    assert "up to date" not in again.stderr
    assert is_finished(folder)


@pytest.mark.parametrize("more", ["", '[compress.distill]\nteacher.source = "model.py:build"\n'])
def test_the_printed_command_deploys_what_was_compressed(more: str, folder: Path) -> None:
    teacher = '[quantize.qat]\nobjective = "teacher"\nepochs = 1\ndata = "training"\nbatch_size = 16\n' if more else ""
    (folder / "recipe.toml").write_text(RECIPE + TABLE + PRUNE + more + teacher)
    done = run("compress", "recipe.toml", "-o", "my out", "--set", "compress.training.lr=0.03")
    assert done.exit_code == 0, done.stderr
    command = next_command(done)
    assert command[-2:] == ["--compressed", "my out"]
    deployed = run(*command, "--out", "run", "--to", "quantize", "--json")
    assert deployed.exit_code == 0, deployed.stderr
    report = json.loads(deployed.stdout)
    assert report["stages"][0]["cached"]
    assert report["compress"]["goal"]["reached"] <= 10_000
    kept = folder / "run" / "1-compress" / "weights.safetensors"
    assert kept.read_bytes() == (folder / "my out" / "weights.safetensors").read_bytes()
    assert not (folder / "run" / "1-compress" / "made.json").exists()
    plain = run(*command[:-2], "--out", "run", "--to", "export", "--json")
    assert all(stage["cached"] for stage in json.loads(plain.stdout)["stages"])


def test_only_what_the_recipe_makes_is_deployed(folder: Path) -> None:
    assert run("compress", "recipe.toml", "-o", "out").exit_code == 0

    def refusal(*more: str) -> str:
        done = run("deploy", "recipe.toml", "--compressed", "out", "--out", "run", "--to", "export", *more)
        assert done.exit_code == 2, done.output
        return done.stderr

    assert "it was made with compress.prune.max_bytes = 10000, the recipe has 9000" in refusal(
        "--set", "compress.prune.max_bytes=9000"
    )
    assert "--force and --from compress train it again" in refusal("--force")
    (folder / "out" / "model.pt2").unlink()
    assert "model.pt2 is missing" in refusal()
    change_weights(folder)
    assert run("compress", "recipe.toml", "-o", "out").exit_code == 0
    change_weights(folder)
    assert "are not those it was made from" in refusal()
    (folder / "out" / "made.json").unlink()
    assert "made.json cannot be read" in refusal()
    (folder / "recipe.toml").write_text(RECIPE)
    assert "has no [compress] table" in refusal()


def test_what_another_version_made_is_deployed_too(folder: Path) -> None:
    assert run("compress", "recipe.toml", "-o", "out").exit_code == 0
    origin = folder / "out" / "made.json"
    origin.write_text(json.dumps({**json.loads(origin.read_text()), "key": "another version's"}))
    assert run("deploy", "recipe.toml", "--compressed", "out", "--out", "run", "--to", "export").exit_code == 0
    origin.write_text(origin.read_text().replace('"model.pt2"', '"../recipe.toml"'))
    done = run("deploy", "recipe.toml", "--compressed", "out", "--out", "run", "--to", "export")
    assert "names files that are not in the folder" in done.stderr


@pytest.mark.parametrize("table", ["", TABLE, TABLE + PRUNE])
def test_the_printed_command_goes_on_from_what_was_trained(table: str, folder: Path) -> None:
    (folder / "recipe.toml").write_text(RECIPE + table)
    done = run("train", "recipe.toml", "-o", "out")
    assert done.exit_code == 0, done.stderr
    command = next_command(done)
    if "prune" in table:
        assert command[0] == "compress"
        assert run(*command).exit_code == 0
        assert (folder / "out-pruned" / "model.pt2").exists()
    else:
        deployed = run(*command, "--out", "run", "--to", "quantize")
        assert deployed.exit_code == 0, deployed.stderr


def test_the_program_takes_the_batches_that_the_recipe_says(folder: Path) -> None:
    done = run("train", "recipe.toml", "-o", "out", "--set", "compress.training.lr=0.01")
    assert done.exit_code == 0, done.stderr
    program = load_exported(folder / "out" / "model.pt2").module()
    for size in (1, 2, 5):
        assert program(torch.zeros(size, 3, 8, 8)).shape == (size, 4)
    fixed = ("model={source='model.py:fixed'}", "compress.training.epochs=1", "compress.prune.ratio=0.4")
    done = run("train", "recipe.toml", "-o", "two", *(part for each in fixed[:2] for part in ("--set", each)))
    assert done.exit_code == 0, done.stderr
    assert "model.pt2 takes one sample at a time, with a dynamic batch it cannot be exported" in done.stdout
    assert load_exported(folder / "two" / "model.pt2").module()(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
