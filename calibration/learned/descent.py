"""Integers of least squared output error, one coordinate after the other.

For one output channel with float weights w, inputs x of the float model and x_hat of the quantized one, both about
their means where a bias takes care of these,

    E(q) = E[(s q . x_hat - w . x)^2] + a (s q - w)^T diag(S) (s q - w),
    S = E[x_hat x_hat^T],  C = E[x_hat x^T]

Along one coordinate this is a parabola, so its best integer is the nearest one to the parabola's minimum

    q_k <- round((s q_k - r_k / ((1 + a) S_kk)) / s),  r = S s q - C w + a diag(S) (s q - w)

within [-127, 127] and, for pair-limited weights, within what the other weight of its pair leaves of the limit. Every
step lowers E or leaves it, whatever the start, and a few sweeps over all coordinates settle (coordinate descent on the
layer's least-squares problem: Behdin et al., 2023, "QuantEase", section 3; the rounding freedom is AdaRound's, Nagel et
al., 2020, without its relaxation and not limited to the two nearest integers). The second term (a ridge) keeps weights
where the samples say nothing near their float values.

Columns are worked on in blocks: inside a block only the block's own part of r is kept up to date, and the rest follows
as one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeship.calibration.planning.pair_limit import LIMIT

_BLOCK = 64


@dataclass(frozen=True, eq=False)
class Problem:
    """The rounding of one layer's weights, group by group: G groups of m output channels that read K inputs.

    `weights` (G, m, K) float64 in the kernel's K order, `second` S and `cross` C (G, K, K), `scale` (G, m, 1).
    `paired`: neighbours 2i and 2i+1 must keep the pair limit.
    """

    weights: Tensor
    scale: Tensor
    second: Tensor
    cross: Tensor
    qmax: int
    paired: bool

    def error(self, integers: Tensor) -> Tensor:
        """E without its ridge and its constant part, for each output channel: (G, m)."""
        values = integers * self.scale
        return (values * (values @ self.second - 2 * (self.weights @ self.cross.transpose(1, 2)))).sum(-1)


def descend(problem: Problem, start: Tensor, ridge: float, sweeps: int) -> Tensor:
    """Integers (G, m, K) with a smaller or equal E than `start`, after at most `sweeps` rounds over all coordinates."""
    width = problem.weights.shape[-1]
    diagonal = torch.diagonal(problem.second, dim1=1, dim2=2).unsqueeze(1)
    # An input that never moves has no say in the error: its weight is left alone. What is zero was pruned, and stays.
    curvature = (1 + ridge) * diagonal
    alive = (curvature > 1e-12 * curvature.amax(-1, keepdim=True).clamp(min=1e-30)) & (problem.weights != 0)
    integers = start.clone()
    offset = integers * problem.scale - problem.weights
    slope = (integers * problem.scale) @ problem.second - problem.weights @ problem.cross.transpose(1, 2)
    slope += ridge * diagonal * offset
    for _ in range(sweeps):
        before = integers.clone()
        for first in range(0, width, _BLOCK):
            block = slice(first, min(first + _BLOCK, width))
            moved = _sweep_block(problem, integers, slope, curvature, alive, block, ridge)
            slope += moved @ problem.second[:, block]
            slope[..., block] += ridge * diagonal[..., block] * moved
        if torch.equal(before, integers):
            break
    return integers


def _sweep_block(  # noqa: PLR0913, PLR0917 - the state of one sweep
    problem: Problem, integers: Tensor, slope: Tensor, curvature: Tensor, alive: Tensor, block: slice, ridge: float
) -> Tensor:
    """How far the weights in `block` moved: (G, m, block); `integers` are changed in place."""
    local = slope[..., block].clone()
    own = problem.second[:, block, block].clone()
    own += ridge * torch.diag_embed(torch.diagonal(own, dim1=1, dim2=2))
    before = integers[..., block].clone()
    for k in range(block.start, block.stop):
        j = k - block.start
        wanted = integers[..., k] - local[..., j] / (curvature[..., k].clamp(min=1e-30) * problem.scale[..., 0])
        chosen = torch.round(torch.where(alive[..., k], wanted, integers[..., k]))
        chosen = torch.clamp(chosen, *_bounds(problem, integers, k))
        step = (chosen - integers[..., k]) * problem.scale[..., 0]
        integers[..., k] = chosen
        local += step.unsqueeze(-1) * own[:, j].unsqueeze(1)
    return (integers[..., block] - before) * problem.scale


def _bounds(problem: Problem, integers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest integers that coordinate `k` may take."""
    partner = k ^ 1
    shape = integers.shape[:-1]
    low, high = integers.new_full(shape, -problem.qmax), integers.new_full(shape, problem.qmax)
    if problem.paired and partner < integers.shape[-1]:
        other = integers[..., partner]
        high = torch.minimum(high, LIMIT - other.clamp(min=0))
        low = torch.maximum(low, -LIMIT - other.clamp(max=0))
    return low, high
