"""Depth pruning: residual blocks are found by what they do, and those that matter least go first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.blocks import find_blocks, remove_blocks
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.cost import count_cost
from edgeship.pipeline.compression.removal import Removal, Removed
from edgeship.pipeline.compression.structured import Goal, macs_goal

EXAMPLE = torch.zeros(1, 3, 8, 8)
Make = Callable[..., Any]


class Block(nn.Module):
    """relu(x + f(x)), or f of another kind that is no residual block."""

    def __init__(self, kind: str = "basic", channels: int = 16) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(F.relu(self.norm(self.first(x))))
        if self.kind == "basic":
            return F.relu(x + inner)
        if self.kind == "linear":  # an inverted bottleneck's
            return x + inner
        if self.kind == "scaled":  # squeeze and excitation
            return x * torch.sigmoid(inner.mean((2, 3), keepdim=True))
        return F.relu(inner)  # "plain"


class Deep(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.Sequential(*(Block(kind) for kind in kinds))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.stem(x))).mean((2, 3)))


class Uneven(nn.Module):
    """Wide blocks on small maps, and narrow ones on large maps: the same multiply-accumulates, unlike weights."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block("linear", 8), Block("linear", 8))
        self.wide = nn.Sequential(nn.Conv2d(8, 32, 3, 2, 1), Block("linear", 32), Block("linear", 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.narrow(x)).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=first) for first in (True, False)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(1))


class Twice(Deep):
    """Runs its one block two times."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stages(F.relu(self.stem(x)))).mean((2, 3)))


def make(*kinds: str) -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Deep(*kinds).eval()


def removal(model: nn.Module, **settings: Any) -> Removal:
    return Removal(model, EXAMPLE, Prune(kind="blocks", **({"ratio": 0.5} | settings)))


def test_blocks_are_the_innermost_modules_that_add_to_their_input() -> None:
    kinds = ("basic", "plain", "basic", "scaled", "linear")
    assert find_blocks(make(*kinds), EXAMPLE) == ["stages.0", "stages.2", "stages.4"]
    assert find_blocks(Tokens().eval(), EXAMPLE) == ["layers.0"]  # the other normalizes the sum
    assert find_blocks(Twice("basic").eval(), EXAMPLE) == []


class Frozen(nn.Module):
    """BatchNorm with buffers alone, as torchvision's detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + 1e-5).rsqrt()
        shift = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(16, affine=False), lambda: Frozen(16)])
def test_blocks_whose_normalization_has_no_weights_are_found(norm: Callable[[], nn.Module]) -> None:
    model = make("basic", "plain", "linear", "scaled")
    generator = torch.Generator().manual_seed(3)
    for block in model.stages:
        block.second = nn.Sequential(block.second, norm())
        for values in block.second[1].buffers():
            if values.is_floating_point():
                values.copy_(torch.rand(values.shape, generator=generator) + 0.1)
    before = copy.deepcopy(model.state_dict())
    assert find_blocks(model, EXAMPLE) == ["stages.0", "stages.2"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_that_is_silent_without_biases_has_no_more_blocks_than_others() -> None:
    model = make("plain", "basic")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None
    assert find_blocks(model, EXAMPLE) == ["stages.1"]


def test_finding_blocks_leaves_the_network_as_it_was() -> None:
    model = make("basic", "linear").train()
    before = copy.deepcopy(model.state_dict())
    find_blocks(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_without_a_block_computes_what_it_does_with_the_block_silent() -> None:
    model, silent = make("basic", "basic", "linear"), make("basic", "basic", "linear")
    with torch.no_grad():
        for parameter in silent.stages[1].parameters():
            parameter.zero_()
        remove_blocks(model, ["stages.1"])
        inputs = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model(inputs), silent(inputs), rtol=0, atol=0)
    assert count_cost(model, EXAMPLE).macs == count_cost(silent, EXAMPLE).macs - 2 * 64 * 16 * 16 * 9


def test_the_block_that_matters_least_goes_first(striped: Make) -> None:
    model = make("basic", "linear", "basic")
    with torch.no_grad():
        for parameter in model.stages[1].parameters():
            parameter.mul_(1e-3)  # does next to nothing
    state = copy.deepcopy(model.state_dict())
    assert removal(model, batches=2).count(1, Classification(), striped()) == Removed(("stages.1",))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_only_as_many_blocks_go_as_the_goal_asks(striped: Make) -> None:
    model = make("basic", "basic", "basic", "basic")
    goal = macs_goal(model, EXAMPLE, 0.6)
    gone = removal(model, batches=2).reach(goal, Classification(), striped()).blocks
    assert len(gone) == 2
    remove_blocks(model, gone)
    assert goal.meter(model) <= goal.limit
    assert removal(model, batches=2).reach(goal, Classification(), striped()) == Removed()


def test_what_cannot_be_removed_is_refused_with_what_can(striped: Make) -> None:
    model = make("basic", "basic")
    with pytest.raises(StageError, match=r"macs = .* cannot be met: without any of the 2 residual blocks it is \d"):
        removal(model, batches=1).reach(macs_goal(model, EXAMPLE, 0.01), Classification(), striped())
    with pytest.raises(InputError, match=r"would remove all 2 residual blocks; accepted: at most 0\.5"):
        removal(model, ratio=0.99).count(2, Classification(), striped())
    with pytest.raises(InputError, match="the network has none to remove: no module gives back its input"):
        removal(make("plain")).blocks()
    with pytest.raises(InputError, match=r"prune\.skip spares them all"):
        removal(model, skip=("stages.*",)).blocks()
    with pytest.raises(InputError, match="'stagse' matches no layer"):
        removal(model, skip=("stagse",)).blocks()
    with pytest.raises(InputError, match=r"no block 'stages\.7'"):
        remove_blocks(model, ["stages.7"])


def test_blocks_that_are_skipped_stay(striped: Make) -> None:
    model = make("basic", "basic", "basic")
    goal = Goal("blocks", 1, lambda each: float(len(find_blocks(each, EXAMPLE))))
    gone = removal(model, skip=("stages.1",), batches=1).reach(goal, Classification(), striped()).blocks
    assert sorted(gone) == ["stages.0", "stages.2"]


def test_blocks_are_ranked_for_what_the_goal_is_about(striped: Make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Uneven().eval()
    with torch.no_grad():
        for part in (model.narrow, model.wide):
            for block in list(part)[1:]:
                block.second.weight.mul_(0.2)
    parameters = sum(each.numel() for each in model.parameters())
    goal = Goal("parameters", 0.7 * parameters, lambda each: float(sum(one.numel() for one in each.parameters())))
    gone = removal(model, ratio=None, max_bytes=1, batches=2).reach(goal, Classification(), striped()).blocks
    assert gone
    assert all(name.startswith("wide") for name in gone)
