"""Blocks and channels together: what costs the least loss for what it saves goes first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.batches import LoaderBatches
from edgeship.pipeline.compression.blocks import remove_blocks
from edgeship.pipeline.compression.candidates import Candidate, Extent
from edgeship.pipeline.compression.channels import find_channels, remove_channels
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.cost import count_cost
from edgeship.pipeline.compression.removal import Removal
from edgeship.pipeline.compression.structured import Cut, Goal, bytes_goal, macs_goal

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


class Small(nn.Module):
    """A stem, three residual blocks, and a plain layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.last = nn.Conv2d(16, 32, 3, 2, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.blocks(F.relu(self.stem(x))))).mean((2, 3)))


@pytest.fixture
def model() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


def removal(model: nn.Module, **settings: Any) -> Removal:
    return Removal(model, EXAMPLE, Prune(**({"kind": "mixed", "batches": 2, "macs": 0.5} | settings)))


@torch.no_grad()
def make_useless(model: Small) -> None:
    """The second block, and eight channels inside the third, do nothing that could be seen."""
    for parameter in model.blocks[1].parameters():
        parameter.mul_(1e-4)
    third = model.blocks[2]
    third.norm.weight[4:12] = 0
    third.norm.bias[4:12] = 0
    third.second.weight[:, 4:12] = 0


def test_the_block_and_the_channels_that_do_nothing_go_first(model: Small, striped: Callable[..., Any]) -> None:
    make_useless(model)
    before = copy.deepcopy(model.state_dict())
    block, channels = 2 * 64 * 16 * 32 * 9, 2 * 64 * 16 * 8 * 9
    whole = count_cost(model, EXAMPLE).macs
    goal = macs_goal(model, EXAMPLE, (whole - block - channels) / whole)
    removed = removal(model).reach(goal, Classification(), striped())
    assert removed.blocks == ("blocks.1",)
    assert removed.cuts == (Cut("blocks.2.first", tuple(range(4, 12))),)
    assert list(removed.left_dense) == ["head"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    inputs = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(inputs)
        removed.take_from(model, EXAMPLE)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-3, atol=1e-3)
    assert count_cost(model, EXAMPLE).macs == whole - block - channels


class Shifted(nn.Module):
    """The first block does something; the second adds a constant, which the normalization behind it takes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 4)
        nn.init.zeros_(self.blocks[1].second.weight)
        nn.init.constant_(self.blocks[1].second.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(F.relu(self.stem(x))))).mean((2, 3)))


def test_what_new_statistics_mend_does_not_count(striped: Callable[..., Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shifted().train()
    data = striped()
    for layer in (model.norm, model.blocks[0].norm, model.blocks[1].norm):
        layer.momentum = None  # a mean over all
    with torch.no_grad():
        for batch in data.epoch(0):
            model(batch.inputs)
    whole = copy.deepcopy(model.eval())

    def change(trial: nn.Module, batch: Any) -> tuple[Tensor, None]:
        return (trial(batch.inputs) - whole.to(batch.inputs.device)(batch.inputs)).square().mean(), None

    batch = next(iter(data.epoch(0)))
    with torch.no_grad():
        kept = [float(change(without, batch)[0]) for without in (removed_from(model, 0), removed_from(model, 1))]
    assert kept[1] > kept[0]  # by the statistics of the whole network, the constant is missed more
    removal = Removal(model, EXAMPLE, Prune(kind="blocks", ratio=0.5, batches=2))
    assert removal.count(1, change, data).blocks == ("blocks.1",)
    assert all(torch.equal(whole.cpu().state_dict()[name], value) for name, value in model.state_dict().items())


class Plain(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class Stages(nn.Module):
    """Two blocks of the same work: the second has half the height and width, twice the channels, 4x the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early = nn.Conv2d(3, 8, 3, padding=1), Plain(8)
        self.down, self.late, self.head = nn.Conv2d(8, 16, 3, 2, 1), Plain(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(F.relu(self.down(self.early(F.relu(self.stem(x)))))).mean((2, 3)))


