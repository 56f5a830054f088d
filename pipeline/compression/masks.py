"""Returns a network of which some weights are zero and stay zero while it is trained (unstructured pruning).

The weights lose their masked values, and after every step of the optimizer they lose them again: momentum cannot bring
them back. Files of such a network are as large as before until they are compressed, and it runs no faster.

All of the share s goes at once, or over T steps of training, of which after step t

    s * (1 - (1 - t / T) ** 3)          (Zhu & Gupta 2017, "To prune, or not to prune")

is gone: much while the network has plenty, little when it has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.channels import LAYERS
from edgeship.pipeline.compression.importance import Evidence, weight_scores
from edgeship.pipeline.compression.loop import Hook
from edgeship.pipeline.compression.structured import check_skip


def maskable(model: nn.Module, settings: Prune) -> list[str]:
    """The names of the weights that may become zero: of convolutions and linear layers, but those in `skip`.

    Weights that several layers share have one name, the first one's. Raises InputError for a `skip` in vain.
    """
    check_skip(model, settings)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, LAYERS)} - set(spared(model, settings))
    return [name for name, _ in model.named_parameters() if name.removesuffix(".weight") in layers]


def spared(model: nn.Module, settings: Prune) -> dict[str, str]:
    """The convolutions and linear layers that keep all their weights, with the reason."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        if any(fnmatchcase(name, each) for each in settings.skip):
            found[name] = f"{name} is in prune.skip"
        elif "weight" not in dict(layer.named_parameters(recurse=False)):
            found[name] = "its weight is no parameter but computed from others, as weight_norm and spectral_norm do"
    return found


def check_ratio(model: nn.Module, names: Sequence[str], ratio: float, scope: Literal["global", "layer"]) -> None:
    """Raises InputError where the share of the named weights that goes is none of them."""
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].numel() for name in names]
    counted = [sum(sizes)] if scope == "global" else sizes
    if sizes and not any(round(ratio * size) for size in counted):
        raise InputError(
            f"prune.ratio = {ratio:g} makes none of the network's {sum(sizes)} weights zero; "
            f"accepted: at least {0.51 / max(counted):.2g}"
        )


def choose_masks(scores: Mapping[str, Tensor], share: float, settings: Prune) -> dict[str, Tensor]:
    """True where a weight stays: the share that goes is the least important, of all or of each layer.

    Ranked together, each layer keeps its best 1 - layer_limit. Raises InputError naming a layer of which nothing would
    be left.
    """
    if not scores:
        raise InputError("prune: the network has no convolution or linear layer whose weights could become zero")
    if settings.scope == "layer":
        masks = {name: values > _largest_gone(values, share) for name, values in scores.items()}
    else:
        if share > settings.layer_limit:
            raise InputError(
                f"prune.ratio = {share} is more than layer_limit = {settings.layer_limit} lets any layer lose; "
                "accepted: a smaller ratio, or a larger layer_limit"
            )
        ranked = {name: _with_safe_best(values, settings.layer_limit) for name, values in scores.items()}
        largest = _largest_gone(torch.cat([each.flatten() for each in ranked.values()]), share)
        masks = {name: values > largest for name, values in ranked.items()}
    for name, mask in masks.items():
        if not mask.any():
            raise InputError(
                f"prune.ratio = {share} would remove the whole layer {name.removesuffix('.weight')} "
                f"({mask.numel()} weights); accepted: a smaller ratio, or the layer in prune.skip"
            )
    return masks


def _with_safe_best(values: Tensor, limit: float) -> Tensor:
    return torch.where(values > _largest_gone(values, limit), torch.inf, values)


def _largest_gone(values: Tensor, share: float) -> Tensor:
    """The largest of the share of the values that goes."""
    count = round(share * values.numel())
    return values.flatten().sort().values[count - 1] if count else values.new_tensor(-torch.inf)


class Masks(Hook):
    """Keeps the masked weights at zero through training."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Sets the masked weights to zero."""
        parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))

    def step_done(self, model: nn.Module) -> None:
        """The optimizer may have moved them."""
        self.apply(model)

    def state(self) -> dict[str, Tensor]:
        """The masks."""
        return dict(self.masks)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The masks of the run that goes on."""
        self.masks = dict(state)


GRADES = 64
"""How often the masks of a gradual pruning are chosen anew."""


class GradualMasks(Masks):
    """Masks that grow over `steps` steps of training until the share `settings.ratio` of the weights is gone.

    The weights are ranked by their size, each time anew; one that is zero stays zero.
    """

    def __init__(self, names: Sequence[str], settings: Prune, steps: int) -> None:
        super().__init__({})
        self._names, self._settings, self._steps, self._done = names, settings, steps, 0

    def step_done(self, model: nn.Module) -> None:
        """More weights go, where it is time."""
        self._done += 1
        every = math.ceil(self._steps / GRADES)
        if self._done == self._steps or (self._done < self._steps and self._done % every == 0):
            self._grow(model)
        super().step_done(model)

    def _grow(self, model: nn.Module) -> None:
        assert self._settings.ratio is not None
        share = self._settings.ratio * (1 - (1 - self._done / self._steps) ** 3)
        scores = weight_scores(model, self._names, "magnitude", Evidence())
        self.masks = choose_masks(scores, share, self._settings)

    def state(self) -> dict[str, Tensor]:
        """The masks, and the steps that are done."""
        return {**super().state(), _DONE: torch.tensor(self._done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        super().restore({name: mask for name, mask in state.items() if name != _DONE})
        self._done = int(state[_DONE])


_DONE = "steps done"


def sparsity(model: nn.Module, names: list[str]) -> float:
    """The share of the named weights that are zero."""
    parameters = dict(model.named_parameters())
    zero = sum(int((parameters[name] == 0).sum()) for name in names)
    return zero / max(1, sum(parameters[name].numel() for name in names))
