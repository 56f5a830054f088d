"""A tiny classifier and images it can learn, for everything that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="training needs the extra: pip install edgeship[train]")

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

if TYPE_CHECKING:
    from edgeship.pipeline.compression.batches import ArrayBatches

CLASSES = 4


def striped_images(count: int = 128, size: int = 8) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Noise (n, 3, size, size) uint8 with a brighter stripe whose place is the class."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, count)
    images = rng.integers(0, 120, (count, 3, size, size))
    for image, label in zip(images, labels, strict=True):
        image[:, label * size // CLASSES : (label + 1) * size // CLASSES] += 90
    return images.astype(np.uint8), labels.tolist()


@pytest.fixture
def striped() -> Callable[..., ArrayBatches]:
    """Makes batches of striped images."""
    from edgeship.pipeline.compression.batches import ArrayBatches

    images, labels = striped_images()

    def make(batch_size: int = 16, **more: Any) -> ArrayBatches:
        return ArrayBatches(images, labels, batch_size, (100.0,), (60.0,), **more)

    return make


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    """Makes a small network with BatchNorm and dropout, always with the same weights."""

    def make(width: int = 8, classes: int = CLASSES) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout(0.1),
                nn.Conv2d(width, 8, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(128, classes),
            )

    return make


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 32), conv(32, 24), conv(24, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class Padded(Residual):
    """A shortcut that pads a fixed number of channels: the code knows the widths."""

    def __init__(self) -> None:
        super().__init__()
        self.second = conv(24, 48)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(F.pad(x, (0, 0, 0, 0, 8, 8)) + self.second(F.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.after = conv(3, 16), conv(3, 24), conv(40, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(F.relu(self.after(x)).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spatial, self.mix = conv(3, 32), conv(32, 32, groups=32), conv(32, 24, kernel=1)
        self.head = nn.Linear(24 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.spatial(F.relu6(self.stem(x))))
        return self.head(F.max_pool2d(F.relu(self.mix(x)), 2).flatten(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.last = conv(3, 32), conv(32, 32, groups=4), conv(32, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.grouped(F.relu(self.stem(x)))))).mean((2, 3)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "padded": Padded,
    "concatenated": Concatenated,
    "depthwise": Depthwise,
    "grouped": Grouped,
}


def build_network(kind: str, seed: int = 0) -> nn.Module:
    """The network with weights and normalization as after some training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KINDS[kind]()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.3)
                layer.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]  # it tracks statistics
                layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]  # as above
    return model.eval()


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Makes one of the networks above by name: residual, padded, concatenated, depthwise, grouped."""
    return build_network
