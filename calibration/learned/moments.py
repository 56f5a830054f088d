"""What a layer's inputs look like: their means and second moments, in the float and in the quantized model.

    m = E[x],  m_hat = E[x_hat],  S = E[x_hat x_hat^T] - m_hat m_hat^T,  C = E[x_hat x^T] - m_hat m^T

over samples and output positions, with x the K values under the layer's kernel, channels innermost (the kernels' own
order, `patches`). The state is (K, K) per group, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from edgeship.calibration.graph.operators import Layer, attribute, node_key
from edgeship.calibration.learned.call import Call
from edgeship.calibration.learned.operators.window import pad, paddings, per_axis


def groups_of(layer: Layer) -> int:
    """The number of groups of channels that do not see each other."""
    return int(attribute(layer.node, "group", 1)) if layer.node.op_type == "Conv" else 1


def can_gather(layer: Layer) -> bool:
    """Whether the layer is a matrix product of patches: a Conv or Gemm, or a MatMul with one weight matrix."""
    return layer.node.op_type in {"Conv", "Gemm"} or (layer.node.op_type == "MatMul" and layer.weights.ndim == 2)


def grouped_rows(layer: Layer, weights: Tensor) -> Tensor:
    """The weights as (G, m, K): groups, output channels of each, and the kernel's K order."""
    if layer.node.op_type == "Conv":
        rows = weights.movedim(1, -1).reshape(weights.shape[0], -1)
    else:
        rows = weights.movedim(layer.axis, 0)
    return rows.reshape(groups_of(layer), -1, rows.shape[-1])


def from_grouped_rows(layer: Layer, rows: Tensor) -> Tensor:
    """The inverse of `grouped_rows`."""
    shape = layer.weights.shape
    flat = rows.reshape(-1, rows.shape[-1])
    if layer.node.op_type == "Conv":
        return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return flat.movedim(0, layer.axis)


def gather(layer: Layer, x: Tensor) -> Tensor:
    """The values under the kernel at every output position: (positions, G, K)."""
    if layer.node.op_type != "Conv":
        return x.reshape(-1, 1, x.shape[-1])
    node, kernel = layer.node, layer.weights.shape[2:]
    call = _call(node)
    rank = len(kernel)
    strides, dilations = per_axis(call, "strides", rank), per_axis(call, "dilations", rank)
    patches = pad(x, paddings(call, x.shape[2:], kernel, strides, dilations))
    for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        patches = patches.unfold(2 + axis, dilation * (k - 1) + 1, stride)[..., ::dilation]
    # (N, C, out..., k...) -> (N, out..., G, k..., C/G)
    groups = groups_of(layer)
    split = patches.reshape(patches.shape[0], groups, -1, *patches.shape[2:])
    order = [0, *range(3, 3 + rank), 1, *range(3 + rank, 3 + 2 * rank), 2]
    arranged = split.permute(order)
    return arranged.reshape(-1, groups, layer.weights[0].size)


def _call(node: ir.Node) -> Call:
    attributes = {name: each.value for name, each in node.attributes.items()}
    return Call(node_key(node), node.op_type, 0, attributes, (), 1)


class Moments:
    """Sums of what `gather` gives for the float and the quantized model, both less the mean of the first rows.

    About zero, inputs that vary little for how large they are would leave nothing of S and C but rounding.
    """

    def __init__(self, layer: Layer) -> None:
        groups = groups_of(layer)
        width = layer.weights[0].size if layer.node.op_type == "Conv" else layer.weights.size // layer.channels
        self._pivots = (torch.zeros(groups, width), torch.zeros(groups, width))
        self._exact = torch.zeros(groups, width, dtype=torch.float64)
        self._rounded = torch.zeros(groups, width, dtype=torch.float64)
        self._second = torch.zeros(groups, width, width, dtype=torch.float64)
        self._cross = torch.zeros(groups, width, width, dtype=torch.float64)
        self.count = 0

    def update(self, exact: Tensor, rounded: Tensor) -> None:
        """Takes in rows (positions, G, K) of the float and of the quantized model, position by position."""
        if not self.count:
            self._pivots = (exact.double().mean(0).float().cpu(), rounded.double().mean(0).float().cpu())
        a, b = (
            (rows.float() - pivot.to(rows.device)).transpose(0, 1)
            for rows, pivot in zip((exact, rounded), self._pivots, strict=True)
        )
        self._exact += a.sum(1).double().cpu()
        self._rounded += b.sum(1).double().cpu()
        turned = b.transpose(1, 2)
        self._second += (turned @ b).double().cpu()
        self._cross += (turned @ a).double().cpu()
        self.count += exact.shape[0]

    def merge(self, other: Moments) -> None:
        """Takes in what another has seen."""
        if not self.count:
            self._pivots = other._pivots
        # sum (y + e)(x + d)^T, with x and y about the other's pivots
        d, e = (theirs.double() - mine for mine, theirs in zip(self._pivots, other._pivots, strict=True))
        x, y, count = other._exact, other._rounded, other.count
        self._second = self._second + other._second + count * _outer(e, e) + _outer(y, e) + _outer(e, y)
        self._cross = self._cross + other._cross + count * _outer(e, d) + _outer(y, d) + _outer(e, x)
        self._exact = self._exact + x + count * d
        self._rounded = self._rounded + y + count * e
        self.count += count

    def means(self) -> tuple[Tensor, Tensor]:
        """E[x] and E[x_hat], both (G, K)."""
        exact, rounded = self._pivots
        return exact + self._exact / self.count, rounded + self._rounded / self.count

    def covariances(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """S and C, both (G, K, K); with `centred` false E[x_hat x_hat^T] and E[x_hat x^T], the means left in."""
        exact, rounded = self._exact / self.count, self._rounded / self.count
        second = self._second / self.count - _outer(rounded, rounded)
        cross = self._cross / self.count - _outer(rounded, exact)
        if centred:
            return second, cross
        exact, rounded = self.means()
        return second + _outer(rounded, rounded), cross + _outer(rounded, exact)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of each group: (G, K), (G, K) -> (G, K, K)."""
    return a.unsqueeze(2) * b.unsqueeze(1)


def thin(rows: Sequence[Tensor], most: int, generator: torch.Generator) -> list[Tensor]:
    """The same random `most` positions of every tensor in `rows`; all where there are no more."""
    count = rows[0].shape[0]
    if count <= most:
        return list(rows)
    chosen = torch.randperm(count, generator=generator)[:most].sort().values
    return [each[chosen.to(each.device)] for each in rows]
