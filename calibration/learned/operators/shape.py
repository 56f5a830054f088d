"""Moving values: reshapes, slices, joins, and the arithmetic of shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator


def _reshape(call: Call) -> Tensor:
    x = call.tensor()
    wanted = call.ints(1, "shape") or []
    if not call.get("allowzero", 0):
        wanted = [x.shape[i] if side == 0 else side for i, side in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(call: Call) -> Tensor:
    x = call.tensor()
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(call: Call) -> Tensor:
    x = call.tensor()
    return x.permute([int(axis) for axis in call.get("perm", range(x.ndim)[::-1])])


def _concat(call: Call) -> Tensor:
    return torch.cat([call.tensor(i) for i in range(len(call.inputs))], int(call.get("axis", 1)))


def _slice(call: Call) -> Tensor:
    x = call.tensor()
    starts, ends = call.ints(1, "starts") or [], call.ints(2, "ends") or []
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(*slice(start, end if end > -(1 << 60) else None, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(list(places), device=x.device))
    return x


def _split(call: Call) -> Sequence[Tensor]:
    x, axis = call.tensor(), int(call.get("axis", 0))
    sizes = call.ints(1, "split")
    if sizes is None:
        each = math.ceil(x.shape[axis] / int(call.get("num_outputs", call.outputs)))
        return torch.split(x, each, axis)
    return torch.split(x, sizes, axis)


def _pad(call: Call) -> Tensor:
    x = call.tensor()
    pads = call.ints(1, "pads") or []
    axes = [axis % x.ndim for axis in call.ints(3) or range(x.ndim)]
    count = len(axes)
    sides = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        sides[axis] = (pads[i], pads[i + count])
    mode = call.get("mode", "constant")
    if mode == "constant":
        value = call.optional(2)
        flat = [side for before, after in reversed(sides) for side in (before, after)]
        return F.pad(x, flat, value=call.get("value", 0.0) if value is None else value.item())
    for axis, (before, after) in enumerate(sides):
        if before or after:
            x = x.index_select(axis, _mirrored(call, mode, x.shape[axis], before, after).to(x.device))
    return x


def _mirrored(call: Call, mode: str, size: int, before: int, after: int) -> Tensor:
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        places = places % period
        return torch.where(places < size, places, period - places)
    raise call.refuse(f"mode {mode!r}", "constant, edge, reflect, wrap")


def _gather(call: Call) -> Tensor:
    x, indices = call.tensor(0), call.tensor(1)
    axis = call.get("axis", 0) % x.ndim
    picked = torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device)
    found = x.index_select(axis, picked.reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(call: Call) -> Tensor:
    x, indices = call.tensor(0), call.tensor(1)
    axis = call.get("axis", 0) % x.ndim
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def _squeeze(call: Call) -> Tensor:
    x = call.tensor()
    axes = call.ints(1, "axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    x = call.tensor()
    axes = call.ints(1, "axes") or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(call: Call) -> Tensor:
    x = call.tensor()
    shape = np.broadcast_shapes(tuple(x.shape), tuple(call.ints(1) or []))
    return x.expand(shape)


def _depth_to_space(call: Call) -> Tensor:
    x, block = call.tensor(), int(call.get("blocksize"))
    n, c, h, w = x.shape
    if call.get("mode", "DCR") == "DCR":
        y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call) -> Tensor:
    x, block = call.tensor(), int(call.get("blocksize"))
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block, block, w // block, block)
    y = y.permute(0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else y.permute(0, 1, 3, 5, 2, 4)
    return y.reshape(n, c * block**2, h // block, w // block)


def _shape(call: Call) -> Tensor:
    return torch.tensor(list(call.tensor().shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


def _constant_of_shape(call: Call) -> Tensor:
    value = call.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(value.numpy().copy())
    return fill.reshape(()).expand(call.ints(0) or []).clone()


def _range(call: Call) -> Tensor:
    start, limit, step = (call.tensor(i) for i in range(3))
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


OPERATORS: Mapping[str, Operator] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda call: torch.tensor(call.tensor().numel()),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda call: call.tensor().repeat(call.ints(1) or []),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
