"""A class has one number in all sets of a recipe, also where a set lacks some of the folders."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.image_list import class_folders
from edgeship.pipeline.class_order import check_class_order
from edgeship.pipeline.cli import cli
from edgeship.pipeline.recipe import Recipe, load_recipe

RECIPE = """
name = "t"
model.source = "model.py:build"
input = { name = "image", shape = [1, 3, 8, 8], mean = [128.0], std = [128.0] }
[targets.onnxruntime]
[data]
"""
TRAINED = "compress.training.epochs=1"
QAT = 'quantize.qat={objective="labels"}'
COLORS = {"ant": (250, 0, 0), "bee": (0, 250, 0), "cat": (0, 0, 250)}


def make(folder: Path, sets: dict[str, str], *changes: str) -> Recipe:
    """A recipe whose sets (training, evaluation, calibration) have the given class folders, two images in each."""
    lines = []
    for name, folders in sets.items():
        for label in folders.split():
            for number in range(2):
                path = folder / name / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                red, green, blue = COLORS.get(label, (99, 99, 99))
                Image.new("RGB", (8, 8), (red, green, blue + 5 * number)).save(path)
        lines.append(f'{name} = "{name}"\n')
    (folder / "recipe.toml").write_text(RECIPE + "".join(lines))
    return load_recipe(folder / "recipe.toml", changes)


def labels(recipe: Recipe, field: str) -> list[int]:
    """The number of each class folder, in the order of the names."""
    samples = recipe.calibration_samples() if field == "calibration" else recipe.evaluation_samples()
    assert samples is not None
    assert samples.labels is not None
    return sorted(set(samples.labels))


@pytest.mark.parametrize(
    ("sets", "changes", "field", "numbers"),
    [
        ({"training": "ant bee cat", "evaluation": "ant cat"}, [TRAINED], "evaluation", [0, 2]),
        ({"training": "ant bee cat", "calibration": "bee cat"}, [TRAINED], "calibration", [1, 2]),
        ({"training": "ant bee cat", "calibration": "cat"}, ['quantize.qat={data="training"}'], "calibration", [2]),
        ({"training": "ant bee cat", "calibration": "bee cat"}, [TRAINED, QAT], "calibration", [1, 2]),
        ({"evaluation": "ant bee cat", "calibration": "ant cat"}, [], "calibration", [0, 2]),
        ({"evaluation": "ant cat", "calibration": "ant bee cat"}, [], "evaluation", [0, 2]),
        ({"evaluation": "ant cat", "calibration": "ant bee cat"}, [QAT], "calibration", [0, 1, 2]),
        ({"evaluation": "ant cat"}, [], "evaluation", [0, 1]),  # as ImageNet's validation images: nothing else is known
        ({"training": "bee", "evaluation": "ant cat"}, [], "evaluation", [0, 1]),  # nothing is trained
        ({"evaluation": "ant cat", "calibration": "monday tuesday"}, [], "calibration", [0, 1]),  # no classes
        ({"training": "ant bee", "calibration": "monday tuesday"}, [TRAINED], "calibration", [0, 1]),
        ({"evaluation": "ant bee", "calibration": "bee cat"}, [], "evaluation", [0, 1]),  # a detector's scenes, perhaps
    ],
)
def test_a_set_that_lacks_folders_is_numbered_by_the_one_that_has_them(
    sets: dict[str, str], changes: list[str], field: str, numbers: list[int], tmp_path: Path
) -> None:
    assert labels(make(tmp_path, sets, *changes), field) == numbers


@pytest.mark.parametrize(
    ("sets", "changes", "field", "message"),
    [
        (
            {"training": "ant cat", "evaluation": "ant bee"},
            [TRAINED],
            "evaluation",
            "recipe.toml: data.evaluation and data.training have other class folders: bee in data.evaluation alone, "
            "cat in data.training alone; .*; accepted: folders of data.evaluation that data.training has too, data.cl",
        ),
        ({"training": "ant bee", "evaluation": "x y"}, [TRAINED], "evaluation", "ant, bee in data.training alone"),
        ({"training": "ant cat", "calibration": "ant bee"}, [TRAINED], "calibration", "bee in data.calibration alone"),
        ({"training": "ant cat", "calibration": "x y"}, [TRAINED, QAT], "calibration", "x, y in data.calibration al"),
        (
            {"evaluation": "ant bee", "calibration": "bee cat"},
            [QAT],
            "calibration",
            "accepted: the folders of one of them among those of the other",
        ),
        ({"evaluation": "ant bee", "calibration": "bee cat"}, [QAT], "evaluation", "ant in data.evaluation alone"),
    ],
)
def test_sets_of_which_neither_has_all_folders_are_refused(
    sets: dict[str, str], changes: list[str], field: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        labels(make(tmp_path, sets, *changes), field)


def test_a_teacher_alone_needs_no_classes(tmp_path: Path) -> None:
    alone = ["compress.distill.teacher.source=model.py:build", "compress.distill.weight=1.0"]
    recipe = make(tmp_path, {"training": "monday tuesday", "evaluation": "ant cat"}, TRAINED, *alone)
    assert labels(recipe, "evaluation") == [0, 1]


def test_lists_and_files_of_names_say_their_numbers_themselves(tmp_path: Path) -> None:
    make(tmp_path, {"training": "ant bee cat", "evaluation": "ant cat"})
    (tmp_path / "classes.txt").write_text("cat\nbee\nant\nyak\n")
    recipe = load_recipe(tmp_path / "recipe.toml", [TRAINED, "data.classes=classes.txt"])
    assert labels(recipe, "evaluation") == [0, 2]
    (tmp_path / "list.csv").write_text("file,label\nant/0.png,7\ncat/0.png,3\n")
    listed = ["data.evaluation=list.csv", "data.root=evaluation"]
    assert labels(load_recipe(tmp_path / "recipe.toml", [TRAINED, *listed]), "evaluation") == [3, 7]
    (tmp_path / "labels.csv").write_text(
        "file,label\n" + "".join(f"{c}/{n}.png,{n}\n" for c in ("ant", "cat") for n in (0, 1))
    )
    recipe = load_recipe(tmp_path / "recipe.toml", [TRAINED, "data.labels=labels.csv"])
    assert labels(recipe, "evaluation") == [0, 1]


def test_folders_in_an_archive_are_numbered_alike(tmp_path: Path) -> None:
    make(tmp_path, {"training": "ant bee cat", "evaluation": "ant cat"})
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (tmp_path / "training").rglob("*.png"):
            archive.write(path, f"inner/{path.relative_to(tmp_path / 'training').as_posix()}")
    recipe = load_recipe(tmp_path / "recipe.toml", [TRAINED, "data.training=all.zip/inner"])
    assert labels(recipe, "evaluation") == [0, 2]


def test_only_folders_of_images_are_class_folders(tmp_path: Path) -> None:
    make(tmp_path, {"training": "bee ant"})
    (tmp_path / "training" / "empty").mkdir()
    (tmp_path / "training" / "notes").mkdir()
    (tmp_path / "training" / "notes" / "read.me").write_text("")
    assert class_folders(tmp_path / "training") == ("ant", "bee")
    assert class_folders(tmp_path / "training" / "ant") == ()
    assert class_folders(tmp_path) == ()
    (tmp_path / "list.csv").write_text("file,label\nant/0.png,7\n")
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 3)))
    assert class_folders(tmp_path / "list.csv") == class_folders(tmp_path / "a.npz") == ()
    assert class_folders(tmp_path / "nowhere") == ()


def test_a_classifier_is_not_calibrated_on_other_classes_than_it_is_judged_by(tmp_path: Path) -> None:
    sets = {"evaluation": "ant bee", "calibration": "bee cat"}
    with pytest.raises(InputError, match=r"cat in data\.calibration alone, ant in data\.evaluation alone"):
        check_class_order(make(tmp_path, sets))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    check_class_order(load_recipe(tmp_path / "recipe.toml", ["data.classes=classes.txt"]))


MODEL = """
import torch
from torch import nn
def build():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    net[2].weight.data = 3 * torch.eye(3)
    net[2].bias.data = torch.zeros(3)
    return net
