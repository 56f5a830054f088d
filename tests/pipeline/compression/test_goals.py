"""What a recipe asks compression for, and what the record says was reached; a goal that removes nothing is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from edgeship.pipeline.benchmark.measure import Schedule
from edgeship.pipeline.cli import cli
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression import compressor, reached
from edgeship.pipeline.compression.artifact import latency_of
from edgeship.pipeline.compression.compressor import Compressor
from edgeship.pipeline.compression.importance import Evidence, channel_scores
from edgeship.pipeline.compression.saved import build_dense
from edgeship.pipeline.compression.structured import Ranking, bytes_goal, prunable, remove_channels, sizes_in
from edgeship.pipeline.recipe import load_recipe

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))

def build(channels=16):
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))
    last = nn.Sequential(nn.Conv2d(channels, 24, 3, padding=1), nn.ReLU())
    return nn.Sequential(stem, *(Block(channels) for _ in range(4)), last, head)

def normed():
    model = build()
    nn.utils.parametrizations.weight_norm(model[1].conv)
    torch.nn.utils.parametrizations.spectral_norm(model[2].conv)
    return model
"""
RECIPE = """
name = "tiny"
model.source = "model.py:build"
input.name = "image"
input.shape = [1, 3, 8, 8]
data = { training = "train.npz", calibration = "train.npz", evaluation = "test.npz" }
compress.training = { epochs = 1, batch_size = 16, lr = 0.05 }
targets.onnxruntime = {}
benchmark = { runs = 5, warmup = 1, launches = 1 }
"""


@pytest.fixture
def folder(tmp_path: Path, striped: Any) -> Path:
    """A recipe with its model and data."""
    batch = next(iter(striped(shuffle=False, batch_size=128).epoch(0)))
    images, labels = batch.inputs.numpy(), batch.labels.numpy()
    np.savez(tmp_path / "train.npz", image=images[:96], label=labels[:96])
    np.savez(tmp_path / "test.npz", image=images[96:], label=labels[96:])
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def sets(*values: str) -> Sequence[str]:
    return [part for value in values for part in ("--set", value)]


def compress(folder: Path, prune: str, *more: str) -> Result:
    changes = [f"compress.prune.{each}" for each in prune.split()]
    arguments = ["compress", str(folder / "recipe.toml"), "-o", str(folder / "out"), *sets(*changes, *more)]
    return CliRunner().invoke(cli, arguments, prog_name="edgeship")


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "compress.json").read_text())  # type: ignore[no-any-return]  # a table


@pytest.mark.parametrize(
    ("prune", "limit", "least", "most"),
    [
        ("macs=0.7", 0.7, 0.2, 0.7),
        ("max_bytes=30000", 30_000, 15_000, 30_000),
        ("ratio=0.5 scope=layer layer_limit=0.6", 0.5, 0.4, 0.6),
        ("kind=soft ratio=0.5 scope=layer", 0.5, 0.4, 0.6),
        ("kind=blocks ratio=0.5", 0.5, 0.5, 0.5),
        ("kind=unstructured ratio=0.8", 0.8, 0.79, 0.81),
    ],
)
def test_the_record_says_what_was_asked_for_and_what_was_reached(
    prune: str, limit: float, least: float, most: float, folder: Path
) -> None:
    done = compress(folder, prune)
    assert done.exit_code == 0, done.stderr
    facts = facts_of(folder)
    goal = facts["goal"]
    assert goal["name"] in prune
    assert goal["limit"] == limit
    assert least <= goal["reached"] <= most
    assert f"goal         {goal['name']} = " in done.stdout
    assert "missed" not in done.stdout
    assert "nothing was removed" not in done.stdout
    if goal["name"] == "macs":
        assert goal["reached"] == pytest.approx(facts["after"]["macs"] / facts["before"]["macs"], abs=1e-6)


def test_a_latency_is_measured_and_what_was_reached_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Schedule(20, 2, 1)
    for module, name in ((compressor, "LATENCY_RUNS"), (compressor, "CONFIRMING_RUNS"), (reached, "CONFIRMING_RUNS")):
        monkeypatch.setattr(module, name, few)
    wide = "model.args.channels=64"
    recipe = load_recipe(folder / "recipe.toml", [wide])
    limit = round(0.6 * latency_of(recipe, build_dense(recipe), "onnxruntime", few), 5)
    done = compress(folder, f"kind=blocks max_latency_ms={limit}", wide, "compress.training.precision=bfloat16")
    assert done.exit_code == 0, done.stderr
    facts = facts_of(folder)
    assert (facts["goal"]["name"], facts["goal"]["limit"]) == ("max_latency_ms", limit)
    assert facts["goal"]["reached"] > 0
    assert facts["blocks"]
    assert ("missed" in done.stdout) == (facts["goal"]["reached"] > limit)


