"""Reductions over axes; the axes are an attribute in old opsets and an input in new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduce(function: Reduction) -> Operator:
    def apply(call: Call) -> Tensor:
        x = call.tensor()
        axes = call.ints(1, "axes")
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        return function(x, tuple(axis % x.ndim for axis in axes), bool(call.get("keepdims", 1)))

    return apply


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _norm(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.square().sum(axes, keepdim=keep).sqrt()


def _arg(function: Callable[..., Tensor]) -> Operator:
    def apply(call: Call) -> Tensor:
        x, axis = call.tensor(), int(call.get("axis", 0))
        keep = bool(call.get("keepdims", 1))
        if not call.get("select_last_index", 0):
            return function(x, dim=axis, keepdim=keep)
        last = function(x.flip(axis), dim=axis, keepdim=keep)
        return x.shape[axis] - 1 - last

    return apply


OPERATORS: Mapping[str, Operator] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduce(_norm),
    "ReduceLogSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep)),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
}
