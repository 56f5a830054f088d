"""Returns a network whose BatchNorm layers see the global batch when several processes train it.

torch's SyncBatchNorm does so on GPUs and refuses CPUs; there the same statistics are summed over the processes here:

    mean = sum(x) / n,    var = sum((x - mean)^2) / n,    n: values of a channel in all processes together
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeship.calibration.errors import InputError

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronize_batch_norm(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model itself with its BatchNorm layers' forward passes synchronized; unchanged in a single process.

    The layers stay what they are, so that the weights keep their names and the model can be exported.
    """
    if accelerator.num_processes == 1:
        return model
    for layer in model.modules():
        if isinstance(layer, KINDS):
            layer.__dict__["forward"] = _Synchronized(layer)  # of this instance alone, until `release_batch_norm`
    return model


def release_batch_norm(model: nn.Module) -> None:
    """Gives the layers their own forward pass back."""
    for layer in model.modules():
        if isinstance(layer.__dict__.get("forward"), _Synchronized):
            del layer.__dict__["forward"]


@contextmanager
def told_of_single_values(where: str, size: int) -> Iterator[None]:
    """A forward pass of the batch that `where` names, of `size` samples.

    Raises InputError where a channel of it has a single value, which has no variance.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"{where}: a batch of {size} has a single value in a channel of a BatchNorm layer, and its variance is "
            "taken over several; accepted: batches of 2 samples or more (a DataLoader with drop_last = True)"
        ) from error


class _Synchronized:
    """A BatchNorm layer's forward pass over all processes."""

    def __init__(self, layer: _BatchNorm) -> None:
        self._layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Synchronized:
        """The pass of the copied layer."""
        copied = memo.get(id(self._layer))
        return _Synchronized(copied if copied is not None else self._layer)

    def __call__(self, values: Tensor) -> Tensor:
        layer = self._layer
        if not layer.training:
            return F.batch_norm(
                values, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps
            )
        values = values.float()  # sums over many processes overflow in half precision
        axes = [axis for axis in range(values.dim()) if axis != 1]
        count = values.new_tensor(float(values.numel() // values.shape[1]))
        total, count = _summed(values.sum(axes)), _summed(count)
        shape = (1, -1, *(1,) * (values.dim() - 2))
        centred = values - (total / count).view(shape)
        variance = _summed((centred**2).sum(axes)) / count
        self._track(total.detach() / count, variance.detach() * count / (count - 1))
        scaled = centred * torch.rsqrt(variance + layer.eps).view(shape)
        if not layer.affine:
            return scaled
        return scaled * layer.weight.view(shape) + layer.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        layer = self._layer
        if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
            return
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked += 1
        momentum = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked or 1)
        layer.running_mean.lerp_(mean, momentum)
        layer.running_var.lerp_(variance, momentum)


def _summed(values: Tensor) -> Tensor:
    """The sum over all processes; gradients flow back to each."""
    return cast(Tensor, _SumOverProcesses.apply(values))  # type: ignore[no-untyped-call]  # torch has no types here


class _SumOverProcesses(torch.autograd.Function):
    """y = sum of x over the processes, so the gradient of each x is the sum of all gradients of y."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        """The sum."""
        return _all_reduced(values)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        """The sum of the gradients."""
        return _all_reduced(gradient)


def _all_reduced(values: Tensor) -> Tensor:
    total = values.contiguous().clone()
    torch.distributed.all_reduce(total)
    return total
