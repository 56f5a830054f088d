"""Returns a network of which some weights are zero and stay zero while it is trained (unstructured pruning).

The weights lose their masked values, and after every step of the optimizer they lose them again: momentum cannot bring
them back. Files of such a network are as large as before until they are compressed, and it runs no faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.channels import LAYERS
from edgeship.pipeline.compression.loop import Hook
from edgeship.pipeline.compression.structured import check_skip


def maskable(model: nn.Module, settings: Prune) -> list[str]:
    """The names of the weights that may become zero: of convolutions and linear layers, but those in `skip`.

    Weights that several layers share have one name, the first one's. Raises InputError for a `skip` in vain.
    """
    check_skip(model, settings)
    spared = {name for name, _ in model.named_modules() if any(fnmatchcase(name, each) for each in settings.skip)}
    layers = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    return [
        name for name, _ in model.named_parameters() if name in layers and name.removesuffix(".weight") not in spared
    ]


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


def sparsity(model: nn.Module, names: list[str]) -> float:
    """The share of the named weights that are zero."""
    parameters = dict(model.named_parameters())
    zero = sum(int((parameters[name] == 0).sum()) for name in names)
    return zero / max(1, sum(parameters[name].numel() for name in names))
