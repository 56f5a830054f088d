"""Mixed samples are what mixup and CutMix say, with labels in the same shares, and the same ones on every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Compress
from edgeship.pipeline.compression.batches import Batch, Share
from edgeship.pipeline.compression.classification import Classification, cross_entropy
from edgeship.pipeline.compression.distillation import Distillation
from edgeship.pipeline.compression.loop import Hook, Run, train
from edgeship.pipeline.compression.mixing import MixedBatches, mix
from edgeship.pipeline.training_section import Training

Make = Callable[..., Any]
COUNT = 400


def numbered(*shape: int) -> Batch:
    """Samples whose every element is their number, as are their labels."""
    numbers = torch.arange(COUNT)
    inputs = numbers.float().view(COUNT, *(1,) * len(shape)).expand(COUNT, *shape).clone()
    return Batch(inputs, numbers, numbers)


def mixed(*shape: int, **settings: Any) -> Batch:
    found = mix(numbered(*shape), Training(**settings), np.random.default_rng(0))
    assert found.indices is None  # what a teacher answered for the sample is no answer for the mixture
    return found


def own_and_other(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    assert batch.labels is not None
    assert batch.others is not None
    assert batch.share_of_own is not None
    return batch.labels.float(), batch.others.float(), batch.share_of_own


def test_mixup_blends_all_of_a_sample_and_its_label_in_the_same_share() -> None:
    batch = mixed(3, 4, 4, mixup=0.4)
    own, other, share = own_and_other(batch)
    assert torch.equal(own, torch.arange(COUNT).float())
    wanted = share * own + (1 - share) * other
    torch.testing.assert_close(batch.inputs, wanted.view(-1, 1, 1, 1).expand_as(batch.inputs))
    assert sorted(other.tolist()) == own.tolist()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert float(share.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(share.var()) == pytest.approx(1 / (4 * 1.8), rel=0.15)


def test_mixup_takes_samples_that_are_no_images() -> None:
    batch = mixed(7, mixup=1.0)
    own, other, share = own_and_other(batch)
    torch.testing.assert_close(batch.inputs[:, 3], share * own + (1 - share) * other)


def test_cutmix_puts_one_box_of_another_image_into_each_and_its_share_of_the_label() -> None:
    batch = mixed(2, 16, 24, cutmix=1.0)
    own, other, share = own_and_other(batch)
    areas = []
    for image, mine, theirs, part in zip(batch.inputs, own, other, share, strict=True):
        assert set(image.unique().tolist()) <= {float(mine), float(theirs)}
        assert torch.equal(image[0], image[1])
        if mine == theirs:
            continue
        inside = image[0] == theirs
        assert float(inside.float().mean()) == pytest.approx(1 - float(part), abs=1e-6)
        areas.append(1 - float(part))
        if inside.any():
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
    # E[area] = int r^2 dr^2 less what the border cuts off: of a side's share r, 1 - r/4 is left, on average
    assert np.mean(areas) == pytest.approx(1 / 2 - 2 / 4 * 2 / 5 + 1 / 16 * 1 / 3, abs=0.03)


def test_both_change_half_each_of_the_share_that_is_mixed() -> None:
    batch = mixed(1, 8, 8, mixup=8.0, cutmix=1.0, mix_share=0.6)
    own, other, share = own_and_other(batch)
    flat = batch.inputs.flatten(1)
    different = own != other
    blended = different & (flat != own.view(-1, 1)).all(1) & (flat != other.view(-1, 1)).all(1)
    untouched = (share == 1) & (flat == own.view(-1, 1)).all(1)
    assert float(blended.float().mean()) == pytest.approx(0.3, abs=0.06)
    assert float(untouched.float().mean()) == pytest.approx(0.4 + 0.3 * 0.03, abs=0.08)


def test_an_unmixed_sample_is_the_very_same() -> None:
    plain = numbered(3, 4, 4)
    rng = np.random.default_rng(0)
    batch = mix(Batch(plain.inputs / 7, plain.labels), Training(mixup=1.0, mix_share=1e-9), rng)
    assert torch.equal(batch.inputs, plain.inputs / 7)
    assert torch.equal(batch.answers if batch.answers is not None else torch.zeros(0), plain.labels)  # type: ignore[arg-type]  # labels are there


def test_the_loss_of_mixed_labels_is_that_of_the_mean_of_both() -> None:
    batch = Batch(
        torch.zeros(3, 1), torch.tensor([0, 1, 2]), None, torch.tensor([2, 0, 2]), torch.tensor([0.8, 0.3, 0.5])
    )
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([[0.8, 0, 0.2, 0], [0.7, 0.3, 0, 0], [0, 0, 1.0, 0]])
    smoothed = 0.9 * wanted + 0.1 / 4
    expected = -(smoothed * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(scores, batch, 0.1), expected)
    answers = batch.answers
    assert answers is not None
    assert answers.tolist() == [0, 0, 2]


def test_each_process_gets_its_part_of_the_labels_too() -> None:
    batch = mixed(1, 2, 2, mixup=1.0)
    parts = [batch.share(Share(index, 2)) for index in (0, 1)]
    for name in ("inputs", "labels", "others", "share_of_own"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_an_epoch_that_is_entered_later_has_the_same_mixtures(striped: Make) -> None:
    data = MixedBatches(striped(), Training(mixup=0.5, cutmix=1.0, seed=3))
    assert data.steps == 8
    every, rest = list(data.epoch(2)), list(data.epoch(2, 5))
    assert len(rest) == 3
    for one, other in zip(every[5:], rest, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(own_and_other(one)[2], own_and_other(other)[2])
    assert not torch.equal(every[0].inputs, next(iter(data.epoch(1))).inputs)


def test_what_is_no_image_cannot_be_cut() -> None:
    with pytest.raises(InputError, match=r"training.cutmix is for images \[batch, C, H, W\]; .* \['batch', 7\]"):
        mixed(7, cutmix=1.0)


class Stop(Hook):
    """Ends the run in the middle of its second epoch."""

    def __init__(self) -> None:
        self.left = 11

    def step_done(self, model: nn.Module) -> None:
        self.left -= 1
        if self.left == 0:
            raise ConnectionAbortedError


def test_training_on_mixed_images_learns_and_resumes_exactly(make_net: Make, striped: Make, tmp_path: Path) -> None:
    settings = Training(epochs=6, batch_size=16, lr=0.05, mixup=0.2, cutmix=1.0, mix_share=0.5)
    whole, cut, plain = make_net(), make_net(), make_net()
    judged = striped(shuffle=False)
    history = train(Run(whole, Classification(), striped(), settings, tmp_path / "whole", validation=judged))
    with pytest.raises(ConnectionAbortedError):
        train(Run(cut, Classification(), striped(), settings, tmp_path / "cut", validation=judged, hooks=[Stop()]))
    cut = make_net()
    again = Run(cut, Classification(), striped(), settings, tmp_path / "cut", validation=judged, hooks=[Hook()])
    assert train(again) == history
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), cut.parameters(), strict=True))
    assert (history[-1].validation_top1 or 0) > 90  # chance: 25
    train(Run(plain, Classification(), striped(), settings.model_copy(update={"mixup": 0.0, "cutmix": 0.0}), tmp_path))
    assert not torch.equal(next(whole.parameters()), next(plain.parameters()))


def test_a_teacher_is_asked_for_the_mixture_itself(striped: Make) -> None:
    class Asked:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def scores(self, inputs: Tensor) -> Tensor:
            self.seen.append(inputs)
            return torch.zeros(len(inputs), 4)

    section = Compress.model_validate({"distill": {"teacher": {"source": "x.onnx"}}}).distill
    assert section is not None
    teacher = Asked()
    loss = Distillation(section, teacher)
    loss.keep_outputs(striped(), lambda _done, _total, _what: None)
    teacher.seen.clear()
    batch = next(iter(MixedBatches(striped(), Training(cutmix=1.0)).epoch(0)))
    loss(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), batch)
    assert torch.equal(teacher.seen[0], batch.inputs)


def test_kept_answers_and_mixed_images_exclude_each_other() -> None:
    values = {"distill": {"teacher": {"source": "x.onnx"}, "cache": "always"}, "training": {"mixup": 0.2}}
    with pytest.raises(ValueError, match=r'distill.cache = "auto" or "never" with training.mixup or cutmix'):
        Compress.model_validate(values)
