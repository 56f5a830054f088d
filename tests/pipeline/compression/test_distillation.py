"""Distillation: the loss is what its formula says, teachers of every kind answer alike, and mismatches are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Distill, Teacher
from edgeship.pipeline.compression.batches import Batch
from edgeship.pipeline.compression.distillation import Distillation, Tapped, attention, soft_targets, tap
from edgeship.pipeline.compression.loop import Run, train
from edgeship.pipeline.compression.teacher import TorchTeacher, open_teacher
from edgeship.pipeline.recipe import load_recipe
from edgeship.pipeline.training_section import Training

Make = Callable[..., Any]
SOURCE = Teacher(source="teacher.py:build")
EXAMPLE = torch.zeros(1, 3, 8, 8)
FACTORY = """
import torch
from torch import nn
def build(classes=4, width=12):
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, classes))
"""


class Counting:
    """A teacher that knows how many samples it was asked about."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.asked = module.eval(), 0

    def scores(self, inputs: Tensor) -> Tensor:
        self.asked += len(inputs)
        with torch.no_grad():
            return self.module(inputs)  # type: ignore[no-any-return]  # a network's output is a tensor


def batch_of(data: Any) -> Batch:
    return next(iter(data.epoch(0)))  # type: ignore[no-any-return]  # batches are


def test_soft_targets_are_hintons() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 4))

    def softmax(values: Any, temperature: float) -> Any:
        powers = np.exp(values / temperature)
        return powers / powers.sum(1, keepdims=True)

    for temperature in (1.0, 4.0):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
        found = soft_targets(torch.tensor(student), torch.tensor(teacher), temperature)
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_attention_ignores_widths_and_scale() -> None:
    feature = torch.randn(2, 6, 5, 5)
    wide = torch.cat([feature, feature], 1)
    assert float(attention(feature, 3 * wide)) == pytest.approx(0, abs=1e-9)
    assert float(attention(feature, feature.flip(3))) > 0.01


def test_a_student_without_labels_comes_to_agree_with_its_teacher(
    make_net: Make, striped: Make, tmp_path: Path
) -> None:
    teacher = TorchTeacher(make_net(width=16).eval())
    student, data = make_net(), striped()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.3)
    loss = Distillation(Distill(teacher=SOURCE, weight=1.0, temperature=2.0), teacher)
    batch = batch_of(data)
    before = float(loss(student.eval(), batch)[0].detach())
    train(Run(student, loss, data, Training(epochs=4, batch_size=16, lr=0.05), tmp_path))
    assert float(loss(student, batch)[0].detach()) < 0.6 * before


def test_the_convolutions_between_features_depend_on_the_seed_alone(make_net: Make) -> None:
    settings = Distill(teacher=SOURCE, features="hint", layers=(("0", "0"), ("4", "4")))
    wide = TorchTeacher(make_net(width=16))
    first, same, other = (tap(make_net(), wide, settings, EXAMPLE, seed) for seed in (1, 1, 2))
    assert isinstance(first, Tapped)
    assert isinstance(same, Tapped)
    assert isinstance(other, Tapped)
    assert torch.equal(first.adapters[0].weight, same.adapters[0].weight)
    assert not torch.equal(first.adapters[0].weight, other.adapters[0].weight)


def test_hints_of_a_student_that_is_its_teacher_begin_at_nothing(make_net: Make, striped: Make) -> None:
    settings = Distill(teacher=SOURCE, features="hint", layers=(("0", "0"), ("4", "4")), weight=1.0, temperature=1.0)
    teacher, student = make_net().eval(), make_net().eval()
    tapped = tap(student, TorchTeacher(teacher), settings, EXAMPLE)
    loss = Distillation(settings, TorchTeacher(teacher))
    with torch.no_grad():
        assert float(loss(tapped.eval(), batch_of(striped()))[0]) == pytest.approx(0, abs=1e-9)
        student[4].weight[0] += 0.5
        assert float(loss(tapped.eval(), batch_of(striped()))[0]) > 1


