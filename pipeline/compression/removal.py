"""Returns what a network can do without: residual blocks and channels, chosen one after the other by measured loss.

    candidates    each residual block; with kind = "mixed" also the `round_to` least important channels of each group
    next to go    the one with the least  rise^0.6 * parameters^0.4 / what it saves,
                  rise = max(0, loss without it - loss so far)

What it saves is what is left in its layers of that which the goal is about: parameters for a size, multiply-accumulates
for MACs and latency; each block counts alike for a share of the blocks. The rise is what a removal costs at once. What
training wins back of it depends on what is left to learn with, so of two removals that cost and save the same, the one
with fewer parameters goes first (where parameters are what is saved, that changes nothing).

The more is gone, the more the rest matters, so a rise measured earlier is taken for a lower bound of the rise now: only
where it is below the best one measured now is a candidate measured again (lazy evaluation: Minoux 1978, "Accelerated
greedy algorithms for maximizing submodular set functions").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain, islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.batches import Batch, Batches
from edgeship.pipeline.compression.blocks import find_blocks, remove_blocks, without_blocks
from edgeship.pipeline.compression.candidates import Candidate, Extent, Supply, at_home, is_in
from edgeship.pipeline.compression.channels import Cut, makers_of
from edgeship.pipeline.compression.checkpoint import seeded
from edgeship.pipeline.compression.fading import Leaving
from edgeship.pipeline.compression.importance import channel_scores, gather
from edgeship.pipeline.compression.loop import Loss, make_accelerator, process_state
from edgeship.pipeline.compression.structured import Goal, check_skip, cut, fewest_kept, prunable, sizes_in
from edgeship.pipeline.compression.synchronized import told_of_single_values

Tell = Callable[[int, int, str], None]


PARAMETERS_COUNT = 0.4
"""The exponent of the parameters that go with a candidate, in `rise^0.6 * parameters^0.4`.

Chosen on one ResNet-56 by what goes; neither 0.25 nor 0.5 was trained. Figures with 0.4: docs/compression.md.
"""


@dataclass(frozen=True)
class Removed:
    """Blocks that are taken out, and channels that are cut from what is left then.

    `left_dense`: the layers whose channels had to stay, with the reason.
    """

    blocks: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    left_dense: Mapping[str, str] = field(default_factory=dict)

    def take_from(self, model: nn.Module, example: Tensor) -> None:
        """Changes the model in place. Raises InputError for a block, StageError for channels it cannot go without."""
        remove_blocks(model, self.blocks)
        cut(model, example, self.cuts)

    def leaving(self, model: nn.Module, example: Tensor) -> Leaving:
        """What of the model's computation goes."""
        with without_blocks(model, self.blocks):
            channels = makers_of(model, example, self.cuts)
        return Leaving(self.blocks, channels)


