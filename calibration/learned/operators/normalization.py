"""Normalizations, with the statistics of the trained model: nothing here updates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator


def _per_channel(values: Tensor, rank: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (rank - 2))


def _batch(call: Call) -> Tensor:
    if call.outputs > 1 or call.get("training_mode", 0):
        raise call.refuse("training mode", "inference, with the stored mean and variance")
    x = call.tensor()
    scale, bias, mean, variance = (_per_channel(call.tensor(i), x.ndim) for i in range(1, 5))
    return (x - mean) / torch.sqrt(variance + call.get("epsilon", 1e-5)) * scale + bias


def _layer(call: Call) -> Sequence[Tensor]:
    x = call.tensor()
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    deviation = torch.sqrt(centred.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    y = centred / deviation * call.tensor(1)
    bias = call.optional(2)
    return (y if bias is None else y + bias), mean, 1 / deviation


def _rms(call: Call) -> Tensor:
    x = call.tensor()
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    mean = x.square().mean(axes, keepdim=True)
    return x / torch.sqrt(mean + call.get("epsilon", 1e-5)) * call.tensor(1)


def _instance(call: Call) -> Tensor:
    x = call.tensor()
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    y = centred / torch.sqrt(variance + call.get("epsilon", 1e-5))
    return y * _per_channel(call.tensor(1), x.ndim) + _per_channel(call.tensor(2), x.ndim)


def _group(call: Call) -> Tensor:
    x, groups = call.tensor(), int(call.get("num_groups"))
    scale, bias = call.tensor(1), call.tensor(2)
    if scale.numel() == groups != x.shape[1]:  # opset 18 had one pair per group
        scale, bias = (values.repeat_interleave(x.shape[1] // groups) for values in (scale, bias))
    return F.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


def _local_response(call: Call) -> Tensor:
    size = int(call.get("size"))
    x = call.tensor()
    before = (size - 1) // 2
    squares = x.square().movedim(1, -1)
    windows = F.pad(squares, (before, size - 1 - before)).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    base = float(call.get("bias", 1.0)) + float(call.get("alpha", 1e-4)) / size * windows
    return x / torch.pow(base, float(call.get("beta", 0.75)))


OPERATORS: Mapping[str, Operator] = {
    "BatchNormalization": _batch,
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LRN": _local_response,
    "LayerNormalization": _layer,
    "RMSNormalization": _rms,
}
