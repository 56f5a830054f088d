"""Returns how important weights and channels are, from the weights, the gradients of the loss, or the activations.

For a weight w with gradient g, summed over the channel's weights:

    magnitude     |w|                                        (Li et al. 2017)
    taylor        |w * g|, g over some training batches      (Molchanov et al. 2019, first order)
    activation    mean of relu(a) over data                  (Polyak & Wolf 2015)
    apoz          share of a > 0 over data                   (Hu et al. 2016: 1 - average percentage of zeros)

a: a channel's values after its normalization. A group's score is the mean over its layers; each layer is divided by its
mean first, so that layers can be ranked against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Importance
from edgeship.pipeline.compression.batches import Batch, Batches
from edgeship.pipeline.compression.channels import LAYERS, Group, Tie, channel_axis, channel_weight
from edgeship.pipeline.compression.checkpoint import seeded
from edgeship.pipeline.compression.loop import Loss, process_state
from edgeship.pipeline.compression.optimizer import check_trainable


@dataclass(frozen=True)
class Evidence:
    """What importance is computed from: `gradients` by parameter name, mean `activations` and `positive` shares of
    output channels by layer, and the mean size of input channels by layer; empty where the kind does not need it.
    """

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    positive: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Evidence:
        """The same on another device."""
        return Evidence(
            *({name: each.to(device) for name, each in getattr(self, one.name).items()} for one in fields(self))
        )


def gather(model: nn.Module, kind: Importance, loss: Loss, data: Batches, batches: int) -> Evidence:
    """What `kind` needs, from the first batches of the data, which are the same each time; the model stays as it is.

    It is computed on the fastest device there is, and returned on the model's.
    """
    chosen = islice(data.epoch(0), batches)
    if kind == "magnitude":
        return Evidence()
    training, home = model.training, next(model.parameters()).device
    model.to(process_state().device).eval()  # statistics of normalization stay as they are
    try:
        with seeded():
            found = _gradients(model, loss, chosen) if kind == "taylor" else _activations(model, chosen)
    finally:
        model.to(home).train(training)
    return found.to(home)


def _gradients(model: nn.Module, loss: Loss, data: Iterator[Batch]) -> Evidence:
    check_trainable(model)
    device = next(model.parameters()).device
    model.zero_grad()
    for batch in data:
        loss(model, batch.to(device))[0].backward()  # type: ignore[no-untyped-call]  # torch has no types here
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return Evidence(gradients=found)


@torch.no_grad()
def _activations(model: nn.Module, data: Iterator[Batch]) -> Evidence:
    device = next(model.parameters()).device
    sums: dict[str, dict[str, Tensor]] = {"activations": {}, "positive": {}, "inputs": {}}
    counts: dict[str, int] = {}

    def look(name: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        counts[name] = counts.get(name, 0) + 1
        for kind, values in (
            ("activations", outputs.clamp(min=0)), ("positive", (outputs > 0).float()), ("inputs", inputs.abs())
        ):  # fmt: skip
            mean = _per_channel(layer, values)
            sums[kind][name] = sums[kind].get(name, torch.zeros_like(mean)) + mean

    with _watched(model, look):
        for batch in data:
            model(batch.inputs.to(device))
    return Evidence(**{kind: {n: s / counts[n] for n, s in each.items()} for kind, each in sums.items()})


def _per_channel(layer: nn.Module, values: Tensor) -> Tensor:
    axis = values.dim() - 1 if isinstance(layer, nn.Linear) else 1
    return values.float().mean([place for place in range(values.dim()) if place != axis])


@contextmanager
def _watched(model: nn.Module, look: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """The model with `look(name, layer, inputs, outputs)` called for every layer that runs."""
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, (*LAYERS, _BatchNorm)):

            def hook(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor, name: str = name) -> None:
                look(name, layer, inputs[0], outputs)

            handles.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_scores(model: nn.Module, group: Group, kind: Importance, evidence: Evidence) -> Tensor:
    """The importance of each channel of the group (size,)."""
    layers = dict(model.named_modules())
    total = torch.zeros(group.size)
    count = 0
    for tie in _telling(group, layers, kind):
        values = _layer_scores(layers[tie.layer], tie, kind, evidence)
        if values is None:
            continue
        scores = torch.zeros(group.size).index_add_(0, torch.tensor(tie.roots), values[list(tie.channels)])
        if scores.sum() > 0:
            total += scores / scores.mean()
        count += 1
    if not count:
        raise InputError(f'prune.importance = "{kind}": nothing is known of the channels of {group.name}')
    return total / count


def _telling(group: Group, layers: Mapping[str, nn.Module], kind: Importance) -> Sequence[Tie]:
    """The ties that tell something: for activations what makes the channels, after normalization where there is one."""
    if kind in ("magnitude", "taylor"):
        return group.ties
    makers = [tie for tie in group.ties if tie.output]
    return [tie for tie in makers if isinstance(layers[tie.layer], _BatchNorm)] or makers


def _layer_scores(layer: nn.Module, tie: Tie, kind: Importance, evidence: Evidence) -> Tensor | None:
    """One number for each output (or input) channel of the layer; None for layers without weights or evidence."""
    if kind in ("activation", "apoz"):
        found = (evidence.activations if kind == "activation" else evidence.positive).get(tie.layer)
        return None if found is None else found.cpu()
    weight = channel_weight(layer)
    if weight is None or (weight.dim() == 1 and not tie.output):
        return None
    values = weight.detach().abs()
    if kind == "taylor":
        gradient = evidence.gradients.get(f"{tie.layer}.weight")
        if gradient is None:
            return None
        values = (weight.detach() * gradient).abs()
    axis = channel_axis(layer, weight, tie.output)
    return values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1).float().cpu()


def weight_scores(model: nn.Module, names: Sequence[str], kind: Importance, evidence: Evidence) -> dict[str, Tensor]:
    """The importance of each weight, by parameter name.

    activation: |w| times the mean size of the input channel it reads (Sun et al. 2023). Raises InputError for kinds
    that rank channels only, and for layers of which the data told nothing.
    """
    if kind == "apoz":
        raise InputError(
            'prune.importance = "apoz" ranks channels; accepted for single weights: magnitude, taylor, activation'
        )
    scores = {}
    parameters = dict(model.named_parameters())
    layers = dict(model.named_modules())
    for name in names:
        weight = parameters[name].detach()
        layer = name.removesuffix(".weight")
        if kind == "magnitude":
            scores[name] = weight.abs()
            continue
        seen = evidence.gradients.get(name) if kind == "taylor" else evidence.inputs.get(layer)
        if seen is None:
            raise InputError(
                f'prune.importance = "{kind}": nothing is known of the weights of {layer}: they are frozen, or no '
                'sample gets there; accepted: the layer in prune.skip, or importance = "magnitude"'
            )
        scores[name] = weight.abs() * (seen.abs() if kind == "taylor" else _input_sizes(layers[layer], weight, seen))
    return scores


def _input_sizes(layer: nn.Module, weight: Tensor, sizes: Tensor) -> Tensor:
    """The mean size of the input channel that each weight reads, in a shape that multiplies with the weights."""
    if isinstance(layer, nn.ConvTranspose2d):
        return sizes.view(-1, 1, 1, 1)
    groups = int(getattr(layer, "groups", 1))
    each = sizes.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
    return each.view(*each.shape, *(1,) * (weight.dim() - 2))
