"""Returns the channels to remove so that a goal is met: a share of the channels, MACs, bytes, or measured latency.

All channels are ranked (together, or within each layer), and the share p that goes is the smallest whose network meets
the goal, found by halving. Each layer keeps a multiple of `round_to` channels, and `layer_limit` bounds what one loses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.channels import (
    Channels,
    Cut,
    Group,
    channel_axis,
    channel_weight,
    find_channels,
    output_shapes,
    remove_channels,
)
from edgeship.pipeline.compression.cost import count_cost

HALVINGS = 12
Meter = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Goal:
    """Remove until `meter(model)` is at most `limit`; `name` says what is metered.

    `exact`: it is computed; what is measured takes seconds, and is not the same twice. Of many trials the one that is
    chosen may be one that was measured too fast, so what is chosen last is measured again by `confirm`, with more care.
    """

    name: str
    limit: float
    meter: Meter
    exact: bool = True
    confirm: Meter | None = None

    def met_by(self, model: nn.Module) -> bool:
        """Whether the model meets it as it is, by the most careful meter there is."""
        return (self.confirm or self.meter)(model) <= self.limit


def check_skip(model: nn.Module, settings: Prune) -> None:
    """Nothing. Raises InputError for a glob in `skip` that matches no module: a typo would spare nothing, silently."""
    for each in settings.skip:
        if not any(fnmatchcase(name, each) for name, _ in model.named_modules()):
            raise InputError(f"prune.skip: {each!r} matches no layer of the network")


def prunable(model: nn.Module, example: Tensor, settings: Prune) -> Channels:
    """The groups that may be pruned: all that can be, but those in `skip` and the ones that are small already.

    Raises InputError where there are none.
    """
    found = find_channels(model, example)
    kept = dict(found.kept)
    groups = []
    for group in found.groups:
        makers = [tie.layer for tie in group.ties if tie.output]
        skipped = [name for name in makers if any(fnmatchcase(name, each) for each in settings.skip)]
        if skipped:
            kept[group.name] = f"{skipped[0]} is in prune.skip"
        elif group.size <= settings.round_to:
            kept[group.name] = f"it has {group.size} channels, which is no more than round_to = {settings.round_to}"
        else:
            groups.append(group)
    check_skip(model, settings)
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise InputError(f"no channels of the network can be removed: {reasons or 'it has no layers'}")
    return Channels(tuple(groups), kept)


def sizes_in(dense: nn.Module, groups: Sequence[Group], model: nn.Module) -> dict[str, int]:
    """How many channels the groups of `model` had in the `dense` network that it was cut out of, by name."""
    return {
        group.name: round(group.size * _made_by(dense, group.name) / _made_by(model, group.name)) for group in groups
    }


def _made_by(model: nn.Module, layer: str) -> int:
    """The output channels of a layer."""
    module = model.get_submodule(layer)
    weight = channel_weight(module)
    if weight is None:
        raise ValueError(f"{layer} makes no channels")
    return weight.shape[channel_axis(module, weight, True)]


@dataclass(frozen=True)
class Ranking:
    """The groups of a network with the importance of their channels, and how they are to be pruned.

    `dense`: their sizes before anything was removed, which `layer_limit` is about; the sizes now where it is not told.
    """

    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    settings: Prune
    dense: Mapping[str, int] = field(default_factory=dict)

    def check_share(self, ratio: float) -> None:
        """Raises InputError where the share would remove a whole layer, naming it, or nothing, saying what would."""
        settings = self.settings
        for group in self.groups if settings.scope == "layer" else ():
            left = (1 - ratio) * group.size
            if _rounded(left, settings.round_to) < 1:
                raise InputError(
                    f"prune.ratio = {ratio:g} would remove the whole layer {group.name}: of {group.size} channels "
                    f"{left:.1f} remain, which round_to = {settings.round_to} makes none; "
                    f"accepted: at most {1 - settings.round_to / group.size:.3g}, or a smaller round_to"
                )
        total = sum(group.size for group in self.groups)
        most = sum(len(each.channels) for each in self.cuts(1.0)) / total
        if settings.scope == "global" and ratio > most:
            raise InputError(
                f"prune.ratio = {ratio:g} would remove whole layers: with layer_limit = {settings.layer_limit:g} and "
                f"round_to = {settings.round_to} at most {most:.3f} of the channels can go; "
                "accepted: that, or a larger layer_limit"
            )
        if not self.cuts(ratio):
            raise InputError(
                f"prune.ratio = {ratio:g} removes none of the network's {total} channels, which are kept in multiples "
                f"of round_to = {settings.round_to}; accepted: {self._least_share()} or a smaller round_to"
            )

    def _least_share(self) -> str:
        """The smallest share that removes anything, in words."""
        if not self.cuts(1.0):
            return f"a larger layer_limit than {self.settings.layer_limit:g},"
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cuts(middle) else (middle, high)
        return f"at least {math.ceil(1000 * high) / 1000:.3f},"

    def cuts_to(self, ratio: float) -> list[Cut]:
        """The cuts after which about the share `ratio` of the dense network's channels is gone."""
        if self.settings.scope == "layer":
            return self._cuts({name: (1 - ratio) * size for name, size in self._whole().items()})
        whole, now = sum(self._whole().values()), sum(group.size for group in self.groups)
        more = ratio * whole - (whole - now)
        return self.cuts(more / now) if more > 0 else []

    def _whole(self) -> dict[str, int]:
        """The sizes of the groups before anything was removed."""
        return {group.name: self.dense.get(group.name, group.size) for group in self.groups}

    def cuts(self, share: float) -> list[Cut]:
        """The cuts that remove about the share of the channels there are, the least important first."""
        if self.settings.scope == "layer":
            return self._cuts({group.name: (1 - share) * group.size for group in self.groups})
        every = torch.cat([self.scores[group.name] for group in self.groups]).sort().values
        threshold = every[min(round(share * len(every)), len(every) - 1)]
        return self._cuts({name: float((own >= threshold).sum()) for name, own in self.scores.items()})

    def _cuts(self, left: Mapping[str, float]) -> list[Cut]:
        """The cuts that leave about so many channels of each group."""
        found, whole = [], self._whole()
        for group in self.groups:
            least = fewest_kept(whole[group.name], self.settings)
            keep = max(_rounded(left[group.name], self.settings.round_to), least)
            if keep < group.size:
                gone = torch.sort(self.scores[group.name], stable=True).indices[: group.size - keep]
                found.append(Cut(group.name, tuple(sorted(gone.tolist()))))
        return found

    def reach(self, model: nn.Module, example: Tensor, goal: Goal) -> list[Cut]:
        """The fewest cuts with which the goal is met. Raises StageError where it cannot be, saying what can."""

        def meter(cuts: Sequence[Cut], by: Meter = goal.meter) -> float:
            trial = copy.deepcopy(model)
            remove_channels(trial, example, cuts)
            return by(trial)

        if goal.met_by(model):
            return []
        best = self.cuts(1.0)
        self._check(goal, meter(best))
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            cuts = self.cuts(middle)
            if cuts == best or meter(cuts) <= goal.limit:
                best, high = cuts, middle
            else:
                low = middle
        if goal.confirm is None:
            return best
        least = math.inf
        for cuts in self._ever_larger(best, high):
            least = meter(cuts, goal.confirm)
            if least <= goal.limit:
                return cuts
        raise self._out_of_reach(goal, least)

    def _ever_larger(self, cuts: list[Cut], share: float) -> Iterator[list[Cut]]:
        """The cuts, which are those of the share, and then others up to all that may go."""
        yield cuts
        step = 2.0**-HALVINGS
        while share < 1:
            share, step = min(1.0, share + step), 2 * step
            more = self.cuts(share)
            if more != cuts:
                cuts = more
                yield cuts

    def check_reachable(self, model: nn.Module, example: Tensor, goal: Goal) -> None:
        """Raises StageError where the goal cannot be met, saying what can."""
        trial = copy.deepcopy(model)
        remove_channels(trial, example, self.cuts(1.0))
        self._check(goal, goal.meter(trial))

    def _check(self, goal: Goal, least: float) -> None:
        if least > goal.limit:
            raise self._out_of_reach(goal, least)

    def _out_of_reach(self, goal: Goal, least: float) -> StageError:
        return StageError(
            f"prune: {goal.name} = {goal.limit:.4g} cannot be met: with every layer at layer_limit = "
            f"{self.settings.layer_limit:g} it is {least:.4g}; accepted: that or more, or a larger layer_limit"
        )


