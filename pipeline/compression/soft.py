"""Returns soft filter pruning: channels are zeroed after each epoch, but go on being trained (He et al. 2018).

A channel that was zeroed by mistake can grow back, so the network keeps its capacity while it learns which channels it
can do without. After the last epoch the channels that are zero then are removed for real. A zeroed channel has zero
weights and no scale and shift in its normalization, so that removing it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.channels import Cut, Group, silence
from edgeship.pipeline.compression.importance import Evidence, channel_scores
from edgeship.pipeline.compression.loop import Hook
from edgeship.pipeline.compression.structured import Ranking


class SoftPruning(Hook):
    """Zeroes the least important channels of each group after each epoch."""

    def __init__(self, groups: Sequence[Group], settings: Prune) -> None:
        self._groups, self._settings = groups, settings

    def cuts(self, model: nn.Module) -> list[Cut]:
        """The channels that are the least important now."""
        assert self._settings.ratio is not None
        return self._ranking(model).cuts(self._settings.ratio)

    def check(self, model: nn.Module) -> None:
        """Raises InputError where the share would remove a whole layer, or nothing."""
        assert self._settings.ratio is not None
        self._ranking(model).check_share(self._settings.ratio)

    def _ranking(self, model: nn.Module) -> Ranking:
        scores = {group.name: channel_scores(model, group, "magnitude", Evidence()) for group in self._groups}
        return Ranking(self._groups, scores, self._settings)

    def epoch_ends(self, model: nn.Module, epoch: int) -> None:
        """Zeroes them."""
        zero_channels(model, self._groups, self.cuts(model))


def zero_channels(model: nn.Module, groups: Sequence[Group], cuts: Sequence[Cut]) -> None:
    """Makes the channels of the cuts compute zero, in every layer that makes them."""
    named = {group.name: group for group in groups}
    for cut in cuts:
        silence(model, named[cut.layer], cut.channels)