@pytest.mark.parametrize("features", ["attention", "hint"])
def test_features_are_matched_and_their_weights_trained(
    features: Any, make_net: Make, striped: Make, tmp_path: Path
) -> None:
    teacher, student, data = TorchTeacher(make_net(width=16).eval()), make_net(), striped()
    layers = (("0", "0"), ("4", "4"))
    settings = Distill(teacher=SOURCE, features=features, feature_weight=1.0, layers=layers, weight=1.0)
    tapped = tap(student, teacher, settings, EXAMPLE)
    assert isinstance(tapped, Tapped)
    assert len(tapped.adapters) == (2 if features == "hint" else 0)
    with_features = Distillation(settings, teacher)
    without = Distillation(settings.model_copy(update={"feature_weight": 0.0}), teacher)
    batch, first = batch_of(data), student[0].weight.detach().clone()

    def distance() -> float:
        with torch.no_grad():
            return float(with_features(tapped.eval(), batch)[0] - without(tapped.eval(), batch)[0])

    before = distance()
    train(Run(tapped, with_features, data, Training(epochs=8, batch_size=16, lr=0.02), tmp_path))
    assert distance() < 0.7 * before
    assert not torch.equal(first, student[0].weight)


def test_kept_outputs_are_those_of_the_teacher_and_it_is_asked_once(make_net: Make, striped: Make) -> None:
    data, student = striped(), make_net().eval()
    asked, kept = Counting(make_net(width=16)), Counting(make_net(width=16))
    settings = Distill(teacher=SOURCE)
    fresh, cached = Distillation(settings, asked), Distillation(settings, kept)
    cached.keep_outputs(data, lambda *_: None)
    for epoch in range(2):
        for batch in data.epoch(epoch):
            torch.testing.assert_close(cached(student, batch)[0], fresh(student, batch)[0], rtol=1e-5, atol=1e-6)
    assert (kept.asked, asked.asked) == (128, 256)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_teacher_is_asked_once_about_batches_that_come_again(mirror: bool, make_net: Make, striped: Make) -> None:
    teacher, student = Counting(make_net()), make_net(6).eval()
    plain = Distillation(Distill(teacher=SOURCE, mirror=mirror), teacher)
    remembering = plain.remembering()
    batches = list(striped(64).epoch(0))
    with torch.no_grad():
        expected = [float(plain(student, each)[0]) for each in batches]
        teacher.asked = 0
        for _ in range(3):
            assert [float(remembering(student, each)[0]) for each in batches] == expected
    assert teacher.asked == 128 * (1 + mirror)


@pytest.mark.parametrize("features", ["none", "hint"])
def test_a_teacher_with_a_mirror_teaches_the_mean_of_both_its_answers(
    features: Any, make_net: Make, striped: Make
) -> None:
    teacher, batch = TorchTeacher(make_net(width=16).eval()), batch_of(striped())
    layers = (("0", "0"),) if features == "hint" else ()
    settings = Distill(teacher=SOURCE, mirror=True, features=features, layers=layers, feature_weight=0.0, weight=1.0)
    student = tap(make_net(), teacher, settings, EXAMPLE).eval()
    both = [teacher.scores(images) for images in (batch.inputs, batch.inputs.flip(3))]
    assert not torch.allclose(*both)
    loss, scores = Distillation(settings, teacher)(student, batch)
    torch.testing.assert_close(loss, soft_targets(scores, (both[0] + both[1]) / 2, settings.temperature))


def test_answers_that_are_kept_are_those_with_the_mirror_too(make_net: Make, striped: Make) -> None:
    data, student, asked = striped(), make_net().eval(), Counting(make_net(width=16))
    settings = Distill(teacher=SOURCE, mirror=True)
    fresh, kept = Distillation(settings, asked), Distillation(settings, asked)
    kept.keep_outputs(data, lambda *_: None)
    assert asked.asked == 256
    batch = batch_of(data)
    torch.testing.assert_close(kept(student, batch)[0], fresh(student, batch)[0], rtol=1e-5, atol=1e-6)


