"""Returns which channels of a network can be removed together, and removes them.

A channel of one layer is tied to channels of others: through additions, concatenations, depthwise convolutions and
normalization. Torch-Pruning traces these dependencies; here they are put to the test as well: a group counts as
prunable only when removing channels that nothing reads, and that compute zero, leaves every output as it was. Code that
has channel counts written into it (a shortcut padded by a constant, a reshape) is found this way and left dense, and so
is what parts that run in training alone (auxiliary classifiers) read: tracing does not see them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from edgeship.calibration.errors import StageError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
"""The layers whose output channels are removed; others follow."""


@dataclass(frozen=True)
class Tie:
    """A layer's channels that belong to a group: `channels[i]` goes with channel `roots[i]` of the group.

    `output`: they are output channels of the layer (or of a normalization); else channels of its input.
    """

    layer: str
    output: bool
    channels: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that go or stay together, named by the first layer that makes them."""

    name: str
    size: int
    ties: tuple[Tie, ...]


@dataclass(frozen=True)
class Cut:
    """Channels of a group that are removed; the numbers are those at the time of the cut."""

    layer: str
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """The prunable groups of a network, and the layers whose channels have to stay, with the reason."""

    groups: tuple[Group, ...]
    kept: Mapping[str, str]


def find_channels(model: nn.Module, example: Tensor) -> Channels:
    """The groups that can be pruned, in the order of the model's layers; the model is not changed."""
    graph = _trace(model, example)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    groups, kept = [], {}
    for group in sorted(_all_groups(graph, model), key=lambda each: order[each.name]):
        reason = _why_kept(model, group)
        if reason is None:
            groups.append(group)
        else:
            kept[group.name] = reason
    bad = _failing(model, example, groups, _runs_in_training(copy.deepcopy(model), example))
    for name in sorted(bad):
        kept[name] = "the network's code, its output or a normalization depends on the number of these channels"
    return Channels(tuple(group for group in groups if group.name not in bad), kept)


def remove_channels(model: nn.Module, example: Tensor, cuts: Sequence[Cut]) -> None:
    """Removes channels from the model, in place and for real, with everything that depends on them."""
    if not cuts:
        return
    graph = _trace(model, example)
    layers = dict(model.named_modules())
    with _quiet():
        for cut in cuts:
            layer = layers[cut.layer]
            function = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, function, list(cut.channels)).prune()


def makers_of(model: nn.Module, example: Tensor, cuts: Sequence[Cut]) -> dict[str, list[int]]:
    """Of each layer that makes or normalizes channels of the cuts, the numbers of those that go."""
    if not cuts:
        return {}
    graph = _trace(model, example)
    layers, found = dict(model.named_modules()), dict[str, set[int]]()
    names = {layer: name for name, layer in layers.items()}
    for cut in cuts:
        layer = layers[cut.layer]
        with _quiet():
            function = graph.get_pruner_of_module(layer).prune_out_channels
            group = graph.get_pruning_group(layer, function, list(cut.channels))
        for item in group.items:
            name = names.get(item.dep.target.module)
            if name is not None and graph.is_out_channel_pruning_fn(item.dep.handler):
                found.setdefault(name, set()).update(item.idxs)
    return {name: sorted(channels) for name, channels in found.items()}