@dataclass(frozen=True)
class Removal:
    """Takes the least important blocks and channels out, one after the other, until enough is gone.

    `dense`: the network before anything was removed from it, which `layer_limit` is about; the model where it is none.
    """

    model: nn.Module
    example: Tensor
    settings: Prune
    precision: str = "float32"
    tell: Tell = lambda _done, _total, _what: None
    dense: nn.Module | None = None

    def blocks(self) -> list[str]:
        """The blocks that may go. Raises InputError where there are none."""
        found = find_blocks(self.model, self.example)
        check_skip(self.model, self.settings)
        left = [name for name in found if not any(fnmatchcase(name, each) for each in self.settings.skip)]
        if not left and self.settings.kind == "blocks":
            reason = "prune.skip spares them all" if found else "no module gives back its input when its weights are 0"
            raise InputError(
                f'prune.kind = "blocks" removes residual blocks, and the network has none to remove: {reason}; '
                'accepted: kind = "structured" for its channels'
            )
        return left

    def count(self, number: int, loss: Loss, data: Batches) -> Removed:
        """Without `number` blocks. Raises InputError where that would be all of them."""
        names = self.blocks()
        if number >= len(names):
            raise InputError(
                f"prune.ratio = {self.settings.ratio:g} would remove all {len(names)} residual blocks; "
                f"accepted: at most {(len(names) - 1) / len(names):.3g}"
            )
        order = islice(self._in_order(Supply(names), loss, data), number)
        return Removed(tuple(each.name for each in order))

    def reach(self, goal: Goal, loss: Loss, data: Batches, last: Goal | None = None) -> Removed:
        """As little as meets the goal. Raises StageError where it, or that of the last step, is out of reach."""
        blocks = self.blocks()
        if goal.met_by(self.model):
            return Removed()
        supply = self._with_channels(blocks, loss, data) if self.settings.kind == "mixed" else Supply(list(blocks))
        self._check_reachable(last or goal, supply)
        order = self._in_order(supply, loss, data)
        gone: list[Candidate] = []
        fit, least = 0, math.inf
        while not fit and (more := list(islice(order, max(1, len(gone))))):  # 1, 2, 4, 8 ...: metering takes its time
            gone += more
            least = self._metered(goal, gone)
            fit = len(gone) if least <= goal.limit else 0
        if not fit:  # what is measured is not the same twice
            raise self._out_of_reach(goal, least, blocks)
        short = fit // 2  # so many were not enough
        while fit - short > 1:
            middle = (short + fit) // 2
            if self._metered(goal, gone[:middle]) <= goal.limit:
                fit = middle
            else:
                short = middle
        if goal.confirm is None:
            needed = self._needed(goal, gone[:fit])
        else:
            needed = self._confirmed(replace(goal, meter=goal.confirm), gone[:fit], chain(gone[fit:], order), blocks)
        return replace(_removed(needed), left_dense=supply.left_dense)

    def _check_reachable(self, goal: Goal, supply: Supply) -> None:
        """Before anything is tried, which takes its time: whether all that may go would be enough."""
        rest = replace(supply, blocks=list(supply.blocks), groups=dict(supply.groups), orders=dict(supply.orders))
        everything = []
        while candidates := rest.candidates():
            everything.append(candidates[0])
            rest.take(candidates[0])
        least = self._metered(goal, everything)
        if least > goal.limit:
            raise self._out_of_reach(goal, least, supply.blocks)

    def _out_of_reach(self, goal: Goal, least: float, blocks: Sequence[str]) -> StageError:
        return StageError(
            f"prune: {goal.name} = {goal.limit:.4g} cannot be met: without {self._all_of_it(blocks)} it is "
            f"{least:.4g}; accepted: that or more"
        )

    def _needed(self, goal: Goal, gone: Sequence[Candidate]) -> list[Candidate]:
        """Those of `gone` without which the goal is missed: what came last may save more than was left to save.

        The dearest, which went last, come back first. What is measured is not asked so often.
        """
        needed = list(gone)
        for each in reversed(gone[:-1]) if goal.exact else ():
            rest = [other for other in needed if other is not each]
            if self._metered(goal, rest) <= goal.limit:
                needed = rest
        return needed

    def _confirmed(
        self, goal: Goal, gone: Sequence[Candidate], more: Iterator[Candidate], blocks: Sequence[str]
    ) -> list[Candidate]:
        """The removals, and of `more` as many as it takes until the goal is met by its own careful meter."""
        chosen, step = list(gone), 1
        while (least := self._metered(goal, chosen)) > goal.limit:
            added = list(islice(more, step))
            if not added:
                raise self._out_of_reach(goal, least, blocks)
            chosen, step = chosen + added, 2 * step
        return chosen

    def _metered(self, goal: Goal, gone: Sequence[Candidate]) -> float:
        trial = copy.deepcopy(self.model)
        _removed(gone).take_from(trial, self.example)
        return goal.meter(trial)

    def _all_of_it(self, blocks: Sequence[str]) -> str:
        if self.settings.kind == "blocks":
            return f"any of the {len(blocks)} residual blocks"
        limits = f"layer_limit = {self.settings.layer_limit:g} and round_to = {self.settings.round_to}"
        return f"its {len(blocks)} residual blocks and with every layer at {limits}"

    def _with_channels(self, blocks: list[str], loss: Loss, data: Batches) -> Supply:
        """The blocks, and the channels that can go, whichever blocks have gone before."""
        found = prunable(self.model, self.example, self.settings)
        homes = [at_home(each, blocks, self.model) for each in found.groups]
        groups = {each.name: each for each in homes if each is not None}
        kind = self.settings.ranked_by
        evidence = gather(self.model, kind, loss, data, self.settings.batches)
        scores = {name: channel_scores(self.model, group, kind, evidence) for name, group in groups.items()}
        orders = {name: torch.sort(each, stable=True).indices.tolist() for name, each in scores.items()}
        whole = sizes_in(self.dense or self.model, list(groups.values()), self.model)
        fewest = {name: fewest_kept(size, self.settings) for name, size in whole.items()}
        return Supply(list(blocks), groups, orders, self.settings.round_to, fewest, found.kept)

    def _in_order(self, supply: Supply, loss: Loss, data: Batches) -> Iterator[Candidate]:
        """What goes first, second, ...: the module's docstring says how it is chosen."""
        extent, size = (Extent(self.model, self.example, unit) for unit in (self._unit(), "parameters"))
        device = process_state().device
        trial = _with_batch_statistics(copy.deepcopy(self.model).to(device))
        with seeded():
            batches = [each.to(device) for each in islice(data.epoch(0), self.settings.batches)]
        bounds: dict[str, float] = {}
        tried, chosen, before = "blocks and channels" if supply.groups else "blocks", 0, math.nan
        while candidates := supply.candidates():
            with make_accelerator(self.precision).autocast():  # closed at each yield: others export and measure then
                before = before if chosen else _mean_loss(trial, loss, batches)
                costs: dict[Candidate, float] = {}
                best: tuple[float, float, int] | None = None
                place_of = {each: place for place, each in enumerate(candidates)}
                for done, each in enumerate(sorted(candidates, key=lambda one: bounds.get(one.key, -1.0)), 1):
                    if best is not None and bounds.get(each.key, -1.0) > best[0]:
                        break
                    with each.without(trial):
                        costs[each] = _mean_loss(trial, loss, batches)
                    saved, rise = extent.saved(each), max(0.0, costs[each] - before)
                    cost = rise ** (1 - PARAMETERS_COUNT) * size.saved(each) ** PARAMETERS_COUNT
                    rank = (cost / saved, -saved, place_of[each])  # where the loss falls, what saves most goes first
                    bounds[each.key] = rank[0]
                    best = rank if best is None else min(best, rank)
                    self.tell(done, len(candidates), f"{tried} tried, {chosen} chosen")
            assert best is not None
            taken = candidates[best[2]]
            before = costs[taken]
            taken.take_from(trial)
            extent.take(taken)
            size.take(taken)
            supply.take(taken)
            chosen += 1
            yield taken

    def _unit(self) -> Literal["blocks", "parameters", "macs"]:
        if self.settings.ratio is not None:
            return "blocks"
        return "macs" if self.settings.max_bytes is None else "parameters"


def _removed(gone: Sequence[Candidate]) -> Removed:
    blocks = tuple(each.name for each in gone if each.group is None)
    channels: dict[str, list[int]] = {}
    for each in gone:
        if each.group is not None and not any(is_in(each.name, block) for block in blocks):
            channels.setdefault(each.name, []).extend(each.channels)
    return Removed(blocks, tuple(Cut(name, tuple(sorted(found))) for name, found in channels.items()))


@torch.no_grad()
def _mean_loss(model: nn.Module, loss: Loss, batches: Sequence[Batch]) -> float:
    total = 0.0
    for place, batch in enumerate(batches, 1):
        with told_of_single_values(f"ranking, batch {place}", len(batch.inputs)):
            total += float(loss(model, batch)[0])
    return total / len(batches)


def _with_batch_statistics(model: nn.Module) -> nn.Module:
    """The model in eval mode, as it would be after its first steps of training.

    BatchNorm computes with the statistics of the batch: those that it kept are of a network that was whole, and most of
    what a removal does to the loss is that they are wrong, which training mends at once (Li et al. 2020, "EagleEye:
    fast sub-net evaluation for efficient neural network pruning"). The kept ones stay as they are.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
            layer.momentum = 0.0
    return model