@pytest.mark.parametrize(
    ("goal", "early", "late", "first"),
    [
        ({"macs": 0.5}, 0.1, 0.1, "early"),
        ({"macs": 0.5}, 0.1, 0.05, "early"),  # 0.1^0.6 < 0.05^0.6 * 4^0.4
        ({"macs": 0.5}, 0.1, 0.03, "late"),
        ({"max_bytes": 4000}, 0.1, 0.1, "late"),
        ({"max_bytes": 4000}, 0.1, 0.39, "late"),  # where parameters are what is saved, the rise counts alone
        ({"max_bytes": 4000}, 0.1, 0.41, "early"),
    ],
)
def test_what_leaves_more_parameters_goes_first_where_work_is_to_be_saved(
    goal: dict[str, Any], early: float, late: float, first: str, striped: Callable[..., Any]
) -> None:
    model = Stages().eval()

    def loss(trial: Any, batch: Any) -> tuple[Tensor, None]:
        gone = [isinstance(block, nn.Identity) for block in (trial.early, trial.late)]
        return batch.inputs.new_tensor(1.0 + early * gone[0] + late * gone[1]), None

    search = Removal(model, EXAMPLE, Prune(kind="blocks", batches=1, **goal))
    limit = (
        macs_goal(model, EXAMPLE, 0.9) if "macs" in goal else bytes_goal(count_cost(model, EXAMPLE).parameters * 4 - 1)
    )
    assert search.reach(limit, loss, striped()).blocks == (first,)


def removed_from(model: nn.Module, block: int) -> nn.Module:
    other = copy.deepcopy(model)
    remove_blocks(other, [f"blocks.{block}"])
    return other


def test_no_more_goes_than_the_goal_asks(model: Small, striped: Callable[..., Any]) -> None:
    for share in (0.9, 0.6, 0.3):
        goal = macs_goal(model, EXAMPLE, share)
        pruned = copy.deepcopy(model)
        removed = removal(model).reach(goal, Classification(), striped())
        removed.take_from(pruned, EXAMPLE)
        assert goal.meter(pruned) <= goal.limit
        for place in range(len(removed.blocks)):  # each is needed
            fewer = copy.deepcopy(model)
            replace(removed, blocks=removed.blocks[:place] + removed.blocks[place + 1 :]).take_from(fewer, EXAMPLE)
            assert goal.meter(fewer) > goal.limit
        assert pruned(EXAMPLE).shape == (1, 4)
        layers = dict(model.named_modules())
        widths = {each.layer: layers[each.layer].weight.shape[0] - len(each.channels) for each in removed.cuts}
        assert all(width > 0 and width % 8 == 0 for width in widths.values())
        assert not any(name.startswith(f"{block}.") for name in widths for block in removed.blocks)


@pytest.mark.parametrize("kind", ["blocks", "mixed"])
def test_what_is_measured_is_the_network_in_float32_whatever_it_is_ranked_in(
    kind: str, model: Small, striped: Callable[..., Any]
) -> None:
    seen = []

    def metered(trial: nn.Module) -> float:
        seen.append((trial(EXAMPLE).dtype, trial.training, {m.momentum for m in trial.modules() if hasattr(m, "eps")}))
        return float(count_cost(trial, EXAMPLE).macs)

    goal = Goal("max_latency_ms", 0.6 * count_cost(model, EXAMPLE).macs, metered, exact=False)
    chooser = replace(removal(model, kind=kind), precision="bfloat16")
    removed = chooser.reach(goal, Classification(), striped())
    assert removed.blocks or removed.cuts
    assert len(seen) >= 3
    assert all(each[:2] == (torch.float32, False) and each[2] <= {0.1} for each in seen)


@pytest.mark.parametrize("kind", ["blocks", "mixed"])
def test_where_trials_were_measured_too_fast_more_goes_until_the_goal_is_met_for_sure(
    kind: str, model: Small, striped: Callable[..., Any]
) -> None:
    def macs(trial: nn.Module) -> float:
        return float(count_cost(trial, EXAMPLE).macs)

    limit = 0.495 * macs(model)
    hasty = Goal("max_latency_ms", limit, lambda trial: 0.5 * macs(trial), exact=False)
    chooser = removal(model, kind=kind, layer_limit=0.5)
    for confirm, met in ((None, False), (macs, True)):
        pruned = copy.deepcopy(model)
        chooser.reach(replace(hasty, confirm=confirm), Classification(), striped()).take_from(pruned, EXAMPLE)
        assert (macs(pruned) <= limit) == met
    never = replace(hasty, confirm=lambda trial: 2 * limit)
    with pytest.raises(StageError, match=r"max_latency_ms = .* cannot be met: without .* it is "):
        chooser.reach(never, Classification(), striped())


