"""Pruning: what is removed is removed everywhere, what cannot be removed is found, and goals are met or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.batches import ArrayBatches
from edgeship.pipeline.compression.channels import Cut, find_channels, remove_channels
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.cost import count_cost
from edgeship.pipeline.compression.importance import Evidence, channel_scores, gather, weight_scores
from edgeship.pipeline.compression.loop import Run, train
from edgeship.pipeline.compression.masks import Masks, choose_masks, maskable, sparsity
from edgeship.pipeline.compression.saved import weights_file
from edgeship.pipeline.compression.soft import SoftPruning, zero_channels
from edgeship.pipeline.compression.structured import Ranking, bytes_goal, cut, macs_goal, prunable, sizes_in
from edgeship.pipeline.training_section import Training

EXAMPLE = torch.zeros(1, 3, 8, 8)
Make = Callable[..., Any]


def ranking(model: nn.Module, settings: Prune) -> Ranking:
    groups = prunable(model, EXAMPLE, settings).groups
    return Ranking(groups, {g.name: channel_scores(model, g, "magnitude", Evidence()) for g in groups}, settings)


def inputs() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["residual", "concatenated", "depthwise"])
def test_removing_channels_that_compute_nothing_changes_nothing(kind: str, build: Make) -> None:
    model = build(kind)
    settings = Prune(ratio=0.4, scope="layer")
    ranks = ranking(model, settings)
    cuts = ranks.cuts_to(0.4)
    assert {each.layer for each in cuts} == {group.name for group in ranks.groups}
    zero_channels(model, ranks.groups, cuts)
    with torch.no_grad():
        before = model(inputs())
        cut(model, EXAMPLE, cuts)
        torch.testing.assert_close(model(inputs()), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "concatenated", "depthwise", "grouped"])
def test_no_layer_loses_more_than_its_limit_in_several_steps(kind: str, build: Make) -> None:
    dense = build(kind)
    settings = Prune(ratio=0.4, layer_limit=0.5, round_to=1, steps=2)
    whole = {group.name: group.size for group in prunable(dense, EXAMPLE, settings).groups}
    model = copy.deepcopy(dense)
    for _ in range(3):
        ranks = ranking(model, settings)
        assert sizes_in(dense, ranks.groups, model) == {group.name: whole[group.name] for group in ranks.groups}
        cut(model, EXAMPLE, replace(ranks, dense=whole).cuts(0.4))
    left = {group.name: group.size for group in prunable(model, EXAMPLE, settings).groups}
    assert all(2 * left[name] >= size for name, size in whole.items())
    assert any(2 * left[name] == size for name, size in whole.items())


@pytest.mark.parametrize("kind", ["residual", "concatenated", "depthwise", "padded", "grouped"])
def test_a_pruned_network_has_multiples_of_eight_and_costs_what_was_asked(kind: str, build: Make) -> None:
    model = build(kind)
    dense = count_cost(model, EXAMPLE)
    goal = macs_goal(model, EXAMPLE, 0.7)
    cut(model, EXAMPLE, ranking(model, Prune(macs=0.7, layer_limit=0.7)).reach(model, EXAMPLE, goal))
    after = count_cost(model, EXAMPLE)
    assert after.macs <= 0.7 * dense.macs
    assert after.parameters < dense.parameters
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert model(inputs()).shape == (6, 4)


@pytest.mark.parametrize(
    ("kind", "kept", "reason"),
    [
        ("padded", "second.0", "the network's code"),
        ("grouped", "stem.0", "grouped.0 is a convolution of 4 groups"),
        ("residual", "head", "its output"),
    ],
)
def test_channels_that_cannot_be_removed_are_found_and_named(kind: str, kept: str, reason: str, build: Make) -> None:
    found = find_channels(build(kind), EXAMPLE)
    assert reason in found.kept[kept]
    assert kept not in {group.name for group in found.groups}
    assert found.groups


def test_macs_are_counted_as_the_onnx_side_counts_them(build: Make) -> None:
    cost = count_cost(build("depthwise"), EXAMPLE)
    assert cost.macs == 64 * (3 * 32 * 9 + 32 * 9 + 32 * 24) + 24 * 16 * 4


def test_the_fewest_channels_are_removed_that_meet_the_goal(build: Make) -> None:
    model = build("residual")
    ranks = ranking(model, Prune(max_bytes=30_000))
    goal = bytes_goal(30_000)
    cuts = ranks.reach(model, EXAMPLE, goal)
    cut(model, EXAMPLE, cuts)
    assert goal.meter(model) <= 30_000
    one_block_less = [Cut(each.layer, each.channels[8:]) for each in cuts]
    for place in range(len(cuts)):
        other = build("residual")
        cut(other, EXAMPLE, [*cuts[:place], one_block_less[place], *cuts[place + 1 :]])
        assert goal.meter(other) > 30_000


def test_a_goal_out_of_reach_is_refused_with_what_can_be_reached(build: Make) -> None:
    model = build("residual")
    with pytest.raises(StageError, match=r"macs = .* cannot be met: with every layer at layer_limit = 0\.5 it is \d"):
        ranking(model, Prune(macs=0.01, layer_limit=0.5)).reach(model, EXAMPLE, macs_goal(model, EXAMPLE, 0.01))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_ratio_that_would_remove_a_whole_layer_is_refused(scope: Any, build: Make) -> None:
    settings = Prune(ratio=0.95, scope=scope)
    with pytest.raises(InputError, match=r"would remove (the whole layer \S+|whole layers)"):
        ranking(build("residual"), settings).check_share(0.95)


def test_layers_can_be_skipped_by_name(build: Make) -> None:
    model = build("residual")
    found = prunable(model, EXAMPLE, Prune(ratio=0.3, skip=("first*",)))
    assert [group.name for group in found.groups] == ["second.0"]
    with pytest.raises(InputError, match="'frist' matches no layer"):
        prunable(model, EXAMPLE, Prune(ratio=0.3, skip=("frist",)))
    with pytest.raises(InputError, match=r"no channels of the network can be removed: .*skip"):
        prunable(model, EXAMPLE, Prune(ratio=0.3, skip=("*",)))


@pytest.mark.parametrize("kind", ["magnitude", "taylor", "activation", "apoz"])
def test_every_importance_ranks_a_channel_that_does_nothing_last(kind: Any, striped: Make, build: Make) -> None:
    model = build("residual")
    group = next(each for each in find_channels(model, EXAMPLE).groups if each.name == "first.0")
    with torch.no_grad():
        for layer in model.first:  # type: ignore[union-attr]  # a Sequential of this network
            layer.weight[5] = 0  # type: ignore[index]  # as above
        model.first[1].bias[5] = 0  # type: ignore[index, union-attr]  # as above
        model.second[0].weight[:, 5] = 0  # type: ignore[index, union-attr]  # as above
    state = copy.deepcopy(model.state_dict())
    evidence = gather(model, kind, Classification(), striped(), 2)
    scores = channel_scores(model, group, kind, evidence)
    assert scores.shape == (24,)
    assert int(scores.argmin()) == 5
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "ranked_by"), [("structured", "taylor"), ("unstructured", "magnitude"), ("soft", "magnitude")]
)
def test_the_default_importance_follows_the_kind_and_a_named_one_holds(kind: Any, ranked_by: str) -> None:
    assert Prune(kind=kind, ratio=0.5).ranked_by == ranked_by
    assert Prune(kind=kind, ratio=0.5, importance="magnitude").ranked_by == "magnitude"


def test_taylor_importance_estimates_the_loss_of_removing_a_channel(striped: Make, build: Make) -> None:
    """Its claim: channels that it calls important cost more than those it does not, measured one by one."""
    model, data, loss = build("residual"), striped(batch_size=64), Classification()
    batch = next(iter(data.epoch(0)))
    group = next(each for each in find_channels(model, EXAMPLE).groups if each.name == "first.0")
    scores = channel_scores(model, group, "taylor", gather(model, "taylor", loss, data, 1))
    costs = []
    with torch.no_grad():
        whole = float(loss(model, batch)[0])
        for channel in range(group.size):
            trial = copy.deepcopy(model)
            zero_channels(trial, [group], [Cut(group.name, (channel,))])
            costs.append(abs(float(loss(trial, batch)[0]) - whole))
    order = scores.argsort()
    least, most = (sum(costs[int(place)] for place in part) for part in (order[:8], order[-8:]))
    assert most > 1.5 * least


def test_cuts_can_be_replayed_on_the_dense_network(build: Make) -> None:
    one, other = build("concatenated"), build("concatenated")
    steps: list[Cut] = []
    for share in (0.8, 0.6):
        goal = macs_goal(build("concatenated"), EXAMPLE, share)
        cuts = ranking(one, Prune(macs=share)).reach(one, EXAMPLE, goal)
        cut(one, EXAMPLE, cuts)
        steps += cuts
    remove_channels(other, EXAMPLE, steps)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(inputs()), one(inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "activation"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masked_weights_stay_zero_through_training(
    importance: Any, scope: Any, striped: Make, tmp_path: Path, build: Make
) -> None:
    model, data = build("depthwise"), striped()
    settings = Prune(kind="unstructured", ratio=0.8, importance=importance, scope=scope)
    names = maskable(model, settings)
    evidence = gather(model, importance, Classification(), data, 2)
    hook = Masks(choose_masks(weight_scores(model, names, importance, evidence), 0.8, settings))
    hook.apply(model)
    assert sparsity(model, names) == pytest.approx(0.8, abs=0.02)
    before = copy.deepcopy(model.state_dict())
    train(Run(model, Classification(), data, Training(epochs=1, batch_size=16), tmp_path, hooks=[hook]))
    assert sparsity(model, names) == pytest.approx(0.8, abs=0.02)
    for name, mask in hook.masks.items():
        weight = dict(model.named_parameters())[name]
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[name])


def test_masks_remove_the_smallest_weights_and_never_a_whole_layer() -> None:
    scores: Mapping[str, Tensor] = {"a.weight": torch.arange(1.0, 5.0), "b.weight": torch.tensor([0.1, 0.2])}
    whole = choose_masks(scores, 0.5, Prune(kind="unstructured", ratio=0.5, layer_limit=0.5))
    assert whole["a.weight"].tolist() == [False, False, True, True]
    assert whole["b.weight"].tolist() == [False, True]
    with pytest.raises(InputError, match=r"would remove the whole layer b \(2 weights\)"):
        choose_masks(scores, 0.8, Prune(kind="unstructured", ratio=0.8, scope="layer"))
    with pytest.raises(InputError, match="more than layer_limit"):
        choose_masks(scores, 0.95, Prune(kind="unstructured", ratio=0.95))


def test_soft_pruning_zeroes_each_epoch_trains_on_and_loses_nothing_at_the_end(
    striped: Make, tmp_path: Path, build: Make
) -> None:
    model, data = build("residual"), striped()
    settings = Prune(kind="soft", ratio=0.3, scope="layer")
    hook = SoftPruning(prunable(model, EXAMPLE, settings).groups, settings)
    zeroed: list[frozenset[tuple[str, int]]] = []

    class Watched(SoftPruning):
        def epoch_begins(self, model: nn.Module, epoch: int) -> None:
            if epoch:
                zeroed.append(zeros(model))

    watched = Watched(hook._groups, settings)
    train(Run(model, Classification(), data, Training(epochs=3, batch_size=16, lr=0.05), tmp_path, hooks=[watched]))
    assert all(len(each) == len(zeroed[0]) > 0 for each in zeroed)
    cuts = watched.cuts(model)
    assert {(each.layer, channel) for each in cuts for channel in each.channels} == zeros(model)
    with torch.no_grad():
        before = model(inputs())
        cut(model, EXAMPLE, cuts)
        torch.testing.assert_close(model(inputs()), before, rtol=1e-4, atol=1e-5)


def zeros(model: nn.Module) -> frozenset[tuple[str, int]]:
    """The channels of the roots whose weights are all zero."""
    return frozenset(
        (name, channel)
        for name in ("second.0", "first.0")
        for channel, weight in enumerate(model.get_submodule(name).weight)  # type: ignore[arg-type]  # a convolution's
        if not weight.any()
    )


def test_data_of_one_batch_is_enough(striped: Make, build: Make) -> None:
    data: ArrayBatches = striped(batch_size=1000)
    assert data.steps == 1
    evidence = gather(build("residual"), "activation", Classification(), data, 16)
    assert math.isfinite(float(evidence.activations["stem.1"].sum()))


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


class OneSlope(nn.Module):
    """PReLUs with one slope for all channels, as torch makes them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 24, 3, padding=1)
        self.slope, self.slopes, self.head = nn.PReLU(), nn.PReLU(24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slopes(self.second(self.slope(self.first(x)))).mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 32), nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(32, 32, 1, bias=False)
        self.b.weight = self.a.weight
        self.last, self.head = conv(32, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class ChannelsLast(nn.Module):
    """Linear layers over images whose channels lie on the last axis, as in ConvNeXt and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.head((x + self.narrow(F.gelu(self.wide(x)))).mean((1, 2)))


class Rows(nn.Module):
    """Convolutions over one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(24, 32, 3, padding=1), nn.Conv1d(32, 24, 3, padding=1)
        self.norm, self.head = nn.BatchNorm1d(32), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x.flatten(1, 2)))))).mean(2))


