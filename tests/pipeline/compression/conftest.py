"""A tiny classifier and images it can learn, for everything that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="training needs the extra: pip install edgeship[train]")

if TYPE_CHECKING:
    from torch import nn

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
    import torch
    from torch import nn

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
