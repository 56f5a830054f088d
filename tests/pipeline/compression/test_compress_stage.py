"""The compress stage and its commands: the deployed network is the compressed one, and a killed run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.cli import cli
from edgeship.pipeline.compression.compressor import Compressor, compress
from edgeship.pipeline.compression.outcome import compress_into
from edgeship.pipeline.compression.saved import restore
from edgeship.pipeline.compression.training_data import open_training_data
from edgeship.pipeline.pt2 import load_exported
from edgeship.pipeline.recipe import Recipe, load_recipe
from projects import TRAINABLE

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, classes)

    def forward(self, image):
        x = self.stem(image)
        return self.head(torch.relu(x + self.outer(self.inner(x))).mean((2, 3)))

def build(classes=4):
    torch.manual_seed(3)
    return Net(classes)
"""
DEEP = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))

def build():
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(stem, *(Block() for _ in range(4)), head)
"""
LOADERS = """
import numpy as np
import torch
def loaders():
    arrays = np.load(PATH)
    data = torch.utils.data.TensorDataset(torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"]))
    return torch.utils.data.DataLoader(data, 16, shuffle=True), torch.utils.data.DataLoader(data, 32)
def wrong():
    return [(torch.zeros(4, 3, 9, 9), torch.zeros(4).long())]
def empty():
    return []
def three():
    return 1, 2, 3
"""
RECIPE = f"""{TRAINABLE}
[data]
training = "train.npz"
calibration = "train.npz"
evaluation = "test.npz"
[compress.training]
epochs = 2
batch_size = 16
lr = 0.05
[targets.onnxruntime]
[benchmark]
runs = 5
warmup = 1
"""
WITH_LOADERS = RECIPE.replace('training = "train.npz"', 'loaders = "loaders.py:loaders"').replace(
    "batch_size = 16\n", ""
)


@pytest.fixture
def folder(tmp_path: Path, striped: Any) -> Path:
    """A recipe with its model and data."""
    data = striped(shuffle=False, batch_size=128)
    batch = next(iter(data.epoch(0)))
    images, labels = batch.inputs.numpy(), batch.labels.numpy()
    np.savez(tmp_path / "train.npz", image=images[:96], label=labels[:96])
    np.savez(tmp_path / "test.npz", image=images[96:], label=labels[96:])
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "loaders.py").write_text(LOADERS.replace("PATH", repr(str(tmp_path / "train.npz"))))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def recipe_of(folder: Path, *sets: str) -> Recipe:
    return load_recipe(folder / "recipe.toml", sets)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="edgeship")


def sets(*values: str) -> Sequence[str]:
    return [part for value in values for part in ("--set", value)]


def tell(*_: Any) -> None:
    """Nobody listens."""


def test_the_pruned_network_is_what_is_deployed_and_nothing_is_done_twice(folder: Path) -> None:
    arguments = ("deploy", folder / "recipe.toml", "--out", folder / "run", *sets("compress.prune.macs=0.7"), "--json")
    done = run(*arguments, "--to", "accuracy")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [stage["name"] for stage in report["stages"]][:2] == ["compress", "export"]
    facts = report["compress"]
    assert facts["after"]["macs"] <= 0.7 * facts["before"]["macs"]
    assert report["model"]["macs"] == facts["after"]["macs"]
    assert report["reference"]["accuracy"]["top1"] == pytest.approx(facts["after"]["top1"], abs=1e-3)
    assert set(facts["latency"]["onnxruntime"]) >= {"before", "after", "speedup"}
    assert "nanoseconds" not in json.dumps(facts)
    made = {path.name for path in (folder / "run" / "1-compress").iterdir()}
    assert made == {
        "architecture.json", "weights.safetensors", "model.pt2", "compress.json", "metrics.jsonl", "metrics.png"
    }  # fmt: skip
    assert not list((folder / "run" / ".edgeship").glob("kept-*"))
    again = json.loads(run(*arguments, "--to", "accuracy").stdout)
    assert all(stage["cached"] for stage in again["stages"])


def test_the_saved_files_hold_the_network_without_code(folder: Path) -> None:
    done = run("compress", folder / "recipe.toml", "-o", folder / "out", *sets("compress.prune.ratio=0.3"))
    assert done.exit_code == 0, done.stderr
    assert "fewer)" in done.stdout
    assert "removed      8 channels, from inner.0" in done.stdout
    restored = restore(recipe_of(folder), folder / "out")
    program = load_exported(folder / "out" / "model.pt2").module()
    inputs = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(inputs), restored(inputs), rtol=1e-5, atol=1e-6)
    again = run("compress", folder / "recipe.toml", "-o", folder / "two", *sets("compress.prune.ratio=0.3"))
    assert again.exit_code == 0
    for name in ("model.pt2", "weights.safetensors", "architecture.json", "metrics.jsonl", "metrics.png"):
        assert (folder / "out" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    ship = ["model.source=out/model.pt2", "input.name=image"]
    recipe = (folder / "recipe.toml").read_text().replace('training = "train.npz"\n', "").split("[compress")[0]
    (folder / "second.toml").write_text(recipe + "[targets.onnxruntime]\n")
    deployed = run("deploy", folder / "second.toml", "--out", folder / "ship", "--to", "quantize", *sets(*ship))
    assert deployed.exit_code == 0, deployed.stderr


def test_a_network_whose_features_are_matched_can_be_pruned_as_well(folder: Path) -> None:
    teach = ["teacher.source=model.py:build", "features=attention", 'layers=[["stem","stem"],["outer","outer"]]']
    recipe = recipe_of(folder, "compress.prune.macs=0.7", *(f"compress.distill.{each}" for each in teach))
    assert recipe.compress is not None
    result = compress(recipe, recipe.compress, folder / "kept", tell)
    assert result.cuts
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("steps", [1, 2])
def test_what_is_left_of_a_network_learns_from_each_block_of_the_whole(steps: int, folder: Path) -> None:
    (folder / "deep.py").write_text(DEEP)
    prune = ("kind=blocks", "ratio=0.5", f"steps={steps}")
    teach = ("teacher.source=deep.py:build", "features=hint", "feature_weight=1")
    sets = ("model.source=deep.py:build", *(f"compress.prune.{each}" for each in prune))
    recipe = recipe_of(folder, *sets, *(f"compress.distill.{each}" for each in teach))
    assert recipe.compress is not None
    result = compress(recipe, recipe.compress, folder / "kept", tell)
    assert len(result.blocks) == 2
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    other = recipe_of(
        folder, *sets, *(f"compress.distill.{each}" for each in teach), "compress.distill.teacher.source=model.py:build"
    )
    assert other.compress is not None
    with pytest.raises(InputError, match="the teacher has none that give feature maps"):
        compress(other, other.compress, folder / "other", tell)
    assert not (folder / "other").exists()  # told before anything is decoded, ranked or trained


def test_a_refusal_leaves_no_folder_behind(folder: Path) -> None:
    hints = ("compress.distill.teacher.source=model.py:build", "compress.distill.features=hint")
    layers = ('compress.distill.layers=[["stem","nowhere"]]',)
    arguments = ("compress", folder / "recipe.toml", "-o", folder / "out", *sets("compress.prune.macs=0.7", *hints))
    done = run(*arguments, *sets(*layers))
    assert done.exit_code == 2
    assert "the teacher has no module 'nowhere'" in done.stderr
    assert not (folder / "out").exists()
    (folder / "out").mkdir()
    assert run(*arguments, *sets(*layers)).exit_code == 2
    assert (folder / "out").is_dir()  # it was there before


def test_a_network_without_some_of_its_blocks_is_deployed(folder: Path) -> None:
    (folder / "deep.py").write_text(DEEP)
    changes = ("model.source=deep.py:build", "compress.prune.kind=blocks", "compress.prune.ratio=0.5")
    arguments = ("deploy", folder / "recipe.toml", "--out", folder / "run", *sets(*changes), "--json")
    done = run(*arguments, "--to", "accuracy")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    facts = report["compress"]
    assert len(facts["blocks"]) == 2
    none = run(
        "compress", folder / "recipe.toml", "-o", folder / "none", *sets(*changes[:2], "compress.prune.ratio=0.1")
    )
    assert none.exit_code == 2
    assert "removes none of the network's 4 residual blocks; accepted: at least 0.128" in none.stderr
    assert facts["before"]["macs"] - facts["after"]["macs"] == 2 * 64 * 16 * 16 * 9
    assert report["model"]["macs"] == facts["after"]["macs"]
    assert set(facts["latency"]["onnxruntime"]) >= {"before", "after", "speedup"}
    recipe, made = recipe_of(folder, *changes), folder / "run" / "1-compress"
    inputs = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = load_exported(made / "model.pt2").module()(inputs)
        torch.testing.assert_close(restore(recipe, made)(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("ratio=0.8", r"at most 0\.400 of the channels can go"),
        ("macs=0.05", "macs = .* cannot be met: with every layer"),
    ],
)
def test_a_goal_that_the_last_step_could_not_meet_is_told_before_the_first_one_trains(
    goal: str, message: str, folder: Path
) -> None:
    changes = ("compress.prune.steps=3", "compress.prune.layer_limit=0.5", f"compress.prune.{goal}")
    result = run("compress", folder / "recipe.toml", "-o", folder / "out", *sets(*changes))
    assert result.exit_code in (1, 2)
    assert re.search(message, result.stderr)
    assert not list((folder / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("gradually", ["compress.prune.steps=2", "compress.prune.fade_epochs=1"])
@pytest.mark.parametrize("kind", ["structured", "blocks", "mixed"])
def test_a_run_killed_between_and_inside_steps_ends_as_one_never_killed(
    kind: str, gradually: str, folder: Path
) -> None:
    (folder / "deep.py").write_text(DEEP)
    goal = ["compress.prune.ratio=0.5"] if kind == "blocks" else ["compress.prune.macs=0.6"]
    source = f"model.source={'model' if kind == 'structured' else 'deep'}.py:build"
    recipe = recipe_of(folder, source, f"compress.prune.kind={kind}", *goal, gradually)
    assert recipe.compress is not None
    whole = compress(recipe, recipe.compress, folder / "whole", tell)
    said: list[int] = []

    def killed_at(place: int) -> Any:
        def count(*_: Any) -> None:
            said.append(1)
            if len(said) == place:
                raise ConnectionAbortedError

        return count

    decoded = 96 + 32  # told one by one, by the first run alone
    # inside the first step of pruning or the fade; at the second's beginning or after the fade; in the last epoch
    for place in (decoded + 3, 8, 9 if "steps" in gradually else 3):
        said.clear()
        with pytest.raises(ConnectionAbortedError):
            compress(recipe, recipe.compress, folder / "cut", killed_at(place))
    resumed = compress(recipe, recipe.compress, folder / "cut", tell)
    assert (resumed.cuts, resumed.blocks, resumed.left_dense) == (whole.cuts, whole.blocks, whole.left_dense)
    assert whole.left_dense or kind == "blocks"
    assert whole.cuts or whole.blocks
    assert resumed.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("place", [96 + 32 + 3, 96 + 32 + 8])  # while weights go, and after the last have gone
def test_weights_that_go_little_by_little_go_on_where_a_run_was_killed(place: int, folder: Path) -> None:
    changes = ("compress.prune.kind=unstructured", "compress.prune.ratio=0.8", "compress.prune.fade_epochs=1")
    recipe = recipe_of(folder, *changes)
    assert recipe.compress is not None
    whole = compress(recipe, recipe.compress, folder / "whole", tell)
    said: list[int] = []

    def killed(*_: Any) -> None:
        said.append(1)
        if len(said) == place:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(recipe, recipe.compress, folder / "cut", killed)
    resumed = compress(recipe, recipe.compress, folder / "cut", tell)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_killed_run_is_not_taken_for_one_that_was_asked_for_something_else(folder: Path) -> None:
    def killed(*_: Any) -> None:
        said.append(1)
        if len(said) == 96 + 32 + 3:  # the samples are decoded, the channels are cut
            raise ConnectionAbortedError

    said: list[int] = []
    first, second = (recipe_of(folder, f"compress.prune.ratio={ratio}") for ratio in (0.3, 0.5))
    assert first.compress is not None
    assert second.compress is not None
    with pytest.raises(ConnectionAbortedError):
        compress_into(first, first.compress, folder / "out", killed)
    assert list((folder / "out" / "unfinished").rglob("removed.json"))
    found = compress_into(second, second.compress, folder / "out", tell)["cuts"]
    assert found == compress_into(second, second.compress, folder / "fresh", tell)["cuts"]
    assert not (folder / "out" / "unfinished").exists()


def test_what_a_shuffled_loader_shows_first_is_the_same_each_time(folder: Path) -> None:
    (folder / "recipe.toml").write_text(WITH_LOADERS)
    recipe = recipe_of(folder, "compress.prune.ratio=0.4", "compress.prune.batches=1", "compress.training.epochs=1")
    assert recipe.compress is not None
    own = "    with torch.random.fork_rng():\n        torch.manual_seed(3)\n        return Net(classes)\n"
    (folder / "model.py").write_text(MODEL[: MODEL.index("    torch.manual_seed(3)")] + own)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = compress(recipe, recipe.compress, folder / str(seed), tell)
        assert torch.equal(before, torch.get_rng_state())
        states.append((result.cuts, result.history, result.held_out))
    assert states[0] == states[1]


@pytest.mark.parametrize("gradually", ["steps=2", "fade_epochs=1"])
def test_unstructured_zeros_reach_the_exported_model(gradually: str, folder: Path) -> None:
    wanted = ("compress.prune.kind=unstructured", "compress.prune.ratio=0.8", f"compress.prune.{gradually}")
    done = run("deploy", folder / "recipe.toml", "--out", folder / "run", "--to", "simplify", *sets(*wanted), "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)["compress"]
    assert facts["after"]["sparsity"] == pytest.approx(0.8, abs=0.03)
    assert facts["after"]["compressed_bytes"] < 0.5 * facts["before"]["compressed_bytes"]
    assert facts["after"]["bytes"] == facts["before"]["bytes"]
    assert "neither runtime runs it faster" in facts["notes"][0]
    from edgeship.calibration.graph.onnx_file import load_onnx

    weights = [
        node.inputs[1].const_value.numpy()  # type: ignore[union-attr]  # an initializer
        for node in load_onnx(folder / "run" / "3-simplify" / "model.onnx").graph
        if node.op_type == "Conv"
    ]
    assert np.mean(np.concatenate([each.ravel() for each in weights]) == 0) == pytest.approx(0.8, abs=0.05)


def test_soft_pruning_ends_with_fewer_channels(folder: Path) -> None:
    recipe = recipe_of(folder, "compress.prune.kind=soft", "compress.prune.ratio=0.3", "compress.prune.scope=layer")
    assert recipe.compress is not None
    result = compress(recipe, recipe.compress, folder / "kept", tell)
    assert {each.layer: len(each.channels) for each in result.cuts} == {"inner.0": 8} | {
        each.layer: len(each.channels) for each in result.cuts if each.layer != "inner.0"
    }
    widths = [layer.out_channels for layer in result.model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert widths[1] == 16


def test_channels_are_removed_until_a_latency_is_met(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is replaced by the parameters: a test must not depend on this machine's speed."""

    def microseconds(_self: Compressor, model: torch.nn.Module, prune: Any, schedule: Any) -> float:
        return sum(each.numel() for each in model.parameters()) / 1000

    monkeypatch.setattr(Compressor, "_latency_ms", microseconds)
    recipe = recipe_of(folder, "compress.prune.max_latency_ms=6.0")
    assert recipe.compress is not None
    result = compress(recipe, recipe.compress, folder / "kept", tell)
    assert sum(each.numel() for each in result.model.parameters()) <= 6000
    impossible = recipe_of(folder, "compress.prune.max_latency_ms=0.1")
    assert impossible.compress is not None
    with pytest.raises(StageError, match=r"max_latency_ms = 0\.1 cannot be met"):
        compress(impossible, impossible.compress, folder / "other", tell)


def test_a_teacher_guides_pruned_students_and_needs_the_same_classes(folder: Path) -> None:
    teacher = "compress.distill.teacher.source=model.py:build"
    recipe = recipe_of(folder, "compress.prune.macs=0.7", teacher)
    assert recipe.compress is not None
    assert len(compress(recipe, recipe.compress, folder / "kept", tell).history) == 2
    other = recipe_of(folder, teacher, "compress.distill.teacher.args.classes=7")
    assert other.compress is not None
    with pytest.raises(InputError, match=r"teacher model\.py:build has 7 classes, the model has 4"):
        compress(other, other.compress, folder / "other", tell)


def test_the_integers_of_the_pruned_network_learn_from_the_same_teacher(folder: Path) -> None:
    wanted = sets(
        "compress.prune.macs=0.7",
        "compress.distill.teacher.source=model.py:build",
        'quantize.qat={objective="teacher", data="training", epochs=2, batch_size=16}',
    )
    arguments = ("deploy", folder / "recipe.toml", "--out", folder / "run", *wanted, "--json", "--to", "accuracy")
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["compress"]["after"]["macs"] == report["model"]["macs"]
    (trained,) = report["quantization"]["qat"].values()
    assert trained["judged_by"] == "loss"
    assert trained["held_out"]["samples"] == 19
    assert trained["agreement"]["layer_max_steps"] <= 1
    assert [stage["name"] for stage in report["stages"] if stage["cached"]] == []
    assert all(stage["cached"] for stage in json.loads(run(*arguments).stdout)["stages"])
    (folder / "model.py").write_text(MODEL.replace("manual_seed(3)", "manual_seed(4)"))
    again = json.loads(run(*arguments).stdout)["stages"]
    assert not next(stage["cached"] for stage in again if stage["name"] == "quantize")


def test_train_fine_tunes_without_pruning(folder: Path) -> None:
    done = run("train", folder / "recipe.toml", "-o", folder / "out", *sets("compress.prune.ratio=0.3"), "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["before"]["macs"] == facts["after"]["macs"]
    assert facts["after"]["top1"] > facts["before"]["top1"]
    assert not (folder / "out" / "unfinished").exists()


def test_a_loader_of_the_user_trains_as_well(folder: Path) -> None:
    (folder / "recipe.toml").write_text(WITH_LOADERS)
    done = run("train", folder / "recipe.toml", "-o", folder / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["after"]["top1"] > 50
    wrong = {"wrong": r"inputs of the shape \[4, 3, 9, 9\]", "empty": "yields nothing", "three": "3 loaders"}
    for function, message in wrong.items():
        recipe = recipe_of(folder, f"data.loaders=loaders.py:{function}")
        assert recipe.compress is not None
        with pytest.raises(InputError, match=message):
            compress(recipe, recipe.compress, folder / function, tell)


@pytest.mark.parametrize("left", [0, 40, 1000])
def test_pixels_whose_file_was_cut_short_are_decoded_anew(left: int, folder: Path) -> None:
    recipe = recipe_of(folder)
    assert recipe.compress is not None

    def opened() -> np.ndarray[Any, Any]:
        found = open_training_data(recipe, recipe.compress.training, folder / "kept", tell)
        return np.array(found.training.values)  # a copy: what is mapped from a file must not be cut

    whole = opened()
    (kept,) = (folder / "kept").glob("training-*.npy")
    kept.write_bytes(kept.read_bytes()[:left])
    assert np.array_equal(opened(), whole)
    assert [path.name for path in (folder / "kept").glob("*training*")] == [kept.name]


def test_images_are_trained_on_as_they_will_be_preprocessed(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(6):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(path)
    (tmp_path / "model.py").write_text(MODEL)
    image = '[input]\nname = "image"\nshape = [1, 3, 8, 8]\nresize = 9\ncrop = 8\n'
    image += "mean = [120.0, 110.0, 100.0]\nstd = [60.0, 61.0, 62.0]\n"
    data = '[data]\ntraining = "train"\ncalibration = "train"\nevaluation = "test"\ntraining_samples = 4\n'
    (tmp_path / "recipe.toml").write_text(
        f'name = "t"\n[model]\nsource = "model.py:build"\n{image}{data}[compress]\n[targets.onnxruntime]\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.compress is not None
    found = open_training_data(recipe, recipe.compress.training, tmp_path / "kept", tell)
    batch = next(iter(found.training.epoch(0)))
    assert batch.indices is not None
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    samples = list(recipe.calibration_samples({"image": (1, 3, 8, 8)}))
    by_pixels = [next(iter(sample.feeds.values()))[0] for sample in samples]
    for values in batch.inputs.numpy():
        assert any(np.array_equal(values, each) for each in by_pixels)
    assert found.held_out is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["compress.prune.ratio=0.5", "compress.prune.macs=0.5"], "exactly one of ratio, macs"),
        (["compress.prune.kind=soft", "compress.prune.macs=0.5"], 'ratio with kind = "soft"'),
        (["compress.prune.ratio=1.5"], "less than 1"),
        (["compress.prune.kind=soft", "compress.prune.ratio=0.3", "compress.prune.importance=apoz"], "ranks anew"),
        (["compress.prune.kind=soft", "compress.prune.ratio=0.3", "compress.training.ema=0.9"], "ema = 0"),
        (
            ["compress.prune.kind=blocks", "compress.prune.ratio=0.3", "compress.prune.importance=taylor"],
            "loss without",
        ),
        (["compress.prune.max_latency_ms=1.0", "compress.prune.latency_target=tflight"], "did you mean 'tflite'"),
        (["model.source=model.onnx"], "model.onnx cannot be trained"),
        (["data.loaders=loaders.py:loaders"], "both are set"),
        (["compress.training.warmup_epochs=9.0"], "warmup_epochs below epochs"),
        (["compress.training.mix_share=0.5"], "mixup or cutmix with mix_share"),
        (["compress.training.epoch=9"], "did you mean 'epochs'"),
        (
            ["input.shape=[1, 7]", "compress.training.cutmix=0.5"],
            "compress.training.cutmix: seen 0.5; it is for images [1, C, H, W], and input.shape is [1, 7]; "
            "accepted: 0.0",
        ),
        (
            ["input.shape=[1, 7]", "compress.distill.teacher.source=a.py:b", "compress.distill.mirror=true"],
            "compress.distill.mirror: seen true; it is for images [1, C, H, W], and input.shape is [1, 7]; accepted: "
            "false",
        ),
        (["input.shape=[1, 7]", "quantize.qat.shift=2"], "quantize.qat.shift: seen 2; it is for images"),
        (['compress.distill.layers=[["a","b"]]', "compress.distill.teacher.source=a.py:b"], "no layers, or features"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(changes: list[str], message: str, folder: Path) -> None:
    with pytest.raises(InputError) as error:
        recipe_of(folder, *changes)
    assert message in str(error.value)


def test_a_recipe_without_the_table_has_no_such_stage(folder: Path) -> None:
    (folder / "recipe.toml").write_text(RECIPE.split("[compress", maxsplit=1)[0] + "[targets.onnxruntime]\n")
    done = run("deploy", folder / "recipe.toml", "--out", folder / "run", "--to", "simplify", "--json")
    assert [stage["name"] for stage in json.loads(done.stdout)["stages"]] == ["export", "simplify"]
    assert not (folder / "run" / "1-compress").exists()
    assert "has no [compress] table" in run("deploy", folder / "recipe.toml", "--to", "compress").stderr
    assert "has no [compress] table" in run("compress", folder / "recipe.toml", "-o", folder / "out").stderr