class Auxiliary(nn.Module):
    """A second classifier that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 32), conv(32, 24)
        self.head, self.auxiliary = nn.Linear(24, 4), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.parametrize("network", [OneSlope, ChannelsLast, Rows, Auxiliary])
@pytest.mark.parametrize("kind", ["magnitude", "taylor", "activation", "apoz"])
def test_networks_of_many_kinds_are_pruned_and_trained(
    kind: Any, network: type[nn.Module], striped: Make, tmp_path: Path
) -> None:
    model, data, settings = network().eval(), striped(), Prune(ratio=0.3, scope="layer")
    groups = prunable(model, EXAMPLE, settings).groups
    evidence = gather(model, kind, Classification(), data, 2)
    scores = {group.name: channel_scores(model, group, kind, evidence) for group in groups}
    cuts = Ranking(groups, scores, settings).cuts_to(0.3)
    zero_channels(model, groups, cuts)
    with torch.no_grad():
        before = model(inputs())
        cut(model, EXAMPLE, cuts)
        torch.testing.assert_close(model(inputs()), before, rtol=1e-4, atol=1e-5)
    train(Run(model, Classification(), data, Training(epochs=1, batch_size=16), tmp_path))


def test_what_a_part_that_only_trains_reads_is_left_dense() -> None:
    found = find_channels(Auxiliary().eval(), EXAMPLE)
    assert [group.name for group in found.groups] == ["first.0"]
    assert "the network's code" in found.kept["second.0"]


def test_activations_are_averaged_over_everything_but_channels(striped: Make) -> None:
    model, data = ChannelsLast().eval(), striped()
    found = gather(model, "activation", Classification(), data, 1)
    with torch.no_grad():
        values = model.wide(model.stem(next(iter(data.epoch(0))).inputs).permute(0, 2, 3, 1))
    torch.testing.assert_close(found.activations["wide"], values.clamp(min=0).mean((0, 1, 2)))


def test_layers_that_share_weights_keep_their_channels_and_lose_weights_once(striped: Make) -> None:
    model = Tied().eval()
    found = prunable(model, EXAMPLE, Prune(ratio=0.3))
    assert [group.name for group in found.groups] == ["last.0"]
    assert "another layer's" in found.kept["stem.0"]
    settings = Prune(kind="unstructured", ratio=0.5)
    names = maskable(model, settings)
    assert names == ["stem.0.weight", "a.weight", "last.0.weight", "head.weight"]
    Masks(choose_masks(weight_scores(model, names, "magnitude", Evidence()), 0.5, settings)).apply(model)
    assert sparsity(model, names) == pytest.approx(0.5, abs=0.01)
    assert len(weights_file(model)) > 4 * sum(each.numel() for each in model.parameters())


def test_single_weights_are_spared_by_name_and_never_ranked_by_nothing(striped: Make) -> None:
    model = Auxiliary().eval()
    with pytest.raises(InputError, match="'frist' matches no layer"):
        maskable(model, Prune(kind="unstructured", ratio=0.3, skip=("frist",)))
    spared = maskable(model, Prune(kind="unstructured", ratio=0.3, skip=("auxiliary",)))
    assert spared == ["first.0.weight", "second.0.weight", "head.weight"]
    for kind in ("taylor", "activation"):
        evidence = gather(model, kind, Classification(), striped(), 1)  # type: ignore[arg-type]  # kinds of importance
        weight_scores(model, spared, kind, evidence)  # type: ignore[arg-type]  # as above
        with pytest.raises(InputError, match="nothing is known of the weights of auxiliary: they are frozen, or"):
            weight_scores(model, [*spared, "auxiliary.weight"], kind, evidence)  # type: ignore[arg-type]  # as above


def test_a_network_without_anything_to_train_is_refused(build: Make, striped: Make, tmp_path: Path) -> None:
    model = build("residual").requires_grad_(False)
    with pytest.raises(InputError, match=r"nothing to train: none of its .* parameters has requires_grad"):
        gather(model, "taylor", Classification(), striped(), 1)
    with pytest.raises(InputError, match="nothing to train"):
        train(Run(model, Classification(), striped(), Training(epochs=1, batch_size=16), tmp_path))
