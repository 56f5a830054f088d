"""Returns the optimizer Muon: steps of convolutions and linear layers are made orthogonal, all else is AdamW's.

    B <- m B + G,    U = G + m B                           (Nesterov's momentum, m is 0.95, where nothing else is said)
    W <- (1 - lr * decay) W - 0.2 lr sqrt(max(n, k)) O     (n, k: rows and columns, O: U with singular values near 1)

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the factor is that of Liu et al. 2025,
"Muon is Scalable for LLM Training": an element moves by about 0.2 lr, as with AdamW, so both take one learning rate.
A gradient has few large singular values and many small ones; where all count the same, a network learns in fewer steps.

`torch.optim.Muon` takes matrices alone. Here the kernel of a convolution is a matrix for each of its groups, with a row
for each output channel (each input channel, if transposed), and matrices of the same shape go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Jordan's: they bring singular values to between 0.7 and 1.2 in few iterations, not exactly to 1."""


@dataclass(frozen=True)
class Matrices:
    """A parameter whose steps are made orthogonal, and of how many matrices along its first axis it consists."""

    parameter: Tensor
    groups: int = 1


def hidden_matrices(model: nn.Module) -> list[Matrices]:
    """The weights of convolutions and linear layers that are trained, but those of the last linear one, the classifier.

    A weight that several layers share is there once; one that is computed from other parameters is none.
    """
    layers = [each for each in model.modules() if isinstance(each, (*CONVOLUTIONS, nn.Linear))]
    found = {
        id(each.weight): Matrices(each.weight, getattr(each, "groups", 1))
        for each in layers
        if isinstance(each.weight, nn.Parameter) and each.weight.requires_grad
    }
    linear = [each for each in layers if isinstance(each, nn.Linear)]
    if linear:
        found.pop(id(linear[-1].weight), None)
    return list(found.values())


class Muon(torch.optim.AdamW):
    """AdamW whose groups with the key `matrices` (the number of matrices in each parameter) take orthogonal steps."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, lr=lr)
        self._momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if "matrices" not in group]
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if "matrices" in group:
                self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        together: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                step = self._with_momentum(parameter)
                matrices = step.reshape(group["matrices"], len(step) // group["matrices"], -1)
                together[matrices.shape[1:]].append((parameter, matrices))
        for (rows, columns), items in together.items():
            steps = orthogonal(torch.cat([matrices for _, matrices in items]))
            rate = 0.2 * group["lr"] * sqrt(max(rows, columns))
            for (parameter, _), step in zip(items, steps.chunk(len(items)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step.reshape(parameter.shape), alpha=-rate)

    def _with_momentum(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:  # the names are AdamW's, which restores the state of all groups
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].mul_(self._momentum).add_(parameter.grad)
        return parameter.grad.add(state["exp_avg"], alpha=self._momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (count, n, k) with the singular vectors of the given ones, and singular values near 1; float32.

    Newton and Schulz's iteration with Jordan's coefficients: X <- a X + b (X X') X + c (X X')^2 X.
    """
    a, b, c = COEFFICIENTS
    is_wide = matrices.shape[1] <= matrices.shape[2]
    wide: Tensor = matrices.float() if is_wide else matrices.float().mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if is_wide else wide.mT
