"""A student that was cut out of a network like its teacher is told what each block gives out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.block_pairs import block_pairs
from edgeship.pipeline.compression.blocks import remove_blocks

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))  # type: ignore[no-any-return]  # torch says Any


class Net(nn.Module):
    """A line of blocks behind a layer that halves the maps, and one that stands by itself."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.line = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), *(Block() for _ in range(blocks)))
        self.alone = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alone(self.line(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]  # as above


def same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


def test_every_block_is_matched_and_what_stands_in_line_with_them() -> None:
    teacher = Net().eval()
    whole = same("line.0", "line.1", "line.2", "line.3", "line.4", "line.5", "alone")
    assert block_pairs(copy.deepcopy(teacher), teacher, EXAMPLE) == whole


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (["line.3"], ["line.0", "line.1", "line.3", "line.4", "line.5", "alone"]),
        (["line.3", "line.4"], ["line.0", "line.1", "line.4", "line.5", "alone"]),
        (["line.2", "line.5"], ["line.0", "line.2", "line.3", "line.5", "alone"]),
        (["line.5", "alone"], ["line.0", "line.1", "line.2", "line.3", "alone"]),
    ],
)
def test_what_is_left_does_the_work_of_what_is_gone(gone: list[str], left: list[str]) -> None:
    teacher = Net().eval()
    student = copy.deepcopy(teacher)
    remove_blocks(student, gone)
    assert block_pairs(student, teacher, EXAMPLE) == same(*left)


@pytest.mark.parametrize(("ours", "theirs"), [(3, 4), (4, 3)])
def test_a_teacher_of_another_depth_needs_layers(ours: int, theirs: int) -> None:
    with pytest.raises(InputError, match=r"'line\.5' is not in both networks.*or layers = \[\["):
        block_pairs(Net(ours).eval(), Net(theirs).eval(), EXAMPLE)


def test_a_teacher_without_blocks_needs_layers() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(InputError, match="the teacher has none that give feature maps"):
        block_pairs(plain, copy.deepcopy(plain), EXAMPLE)


def test_the_networks_stay_as_they_are() -> None:
    teacher, student = Net().eval(), Net().train()
    before = copy.deepcopy(student.state_dict())
    block_pairs(student, teacher, EXAMPLE)
    assert student.training
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
