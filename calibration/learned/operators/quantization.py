"""QuantizeLinear and DequantizeLinear, and both at once with straight-through gradients.

    q = clip(round(x / s) + z, qmin, qmax),  x_hat = (q - z) s          (round half to even, as ONNX)

    d x_hat / d x = 1 inside the range, 0 where it saturates
    d x_hat / d s = round(x / s) - x / s inside, (qmin - z) or (qmax - z) where it saturates

The gradient of the rounding is taken to be that of the identity (Bengio et al., 2013), that of the scale follows from
it (Esser et al., 2020, "Learned Step Size Quantization", eq. 3), divided by sqrt(N qmax) for N values, so that
scales and weights move at like speeds (section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator

_LIMITS = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-(1 << 15), (1 << 15) - 1),
    torch.uint16: (0, (1 << 16) - 1),
}
_INTEGERS = {2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16}


class FakeQuantize(torch.autograd.Function):
    """x, scale, low, high, pace -> clip(round(x / scale), low, high) * scale, with low = qmin - z and high = qmax - z.

    `scale` broadcasts against `x`, and its gradient is multiplied with `pace`. The second result is round(x / scale),
    without gradient: all that the gradient of x needs. Passes over memory are what this costs, so results are written
    in place and no masks of booleans are made.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: float, high: float, pace: float) -> tuple[Tensor, Tensor]:
        """The values that the integers stand for, and the integers before they are clipped."""
        del pace  # the gradient's
        rounded = (x / scale).round_()
        return torch.clamp(rounded, low, high).mul_(scale), rounded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps what the gradients need."""
        x, scale, ctx.low, ctx.high, ctx.pace = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *((x, scale) if ctx.needs_input_grad[1] else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The straight-through gradients."""
        rounded, *learnt = ctx.saved_tensors
        grad, to_scale = grads[0], None
        if learnt:
            x, scale = learnt
            inside = (rounded >= ctx.low) & (rounded <= ctx.high)
            slope = torch.where(inside, rounded - x / scale, torch.clamp(rounded, ctx.low, ctx.high))
            to_scale = (grad * slope).sum_to_size(scale.shape) * ctx.pace
        # lets pass what lies strictly between the bounds; between integers that is the same as at or inside them
        to_x = torch.ops.aten.hardtanh_backward(grad, rounded, ctx.low - 0.5, ctx.high + 0.5)
        return to_x, to_scale, None, None, None

    @staticmethod
    def vmap(  # noqa: PLR0913, PLR0917 - torch's two and forward's five
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: Tensor, low: float, high: float, pace: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """All samples at once: it works value by value."""
        if in_dims[1] is not None:
            scale = scale.movedim(in_dims[1], 0)
            scale = scale.reshape(info.batch_size, *[1] * (x.ndim - scale.ndim), *scale.shape[1:])
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return FakeQuantize.apply(x, scale, low, high, pace), (0, 0)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def quantize_dequantize(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """`FakeQuantize` of `x`; `scale` broadcasts against it."""
    pace = 1 / math.sqrt(max(x.numel() / scale.numel() * high, 1.0))
    result: Tensor = FakeQuantize.apply(x, scale, low, high, pace)[0]  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def integer_type(call: Call) -> torch.dtype:
    """The type of the integers that a QuantizeLinear makes."""
    zero_point = call.optional(2)
    dtype = zero_point.dtype if zero_point is not None else _INTEGERS.get(int(call.get("output_dtype", 0) or 2))
    if dtype not in _LIMITS:
        raise call.refuse(f"integers of type {dtype}", "int8, uint8, int16, uint16")
    return dtype


def fake_quantize(call: Call) -> Tensor:
    """What a QuantizeLinear followed by a DequantizeLinear with the same parameters computes."""
    low, high = _LIMITS[integer_type(call)]
    zero_point = call.optional(2)
    shift = 0 if zero_point is None else int(zero_point.item())
    return quantize_dequantize(call.tensor(0), call.tensor(1), float(low - shift), float(high - shift))


def _along(call: Call, values: Tensor, rank: int) -> Tensor:
    if call.get("block_size", 0):
        raise call.refuse("blocked quantization", "one scale per tensor or per channel")
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[call.get("axis", 1)] = values.numel()
    return values.reshape(shape)


def _quantize(call: Call) -> Tensor:
    x = call.tensor()
    dtype = integer_type(call)
    low, high = _LIMITS[dtype]
    places = torch.round(x / _along(call, call.tensor(1), x.ndim))
    zero_point = call.optional(2)
    if zero_point is not None:
        places = places + _along(call, zero_point.float(), x.ndim)
    return torch.clamp(places, low, high).to(dtype)


def _dequantize(call: Call) -> Tensor:
    q = call.tensor()
    zero_point = call.optional(2)
    shift = 0 if zero_point is None else _along(call, zero_point.to(torch.int64), q.ndim)
    return (q.to(torch.int64) - shift).float() * _along(call, call.tensor(1), q.ndim)


OPERATORS: Mapping[str, Operator] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
