"""Arithmetic and activations, value by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.tensor())


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: function(call.tensor(0), call.tensor(1))


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: reduce(function, [call.tensor(i) for i in range(len(call.inputs))])


def _div(call: Call) -> Tensor:
    a, b = call.tensor(0), call.tensor(1)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(call: Call) -> Tensor:
    return (torch.fmod if call.get("fmod", 0) else torch.remainder)(call.tensor(0), call.tensor(1))


def _pow(call: Call) -> Tensor:
    base = call.tensor(0)
    return torch.pow(base, call.tensor(1)).to(base.dtype)


def _mean(call: Call) -> Tensor:
    return reduce(torch.add, [call.tensor(i) for i in range(len(call.inputs))]) / len(call.inputs)


def _clip(call: Call) -> Tensor:
    x = call.tensor()
    low, high = call.optional(1), call.optional(2)
    if low is None and "min" in call.attributes:
        low = x.new_tensor(call.get("min"))
    if high is None and "max" in call.attributes:
        high = x.new_tensor(call.get("max"))
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _prelu(call: Call) -> Tensor:
    x, slope = call.tensor(0), call.tensor(1)
    return torch.where(x < 0, x * slope, x)


def _hard_sigmoid(call: Call) -> Tensor:
    return torch.clamp(call.get("alpha", 0.2) * call.tensor() + call.get("beta", 0.5), 0.0, 1.0)


def _hard_swish(call: Call) -> Tensor:
    x = call.tensor()
    return x * torch.clamp(x / 6 + 0.5, 0.0, 1.0)


def _gelu(call: Call) -> Tensor:
    return F.gelu(call.tensor(), approximate=call.get("approximate", "none"))


def _swish(call: Call) -> Tensor:
    x = call.tensor()
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


def _selu(call: Call) -> Tensor:
    alpha = float(call.get("alpha", 1.6732632423543772))
    gamma = float(call.get("gamma", 1.0507009873554805))
    x = call.tensor()
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def _thresholded(call: Call) -> Tensor:
    x = call.tensor()
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def apply(call: Call) -> Tensor:
        x = call.tensor()
        if call.opset >= 13:
            return function(x, call.get("axis", -1))
        # Before opset 13 everything from the axis on is one distribution.
        axis = call.get("axis", 1) % x.ndim
        return function(x.flatten(axis), -1).reshape(x.shape)

    return apply


def _dropout(call: Call) -> Tensor | Sequence[Tensor]:
    x = call.tensor()
    return (x, torch.ones_like(x, dtype=torch.bool)) if call.outputs > 1 else x


OPERATORS: Mapping[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "Ceil": _unary(torch.ceil),
    "Celu": lambda call: F.celu(call.tensor(), call.get("alpha", 1.0)),
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Div": _div,
    "Dropout": _dropout,
    "Elu": lambda call: F.elu(call.tensor(), call.get("alpha", 1.0)),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _unary(lambda x: x),
    "LeakyRelu": lambda call: F.leaky_relu(call.tensor(), call.get("alpha", 0.01)),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Max": _many(torch.maximum),
    "Mean": _mean,
    "Min": _many(torch.minimum),
    "Mish": _unary(F.mish),
    "Mod": _mod,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "PRelu": _prelu,
    "Pow": _pow,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Selu": _selu,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Softmax": _softmax(torch.softmax),
    "Softplus": _unary(lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _many(torch.add),
    "Swish": _swish,
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": _thresholded,
}
