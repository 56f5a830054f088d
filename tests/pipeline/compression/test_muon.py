"""The optimizer Muon: which weights take orthogonal steps, how long the steps are, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.loop import Run, train
from edgeship.pipeline.compression.muon import Muon, hidden_matrices, orthogonal
from edgeship.pipeline.compression.optimizer import make_optimizer
from edgeship.pipeline.quantize_section import Qat
from edgeship.pipeline.training_section import Training

Make = Callable[..., Any]


@pytest.mark.parametrize("shape", [(1, 6, 40), (3, 40, 6), (2, 1, 9), (2, 16, 16)], ids=str)
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 37
    left, sizes, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonal(matrices) @ right.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    seen = sizes > 0.05 * torch.linalg.matrix_norm(matrices)[:, None]  # smaller ones are still on their way
    assert seen.float().mean() > 0.5
    assert (diagonal[seen] - 1).abs().max() < 0.4
    assert (found - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_a_gradient_of_zero_is_no_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


class Net(nn.Module):
    """All that has weights: convolutions with groups, a transposed one, linear layers, an embedding, normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.place = nn.Parameter(torch.zeros(4, 1, 1))
        self.words = nn.Embedding(5, 4)
        self.hidden, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3)


def test_convolutions_and_linear_layers_but_the_classifier_take_orthogonal_steps() -> None:
    net = Net()
    names = {id(value): name for name, value in net.named_parameters()}
    found = {names[id(each.parameter)]: each.groups for each in hidden_matrices(net)}
    assert found == {
        "conv.weight": 1,
        "depthwise.weight": 8,
        "grouped.weight": 2,
        "up.weight": 1,
        "hidden.weight": 1,
    }
    groups = make_optimizer(net, Training(optimizer="muon", weight_decay=0.1)).param_groups
    every = [names[id(each)] for group in groups for each in group["params"]]
    assert sorted(every) == sorted(name for name, value in net.named_parameters() if value.requires_grad)
    decays = {names[id(each)]: group["weight_decay"] for group in groups for each in group["params"]}
    assert (decays["conv.weight"], decays["head.weight"], decays["words.weight"], decays["norm.weight"]) == (
        (0.1, 0.1, 0.1, 0.0)
    )


def test_a_weight_shared_with_the_classifier_is_the_classifiers() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].weight = net[1].weight
    assert hidden_matrices(net) == []


def test_a_weight_that_is_computed_is_left_to_adamw(striped: Make, tmp_path: Path) -> None:
    """Weight normalization: the layer's weight is the product of two parameters, whose shapes say nothing."""
    net = nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(288, 4))
    assert hidden_matrices(net) == []
    settings = Training(epochs=1, batch_size=16, optimizer="muon")
    assert len(train(Run(net, Classification(), striped(), settings, tmp_path))) == 1


def test_a_step_moves_elements_as_far_as_adamw_whatever_the_gradients_size() -> None:
    for shape, groups in (((8, 24), 1), ((24, 8, 3, 3), 1), ((16, 1, 3, 3), 16)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([{"params": [weight], "weight_decay": 0.0, "matrices": groups}], lr=0.01)
        for size in (1.0, 1e4):
            before = weight.detach().clone()
            weight.grad = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
            optimizer.step()
            moved = float((weight.detach() - before).square().mean().sqrt())
            assert moved == pytest.approx(0.2 * 0.01, rel=0.35)  # singular values of 0.7 to 1.2


def test_groups_are_matrices_of_their_own() -> None:
    """A grouped convolution takes the steps that its groups would take as convolutions."""
    gradient = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = nn.Parameter(torch.zeros(8, 2, 3, 3).to(memory_format=torch.channels_last))
    halves = [nn.Parameter(torch.zeros(4, 2, 3, 3)) for _ in range(2)]
    for parameters, gradients, groups in (([whole], [gradient], 2), (halves, gradient.chunk(2), 1)):
        for parameter, value in zip(parameters, gradients, strict=True):
            parameter.grad = value.clone()
        Muon([{"params": parameters, "weight_decay": 0.0, "matrices": groups}], lr=0.1).step()
    assert torch.allclose(whole.detach(), torch.cat([each.detach() for each in halves]), atol=1e-6)


def test_weights_decay_apart_from_the_gradient() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([{"params": [weight], "weight_decay": 0.5, "matrices": 1}], lr=0.1).step()
    assert torch.allclose(weight.detach(), torch.full((4, 4), 0.95))


def test_it_learns(make_net: Make, striped: Make, tmp_path: Path) -> None:
    settings = Training(epochs=3, batch_size=16, lr=0.01, optimizer="muon")
    history = train(Run(make_net(), Classification(), striped(), settings, tmp_path, validation=striped(shuffle=False)))
    assert (history[-1].validation_top1 or 0) > 90  # chance: 25


def test_the_rate_is_the_optimizers_own_unless_it_is_given() -> None:
    rates = {name: Training.model_validate({"optimizer": name}).lr for name in ("sgd", "adamw", "muon")}
    assert rates == {"sgd": 0.02, "adamw": 0.002, "muon": 0.002}
    assert Training(optimizer="muon", lr=0.1).lr == 0.1
    assert Qat.model_validate({"optimizer": "adamw"}).lr == Qat().lr