def test_what_went_early_comes_back_where_what_went_last_saves_enough(
    model: Small, striped: Callable[..., Any]
) -> None:
    make_useless(model)
    with torch.no_grad():
        model.blocks[1].second.bias[:] = 0.05  # a little worse without it
    goal = macs_goal(model, EXAMPLE, 1 - 2 * 64 * 16 * 8 * 9 * 1.5 / count_cost(model, EXAMPLE).macs)
    chooser = removal(model, skip=("stem", "last", "blocks.0*", "blocks.1.first", "blocks.2"), layer_limit=0.25)
    both = chooser.reach(replace(goal, exact=False), Classification(), striped())
    assert (both.blocks, [each.layer for each in both.cuts]) == (("blocks.1",), ["blocks.2.first"])
    assert chooser.reach(goal, Classification(), striped()) == replace(both, cuts=())


def test_what_is_said_to_be_saved_is_what_removal_saves(model: Small) -> None:
    extent = Extent(model, EXAMPLE, "macs")
    groups = {group.name: group for group in find_channels(model, EXAMPLE).groups}
    residual = next(each for each in groups.values() if each.size == 16)
    inner = groups["blocks.2.first"]
    picks = [  # with the channels' numbers as they are then
        (Candidate("blocks.2.first", inner, tuple(range(8))), tuple(range(8))),
        (Candidate("stem", residual, tuple(range(4))), tuple(range(4))),
        (Candidate("last", groups["last"], (1, 5)), (1, 5)),
        (Candidate("blocks.2.first", inner, tuple(range(8, 24))), tuple(range(16))),
        (Candidate("blocks.2"), ()),
    ]
    for pick, channels in picks:
        whole = count_cost(model, EXAMPLE).macs
        if pick.group is None:
            pick.take_from(model)
        else:
            remove_channels(model, EXAMPLE, [Cut(pick.name, channels)])
        assert extent.saved(pick) == pytest.approx(whole - count_cost(model, EXAMPLE).macs)
        extent.take(pick)


def test_a_size_is_reached_and_what_cannot_be_is_refused(model: Small, striped: Callable[..., Any]) -> None:
    from edgeship.pipeline.compression.structured import bytes_goal

    removed = removal(model, macs=None, max_bytes=60_000).reach(bytes_goal(60_000), Classification(), striped())
    removed.take_from(model, EXAMPLE)
    assert 40_000 < 4 * sum(each.numel() for each in model.parameters()) <= 60_000
    said = r"macs = .* cannot be met: without its \d residual blocks and with every layer at layer_limit = 0\.5 and"
    with pytest.raises(StageError, match=said):
        removal(model, layer_limit=0.5).reach(macs_goal(model, EXAMPLE, 0.01), Classification(), striped())


@pytest.mark.parametrize(("kind", "more"), [("mixed", {"importance": "magnitude"}), ("blocks", {})])
def test_what_the_last_step_cannot_do_is_told_before_anything_is_tried(
    kind: str, more: dict[str, Any], model: Small, striped: Callable[..., Any]
) -> None:
    def never(_model: nn.Module, _batch: Any) -> Any:
        raise AssertionError("a block was tried")

    easy, impossible = macs_goal(model, EXAMPLE, 0.9), macs_goal(model, EXAMPLE, 0.01)
    chooser = removal(model, kind=kind, layer_limit=0.5, **more)
    with pytest.raises(StageError, match=r"macs = .* cannot be met: without .* it is "):
        chooser.reach(easy, never, striped(), impossible)
    found = chooser.reach(easy, Classification(), striped())
    assert found.blocks or found.cuts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 0.5}, "a ratio of blocks and channels is none"),
        ({"macs": 0.5, "scope": "layer"}, 'scope = "global" with kind = "mixed"'),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Prune(kind="mixed", **settings)


def test_a_batch_of_one_that_blocks_cannot_be_ranked_on_is_named() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.inner(x))

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), Vectors(), Vectors(), nn.Linear(16, 4))
    data = LoaderBatches(
        [(torch.ones(size, 3, 8, 8), torch.zeros(size).long()) for size in (8, 1)], "own", (1, 3, 8, 8)
    )
    with pytest.raises(
        InputError, match=r"ranking, batch 2: a batch of 1 has a single value .*; accepted: batches of 2"
    ):
        removal(model.eval(), kind="blocks", ratio=0.5, macs=None).count(1, Classification(), data)