def test_a_latency_that_is_missed_after_all_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(_self: Compressor, model: torch.nn.Module, prune: Any, schedule: Any) -> float:
        return sum(each.numel() for each in model.parameters()) / 1000

    monkeypatch.setattr(Compressor, "_latency_ms", size)
    monkeypatch.setattr(reached, "latency_of", lambda *_: 9.5)
    done = compress(folder, "max_latency_ms=9")
    assert done.exit_code == 0, done.stderr
    assert facts_of(folder)["goal"] == {"name": "max_latency_ms", "limit": 9.0, "reached": 9.5}
    assert "goal         max_latency_ms = 9; reached: 9.5, missed" in done.stdout
    assert "9.5 ms were measured at the end" in facts_of(folder)["notes"][0]


@pytest.mark.parametrize(
    ("prune", "message", "enough"),
    [
        ("ratio=0.03", "removes none of the network's 40 channels", "ratio="),
        ("ratio=0.1 scope=layer", "removes none of the network's 40 channels", "scope=layer ratio="),
        (
            "ratio=0.1 scope=layer kind=soft",
            "removes none of the network's 40 channels",
            "scope=layer kind=soft ratio=",
        ),
        ("kind=blocks ratio=0.1", "removes none of the network's 4 residual blocks", "kind=blocks ratio="),
        ("kind=unstructured ratio=0.00001", "makes none of the network's 13200 weights", "kind=unstructured ratio="),
    ],
)
def test_a_share_that_rounds_to_nothing_is_refused_with_the_least_that_does_not(
    prune: str, message: str, enough: str, folder: Path
) -> None:
    refused = compress(folder, prune)
    assert refused.exit_code == 2
    assert message in refused.stderr
    least = refused.stderr.split("accepted: at least ")[1].split(",")[0].strip()
    done = compress(folder, enough + least)
    assert done.exit_code == 0, done.stderr
    assert facts_of(folder)["goal"]["reached"] > 0
    assert "nothing was removed" not in done.stdout


@pytest.mark.parametrize("kind", ["structured", "blocks", "mixed"])
def test_a_goal_that_is_met_already_is_told(kind: str, folder: Path) -> None:
    done = compress(folder, f"kind={kind} max_bytes=90000000")
    assert done.exit_code == 0, done.stderr
    assert not facts_of(folder)["cuts"]
    assert not facts_of(folder)["blocks"]
    size = 4 * facts_of(folder)["after"]["parameters"]
    assert f"nothing was removed: max_bytes = 90000000 is met without: the network has {size}" in done.stdout


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_shares_too_small_to_go_in_one_step_add_up(scope: Any, build: Any) -> None:
    example = torch.zeros(1, 3, 8, 8)
    settings = Prune(ratio=0.4, scope=scope, steps=8)

    def ranking(model: torch.nn.Module) -> Ranking:
        groups = prunable(model, example, settings).groups
        scores = {group.name: channel_scores(model, group, "magnitude", Evidence()) for group in groups}
        return Ranking(groups, scores, settings, sizes_in(dense, groups, model))

    dense, model = build("residual"), build("residual")
    whole = sum(group.size for group in ranking(dense).groups)
    gone = 0
    for step in range(1, settings.steps + 1):
        cuts = ranking(model).cuts_to(0.4 * step / settings.steps)
        remove_channels(model, example, cuts)
        gone += sum(len(each.channels) for each in cuts)
    assert gone / whole == pytest.approx(0.4, abs=0.15)
    assert ranking(model).reach(model, example, bytes_goal(10**9)) == []


def test_layers_whose_weights_are_computed_are_left_dense_and_named(folder: Path) -> None:
    done = compress(folder, "kind=unstructured ratio=0.8 skip=['5.0']", "model.source=model.py:normed")
    assert done.exit_code == 0, done.stderr
    facts = facts_of(folder)
    assert set(facts["left_dense"]) == {"1.conv", "2.conv", "5.0"}
    assert "computed from others" in facts["left_dense"]["1.conv"]
    assert facts["left_dense"]["5.0"] == "5.0 is in prune.skip"
    assert facts["after"]["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert "of the weights that may go; left dense: 1.conv, 2.conv, 5.0" in done.stdout


@pytest.mark.parametrize("kind", ["blocks", "mixed"])
def test_labels_that_are_not_learned_from_may_be_those_of_other_classes(kind: str, folder: Path) -> None:
    arrays = dict(np.load(folder / "train.npz"))
    np.savez(folder / "train.npz", image=arrays["image"], label=arrays["label"] * 100)
    teacher = "compress.distill.teacher.source=model.py:build"
    done = compress(folder, f"kind={kind} macs=0.6", teacher, "compress.distill.weight=1.0")
    assert done.exit_code == 0, done.stderr
    assert facts_of(folder)["goal"]["reached"] <= 0.6
    learned = compress(folder, f"kind={kind} macs=0.6", teacher, "compress.distill.weight=0.9")
    assert learned.exit_code == 2
    assert "the training data has the labels 0..300; accepted: 0..3" in learned.stderr
