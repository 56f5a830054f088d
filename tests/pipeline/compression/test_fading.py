"""What is to be removed fades out while the network is trained; at the end, removing it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from pydantic import ValidationError
from torch import Tensor, nn

from edgeship.pipeline.compress_sections import Compress, Prune
from edgeship.pipeline.compression.channels import Cut, find_channels
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.fading import Fading
from edgeship.pipeline.compression.loop import Hook, Run, train
from edgeship.pipeline.compression.masks import GradualMasks, maskable, sparsity
from edgeship.pipeline.compression.removal import Removed
from edgeship.pipeline.training_section import Training

EXAMPLE = torch.zeros(1, 3, 8, 8)
Make = Callable[..., Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Block(), Block(), Block())
        self.wide, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.wide(self.blocks(F.relu(self.stem(x))).mean((2, 3)))))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net()


def removal(net: Net) -> Removed:
    """A block, half of another's inner channels, and half of a linear layer's outputs."""
    names = {group.name for group in find_channels(net, EXAMPLE).groups}
    assert {"blocks.0.first", "wide"} <= names
    return Removed(("blocks.1",), (Cut("blocks.0.first", tuple(range(0, 24, 2))), Cut("wide", tuple(range(16)))))


def test_a_fade_begins_with_the_whole_network_and_ends_with_the_smaller_one(
    net: Net, striped: Make, tmp_path: Path
) -> None:
    removed, data = removal(net), striped()
    fading = Fading(removed.leaving(net, EXAMPLE), 2 * data.steps)
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), fading.on(net.eval()):
        faded = net(inputs)
    torch.testing.assert_close(faded, net(inputs), rtol=0, atol=1e-6)
    with fading.on(net):
        run = Run(net, Classification(), data, Training(epochs=4, batch_size=16), tmp_path, hooks=[fading])
        run.epochs = (0, 2)
        assert [each.epoch for each in train(run)] == [1, 2]
        with torch.no_grad():
            at_the_end = net(inputs)
    with torch.no_grad():
        assert not torch.allclose(net(inputs), at_the_end, rtol=1e-2)
    removed.take_from(net, EXAMPLE)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(inputs), at_the_end, rtol=1e-4, atol=1e-5)


def test_half_way_half_of_it_is_left(net: Net) -> None:
    fading = Fading(Removed(("blocks.2",)).leaving(net, EXAMPLE), 4)
    inputs = torch.rand(2, 16, 8, 8)
    block = net.blocks[2].eval()
    with torch.no_grad():
        whole = block(inputs)
        with fading.on(net):
            fading.step_done(net)
            fading.step_done(net)
            torch.testing.assert_close(block(inputs), (inputs + whole) / 2)
        torch.testing.assert_close(block(inputs), whole, rtol=0, atol=0)


def test_epochs_trained_in_two_parts_are_those_of_the_whole(net: Net, striped: Make, tmp_path: Path) -> None:
    data, settings = striped(), Training(epochs=4, batch_size=16, momentum=0.0, nesterov=False)
    other = copy.deepcopy(net)
    whole = train(Run(net, Classification(), data, settings, tmp_path / "whole"))
    parts = []
    for part in ((0, 1), (1, 4)):
        parts += train(Run(other, Classification(), data, settings, tmp_path / str(part), epochs=part))
    assert parts == whole
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_weights_go_by_the_cubic_schedule_and_do_not_come_back(net: Net, striped: Make, tmp_path: Path) -> None:
    data, seen = striped(), list[float]()
    settings = Prune(kind="unstructured", ratio=0.8, fade_epochs=2)
    names = maskable(net, settings)
    gradual = GradualMasks(names, settings, 2 * data.steps)

    class Watch(Hook):
        def epoch_ends(self, model: nn.Module, epoch: int) -> None:
            seen.append(sparsity(model, names))

    training = Training(epochs=3, batch_size=16)
    train(Run(net, Classification(), data, training, tmp_path, hooks=[gradual, Watch()]))
    assert seen == pytest.approx([0.8 * (1 - 0.5**3), 0.8, 0.8], abs=0.01)
    for name, mask in gradual.masks.items():
        assert not dict(net.named_parameters())[name][~mask.cpu()].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "soft", "ratio": 0.3}, 'fade_epochs = 0 with kind = "soft"'),
        ({"macs": 0.5, "steps": 3}, "fade_epochs = 0 with steps = 3"),
        ({"kind": "unstructured", "ratio": 0.5, "importance": "taylor"}, 'importance = "magnitude" with fade_epochs'),
    ],
)
def test_what_cannot_fade_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Prune(fade_epochs=1, **changes)


def test_a_fade_leaves_time_for_training() -> None:
    with pytest.raises(ValidationError, match=r"fade_epochs below training.epochs = 3.* it is 3"):
        Compress(prune=Prune(macs=0.5, fade_epochs=3), training=Training(epochs=3))