def test_any_model_that_a_recipe_can_name_is_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "teacher.py").write_text(FACTORY)
    (tmp_path / "recipe.toml").write_text(
        'name = "t"\n[model]\nsource = "teacher.py:build"\n[input]\nshape = [1, 3, 8, 8]\n[targets.onnxruntime]\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml")
    torch_teacher = open_teacher(recipe, SOURCE, (1, 3, 8, 8))
    assert isinstance(torch_teacher, TorchTeacher)
    example = torch.zeros(2, 3, 8, 8)
    dynamic = torch.export.export(torch_teacher.module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(dynamic, tmp_path / "dynamic.pt2")
    for batch in (1, 4):
        inputs = torch.zeros(batch, 3, 8, 8)
        torch.export.save(torch.export.export(torch_teacher.module, (inputs,)), tmp_path / f"of-{batch}.pt2")
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.torch_export import export_torch, open_torch

    for name, size in (("dynamic", "dynamic"), ("of-1", 1)):
        session = open_torch(torch_teacher.module, (size, 3, 8, 8))
        (tmp_path / f"{name}.onnx").write_bytes(to_bytes(export_torch(session).model))
    fours = onnx.load(tmp_path / "dynamic.onnx")
    fours.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fours, tmp_path / "of-4.onnx")
    inputs = torch.randn(6, 3, 8, 8)
    expected = torch_teacher.scores(inputs)
    for name in ("dynamic.pt2", "of-1.pt2", "of-4.pt2", "dynamic.onnx", "of-1.onnx", "of-4.onnx"):
        found = open_teacher(recipe, Teacher(source=name), (1, 3, 8, 8)).scores(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_teacher_that_does_not_fit_is_refused(make_net: Make, striped: Make, tmp_path: Path) -> None:
    (tmp_path / "teacher.py").write_text(FACTORY)
    (tmp_path / "recipe.toml").write_text(
        'name = "t"\n[model]\nsource = "teacher.py:build"\n[input]\nshape = [1, 3, 8, 8]\n[targets.onnxruntime]\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(InputError, match=r"teacher\.py:build does not take an input of shape \[1, 3, 9, 9\]"):
        open_teacher(recipe, SOURCE, (1, 3, 9, 9))
    with pytest.raises(InputError, match="names no factory"):
        open_teacher(recipe, Teacher(source="teacher.py"), (1, 3, 8, 8))
    with pytest.raises(InputError, match="holds its own weights"):
        open_teacher(recipe, Teacher(source="teacher.onnx", weights="w.pt"), (1, 3, 8, 8))
    loss = Distillation(Distill(teacher=SOURCE), TorchTeacher(make_net(classes=7).eval()))
    with pytest.raises(InputError, match="the teacher has 7 classes, the student 4"):
        loss(make_net().eval(), batch_of(striped()))
    hint = Distill(teacher=SOURCE, features="hint", layers=(("0", "9"),))
    with pytest.raises(InputError, match="the teacher has no module '9'"):
        tap(make_net(), TorchTeacher(make_net()), hint, EXAMPLE)
    with pytest.raises(InputError, match="accepted: a PyTorch teacher"):
        tap(make_net(), Counting(make_net()), hint, EXAMPLE)
    never_called = Tapped(make_net(), ())  # its `adapters`
    with pytest.raises(InputError, match=r"never calls its module 'adapters'; accepted: .* teacher's factory"):
        tap(never_called, TorchTeacher(make_net()), hint.model_copy(update={"layers": (("adapters", "0"),)}), EXAMPLE)
    program = torch.export.export(make_net().eval(), (EXAMPLE,)).module(check_guards=False)
    with pytest.raises(InputError, match="never calls its module '0'"):
        tap(make_net(), TorchTeacher(program, 1), hint.model_copy(update={"layers": (("0", "0"),)}), EXAMPLE)
    flat = hint.model_copy(update={"layers": (("7", "7"),)})
    with pytest.raises(InputError, match="'7' of the student gives no feature maps"):
        tap(make_net(), TorchTeacher(make_net()), flat, EXAMPLE)
