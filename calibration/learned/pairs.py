"""Pair-limited integers in torch: the projection of `planning/pair_limit.repair`, with gradients passing straight.

Two weights of one sign that meet in a 16-bit lane may sum to 128 at most (`planning/pair_limit` says why). A pair over
the limit is shrunk to it at the least squared error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.planning.pair_limit import LIMIT


def repaired(places: Tensor, qmax: int) -> Tensor:
    """Integers nearest to `places` (rows, K) within the limit, as floats and without gradient: K in kernel order."""
    width = places.shape[1]
    pairs = F.pad(places.detach(), (0, width % 2)).reshape(places.shape[0], -1, 2)
    sign = torch.where(pairs.sum(-1, keepdim=True) < 0, -1.0, 1.0).to(places.dtype)
    pairs = pairs * sign
    integers = torch.clamp(torch.round(pairs), -qmax, qmax)
    excess = torch.clamp(torch.clamp(integers, min=0).sum(-1) - LIMIT, min=0)
    rest = pairs - integers
    first = torch.round((excess - rest[..., 0] + rest[..., 1]) / 2)
    first = torch.minimum(torch.clamp(first, min=0), excess)
    integers = integers - torch.stack([first, excess - first], -1)
    return (integers * sign).reshape(places.shape[0], -1)[:, :width]


def kernel_rows(weights: Tensor, axis: int, *, conv: bool) -> Tensor:
    """The weights as (rows, K) in the kernel's K order, as `patches.kernel_rows` has it."""
    if conv:
        return weights.movedim(1, -1).reshape(weights.shape[0], -1)
    rows = weights.movedim(axis, -2)
    return rows.reshape(-1, rows.shape[-1])


def from_kernel_rows(rows: Tensor, like: Tensor, axis: int, *, conv: bool) -> Tensor:
    """The inverse of `kernel_rows`."""
    if conv:
        return rows.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return rows.reshape(like.movedim(axis, -2).shape).movedim(-2, axis)
