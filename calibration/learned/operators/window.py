"""Where a window (of a convolution or a pool) stands: paddings and output sizes as ONNX defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.learned.call import Call


def per_axis(call: Call, name: str, rank: int, default: int = 1) -> list[int]:
    """The attribute `name`, one number per spatial axis."""
    return [int(value) for value in call.get(name, [default] * rank)]


def paddings(
    call: Call, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial axis, `auto_pad` worked out."""
    rank = len(size)
    mode = call.get("auto_pad", "NOTSET")
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        found = []
        for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
            total = max((math.ceil(n / stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return found
    explicit = [0] * (2 * rank) if mode == "VALID" else [int(p) for p in call.get("pads", [0] * (2 * rank))]
    return list(zip(explicit[:rank], explicit[rank:], strict=True))


def pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with its last axes padded; negative paddings crop."""
    if not any(before or after for before, after in pads):
        return x
    flat = [side for before, after in reversed(pads) for side in (before, after)]
    return F.pad(x, flat, value=value)


def overhang(  # noqa: PLR0913, PLR0917 - the six numbers of one axis
    size: int, pads: tuple[int, int], kernel: int, stride: int, dilation: int, ceil_mode: bool
) -> int:
    """How far the last window of one axis reaches over the padded input; negative where it ends before.

    A window that would begin in the padding behind the input is left out, as ONNX does from opset 22 on and its
    runtimes always did.
    """
    if not ceil_mode:
        return 0
    span = dilation * (kernel - 1) + 1
    padded = size + sum(pads)
    count = math.ceil((padded - span) / stride) + 1
    if (count - 1) * stride >= size + pads[0]:
        count -= 1
    return (count - 1) * stride + span - padded