def fewest_kept(size: int, settings: Prune) -> int:
    """How many of a layer's channels stay at least: what `layer_limit` leaves, in multiples of `round_to`."""
    least = math.ceil((1 - settings.layer_limit) * size - 1e-9)
    return -(-max(1, least) // settings.round_to) * settings.round_to


def cut(model: nn.Module, example: Tensor, cuts: Sequence[Cut]) -> None:
    """Removes the channels, and makes sure that the network still gives outputs of the same shape."""
    shapes = output_shapes(model, example)
    remove_channels(model, example, cuts)
    try:
        after = output_shapes(model, example)
    except Exception as error:  # a user's code raises what it likes
        raise StageError(f"prune: the pruned network does not run: {type(error).__name__}: {error}") from error
    if after != shapes:
        raise StageError(f"prune: the pruned network's outputs have the shapes {after} instead of {shapes}")


def macs_goal(model: nn.Module, example: Tensor, share: float) -> Goal:
    """At most this share of the model's multiply-accumulates."""
    dense = count_cost(model, example).macs
    return Goal("macs", share * dense, lambda pruned: float(count_cost(pruned, example).macs))


def bytes_goal(limit: float) -> Goal:
    """At most this many bytes of float32 weights."""
    return Goal("max_bytes", limit, lambda pruned: 4.0 * sum(each.numel() for each in pruned.parameters()))


def _rounded(count: float, multiple: int) -> int:
    return int(count / multiple + 0.5) * multiple
