"""Training with CUDA graphs gives what training without them gives; where there is no GPU nothing is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeship.pipeline.compression.batches import ArrayBatches, Batch
from edgeship.pipeline.compression.captured import can_capture
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.loop import Hook, Run, train
from edgeship.pipeline.training_section import Training

Make = Callable[..., Any]
SETTINGS = Training(epochs=2, batch_size=16, lr=0.05, precision="float32")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")


class Uneven:
    """Batches of which the last is smaller."""

    def __init__(self, whole: ArrayBatches) -> None:
        self.whole, self.steps = whole, whole.steps

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(self.whole.epoch(number, skip), skip + 1):
            size = len(batch.inputs) - (step == self.steps)
            yield Batch(batch.inputs[:size], batch.labels[:size] if batch.labels is not None else None)


class Looks(Hook):
    """Keeps whether the network's forward pass was its own when a step was done."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def step_done(self, model: nn.Module) -> None:
        self.seen.add(getattr(model.forward, "__qualname__", "").startswith("Captured."))


def trained(net: nn.Module, data: Any, folder: Path, graphs: bool) -> tuple[dict[str, Tensor], Looks]:
    look = Looks()
    settings = SETTINGS.model_copy(update={"cuda_graphs": graphs})
    train(Run(net, Classification(), data, settings, folder, hooks=[look]))
    assert "forward" not in vars(net)
    assert all(each.device.type == "cpu" for each in net.state_dict().values())
    return net.state_dict(), look


@needs_gpu
@pytest.mark.parametrize("uneven", [False, True])
def test_replayed_steps_train_what_launched_ones_train(
    uneven: bool, make_net: Make, striped: Make, tmp_path: Path
) -> None:
    data = Uneven(striped()) if uneven else striped()
    plain, was_plain = trained(make_net(), data, tmp_path / "plain", False)
    graphs, was_graphs = trained(make_net(), data, tmp_path / "graphs", True)
    assert was_plain.seen == {False}
    assert was_graphs.seen == {True}
    for name, value in plain.items():
        torch.testing.assert_close(graphs[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_captured(make_net: Make, striped: Make, tmp_path: Path) -> None:
    plain, _ = trained(make_net(), striped(), tmp_path / "plain", False)
    graphs, look = trained(make_net(), striped(), tmp_path / "graphs", True)
    assert look.seen == {False}
    assert all(torch.equal(graphs[name], value) for name, value in plain.items())


def test_a_network_with_hooks_is_not_captured(make_net: Make) -> None:
    net = make_net()
    assert can_capture(net)
    handle = next(iter(net.children())).register_forward_hook(lambda *_: None)
    assert not can_capture(net)
    handle.remove()
    assert can_capture(net)
