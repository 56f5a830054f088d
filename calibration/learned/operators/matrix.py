"""Multiply and accumulate: Conv, ConvTranspose, Gemm, MatMul, Einsum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator
from edgeship.calibration.learned.operators.window import pad, paddings, per_axis

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _rank(call: Call) -> int:
    rank = call.tensor(1).ndim - 2
    if rank not in _CONV:
        raise call.refuse(f"{rank} spatial axes", "1 to 3")
    return rank


def _conv(call: Call) -> Tensor:
    x, w = call.tensor(0), call.tensor(1)
    rank = _rank(call)
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    pads = paddings(call, x.shape[2:], w.shape[2:], strides, dilations)
    groups = int(call.get("group", 1))
    if all(before == after >= 0 for before, after in pads):
        return _CONV[rank](x, w, call.optional(2), strides, [before for before, _ in pads], dilations, groups)
    return _CONV[rank](pad(x, pads), w, call.optional(2), strides, 0, dilations, groups)


def _conv_transpose(call: Call) -> Tensor:
    x, w = call.tensor(0), call.tensor(1)
    rank = _rank(call)
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    extra = per_axis(call, "output_padding", rank, 0)
    whole = [
        stride * (n - 1) + e + dilation * (k - 1) + 1
        for n, k, stride, dilation, e in zip(x.shape[2:], w.shape[2:], strides, dilations, extra, strict=True)
    ]
    mode = call.get("auto_pad", "NOTSET")
    wanted = call.get("output_shape")
    if wanted is None and mode in {"SAME_UPPER", "SAME_LOWER"}:
        wanted = [n * stride for n, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        flat = [0] * (2 * rank) if mode == "VALID" else [int(p) for p in call.get("pads", [0] * (2 * rank))]
        pads = list(zip(flat[:rank], flat[rank:], strict=True))
    else:
        pads = []
        for full, size in zip(whole, list(wanted)[-rank:], strict=True):
            total = full - int(size)
            # Only SAME_UPPER puts the larger half behind.
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
            pads.append((before, total - before))
    groups = int(call.get("group", 1))
    # Everything that the kernel reaches (output_padding adds zeros behind it), then cut as the paddings say.
    y = _TRANSPOSED[rank](x, w, None, strides, 0, 0, groups, dilations)
    y = pad(y, [(-before, e - after) for (before, after), e in zip(pads, extra, strict=True)])
    bias = call.optional(2)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * rank)


def _gemm(call: Call) -> Tensor:
    a, b = call.tensor(0), call.tensor(1)
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = a @ b if alpha == 1 else alpha * (a @ b)
    c = call.optional(2)
    if c is None:
        return y
    return y + c if beta == 1 else y + beta * c


def _einsum(call: Call) -> Tensor:
    return torch.einsum(str(call.get("equation")), *[call.tensor(i) for i in range(len(call.inputs))])


OPERATORS: Mapping[str, Operator] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": lambda call: torch.matmul(call.tensor(0), call.tensor(1)),
}