"""


@pytest.mark.parametrize("changes", [(), ("--set", TRAINED)])
def test_training_is_judged_by_the_right_classes(changes: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs the extra: pip install edgeship[train]")
    make(tmp_path, {"training": "ant bee cat", "evaluation": "ant cat", "calibration": "bee"})
    (tmp_path / "model.py").write_text(MODEL)
    arguments = ["train", str(tmp_path / "recipe.toml"), "-o", str(tmp_path / "out"), *changes, "--json"]
    done = CliRunner().invoke(cli, arguments, prog_name="edgeship")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["before"]["top1"] == 100
    (tmp_path / "evaluation" / "cat").rename(tmp_path / "evaluation" / "cow")
    done = CliRunner().invoke(cli, [*arguments[:3], str(tmp_path / "two"), *arguments[4:]], prog_name="edgeship")
    assert done.exit_code == 2
    assert "cow in data.evaluation alone" in done.stderr
    assert not (tmp_path / "two").exists()


def deploy(folder: Path, *changes: str) -> Result:
    (folder / "model.py").write_text(MODEL)
    arguments = ["deploy", str(folder / "recipe.toml"), "--out", str(folder / "out"), "--to", "quantize"]
    return CliRunner().invoke(cli, [*arguments, *changes], prog_name="edgeship")


@pytest.mark.parametrize(("calibration", "refused"), [("ant bee", True), ("ant", False), ("monday", False)])
def test_a_classifier_with_other_classes_is_not_quantized(calibration: str, refused: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the model comes as PyTorch code: pip install edgeship[torch]")
    make(tmp_path, {"evaluation": "ant cat", "calibration": calibration})
    done = deploy(tmp_path)
    assert ("have other class folders" in done.stderr) == refused
    assert done.exit_code == (2 if refused else 0), done.stderr


def test_a_deployment_that_trains_is_refused_before_it_does(tmp_path: Path) -> None:
    make(tmp_path, {"training": "ant bee", "calibration": "ant cow"})
    done = deploy(tmp_path, "--set", TRAINED)
    assert done.exit_code == 2
    assert "cow in data.calibration alone, bee in data.training alone" in done.stderr
    assert not (tmp_path / "out" / "1-compress").exists()
    assert "compress" not in done.stderr.split("recipe.toml:")[0]