def output_shapes(model: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    """The shapes of the tensors the model returns for the example, in eval mode."""
    training = model.training
    with torch.no_grad():
        found = [tuple(each.shape) for each in _tensors(model.eval()(example))]
    model.train(training)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _trace(model: nn.Module, example: Tensor) -> Any:
    """Torch-Pruning's dependency graph of the model."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    training = model.training
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)  # it follows gradients
        with _quiet(), torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(model.eval(), example_inputs=example)
    except Exception as error:  # it raises what it likes on code it cannot follow
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise StageError(
            f"the network's channels cannot be traced: {type(error).__name__}: {reason}; "
            'accepted: networks of plain layers; prune.kind = "unstructured" works on any'
        ) from error
    finally:
        model.train(training)
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning's remarks on parameters outside layers, which stay as they are
        yield


def _all_groups(graph: Any, model: nn.Module) -> Iterator[Group]:
    names = {layer: name for name, layer in model.named_modules()}
    with _quiet():
        for found in graph.get_all_groups(root_module_types=list(LAYERS)):
            ties = []
            for item in found.items:
                name = names.get(item.dep.target.module)
                if name is not None and isinstance(item.dep.target.module, nn.Module):
                    output = bool(graph.is_out_channel_pruning_fn(item.dep.handler))
                    ties.append(Tie(name, output, tuple(item.idxs), tuple(item.root_idxs)))
            yield Group(ties[0].layer, len(ties[0].channels), tuple(ties))


def _why_kept(model: nn.Module, group: Group) -> str | None:
    layers = dict(model.named_modules())
    shared = _sharing(model)
    for tie in group.ties:
        if tie.layer in shared:
            return f"{tie.layer} has weights that are another layer's as well"
        layer = layers[tie.layer]
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and 1 < groups < layer.out_channels:
            return f"{tie.layer} is a convolution of {groups} groups"
        if isinstance(layer, nn.GroupNorm):
            return f"{tie.layer} normalizes channels in groups"
        if isinstance(layer, nn.MultiheadAttention):
            return f"{tie.layer} splits its channels among heads"
    return None


def _sharing(model: nn.Module) -> set[str]:
    """The modules with a parameter that another module holds too."""
    holders: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _failing(model: nn.Module, example: Tensor, groups: Sequence[Group], trains: bool) -> set[str]:
    """The groups that cannot be removed from without changing what the others compute, found by halving."""
    if not groups or _still_equal(model, example, groups, trains):
        return set()
    if len(groups) == 1:
        return {groups[0].name}
    middle = len(groups) // 2
    return {name for part in (groups[:middle], groups[middle:]) for name in _failing(model, example, part, trains)}


def _still_equal(model: nn.Module, example: Tensor, groups: Sequence[Group], trains: bool) -> bool:
    """Whether every other channel of the groups can be removed: silenced first, that must change no output.

    `trains`: the whole network runs in training mode, and so must the smaller one.
    """
    trial = copy.deepcopy(model).eval()
    cuts = [Cut(group.name, tuple(range(0, group.size, 2))) for group in groups if group.size > 1]
    values = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    try:
        for group, cut in zip((each for each in groups if each.size > 1), cuts, strict=True):
            silence(trial, group, cut.channels, readers=True)
        with torch.no_grad():
            before = list(_tensors(trial(values)))
            remove_channels(trial, example, cuts)
            after = list(_tensors(trial(values)))
        equal = len(before) == len(after) and all(
            one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
            for one, other in zip(before, after, strict=True)
        )
    except Exception:  # whatever a user's code raises for a number of channels it does not expect
        return False
    return equal and (not trains or _runs_in_training(trial, example))


@torch.no_grad()
def _runs_in_training(model: nn.Module, example: Tensor) -> bool:
    """Whether a batch of two goes through the model in training mode, whose statistics it moves."""
    with torch.random.fork_rng():
        try:
            model.train()(torch.cat([example, example]))
        except Exception:  # as above
            return False
    return True


@torch.no_grad()
def silence(model: nn.Module, group: Group, channels: Sequence[int], *, readers: bool = False) -> None:
    """Makes channels of the group compute zero, in every layer that makes them; with `readers` nothing reads them."""
    layers = dict(model.named_modules())
    gone = set(channels)
    for tie in group.ties:
        chosen = [channel for channel, root in zip(tie.channels, tie.roots, strict=True) if root in gone]
        layer = layers[tie.layer]
        weight, bias = channel_weight(layer), getattr(layer, "bias", None)
        if weight is not None and (tie.output or readers):
            weight.index_fill_(channel_axis(layer, weight, tie.output), torch.tensor(chosen, device=weight.device), 0.0)
        if isinstance(bias, Tensor) and tie.output:
            bias.index_fill_(0, torch.tensor(chosen, device=bias.device), 0.0)


def channel_weight(layer: nn.Module) -> Tensor | None:
    """The weight with which a layer makes, reads or scales channels; None where it has none.

    The slopes of a PReLU are no such weight: what is zero stays zero whatever they are, and one may serve all channels.
    """
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and not isinstance(layer, nn.PReLU) else None


def channel_axis(layer: nn.Module, weight: Tensor, output: bool) -> int:
    """The axis of the layer's weight that its output (or input) channels lie on."""
    if weight.dim() == 1 or getattr(layer, "groups", 1) > 1:
        return 0  # normalization; depthwise, whose input and output channels are the same
    return 0 if output != isinstance(layer, nn.ConvTranspose2d) else 1
