"""Which layers of a QDQ model can clip on x86 without VNNI, and how often they do on given samples.

The proof is static: `can_overflow` over the integer weights, for any input. The count emulates vpmaddubsw on the real
inputs: a pair clips at an output position where  u0 * s0 + u1 * s1  leaves [-32768, 32767], with u the input as
uint8. Only the layers, channels and pairs that can clip are looked at, and the answer does not depend on the CPU it
is computed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import constant_array, node_key, value_name
from edgeship.calibration.graph.patches import Patches, kernel_rows
from edgeship.calibration.observing.collect import Feeds, observe
from edgeship.calibration.planning.pair_limit import can_overflow, lane_pairs, uses_pair_kernel
from edgeship.calibration.types import Array, OpenModel


@dataclass(frozen=True)
class Saturation:
    """One layer that can clip: `channels` are its output channels that can, `pairs` the pairs of weights in them.

    `clipped` counts the sums that did leave 16 bits on the samples, `sums` all that were computed in the layer.
    """

    node: str
    channels: tuple[int, ...]
    pairs: int
    clipped: int = 0
    sums: int = 0


def can_clip(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """The layers of a QDQ model that can clip: node name -> its output channels that can."""
    found = {}
    for layer in _layers(model):
        rows = np.flatnonzero(layer.risky.any(axis=1))
        if rows.size:
            found[layer.name] = tuple(int(c) for c in np.unique(rows % layer.channels))
    return found


def saturation(model: ir.Model, samples: Iterable[Feeds], open_model: OpenModel) -> list[Saturation]:
    """Every layer of a QDQ model that can clip, in graph order, with what did clip on `samples`.

    `open_model` opens the model with the layers' inputs as outputs; it may optimise. Empty, without a single
    inference, when nothing can clip. Raises InputError for no samples.
    """
    layers = [layer for layer in _layers(model) if layer.risky.any()]
    if layers:
        readers: dict[str, list[_Layer]] = {}
        for layer in layers:
            readers.setdefault(layer.source, []).append(layer)
        observe(model, samples, readers, open_model)
    return [layer.result() for layer in layers]


def count_clipped(node: ir.Node, weights: Array, values: Array, padding: int = 0) -> int:
    """How many sums of two products clip in one layer, for its uint8 input `values` (batch first, NCHW).

    `weights` are its int8 weights in ONNX's layout, `padding` is the input's zero point as uint8.
    """
    rows = kernel_rows(node, weights)
    return _count(Patches(node, values, weights, padding), rows, can_overflow(rows))


def _count(patches: Patches, rows: Array, risky: Array) -> int:
    pairs = lane_pairs(rows.astype(np.int32))
    width = rows.shape[1]
    most = patches.largest()
    clipped = 0
    # Pairs meet the same two columns of the input in every row of a group: columns are read once for all of them.
    for pair in np.flatnonzero(risky.any(axis=0)):
        by_group: dict[int, list[int]] = {}
        for row in np.flatnonzero(risky[:, pair]):
            by_group.setdefault(patches.group(int(row)), []).append(int(row))
        for members in by_group.values():
            first, second = 2 * int(pair), min(2 * int(pair) + 1, width - 1)
            w = pairs[members, pair]
            if np.abs(w.sum(axis=1)).max() * most <= np.iinfo(np.int16).max:
                continue
            a = patches.column(members[0], first).astype(np.int32)
            b = patches.column(members[0], second).astype(np.int32)
            # An input under this bound cannot make even the largest pair clip: most positions end here.
            heaviest = np.abs(w).max(axis=0)
            alive = a * heaviest[0] + b * heaviest[1] > np.iinfo(np.int16).max
            if not alive.any():
                continue
            sums = w[:, :1] * a[alive] + w[:, 1:] * b[alive]
            clipped += int(((sums > np.iinfo(np.int16).max) | (sums < np.iinfo(np.int16).min)).sum())
    return clipped


class _Layer:
    """A layer that is looked at; counts what clips in the inputs it is shown."""

    def __init__(self, node: ir.Node, weights: Array, channels: int, quantizer: ir.Node) -> None:
        self.name = node_key(node)
        self.channels = channels
        self.source = value_name(quantizer.outputs[0])
        self._node = node
        self._weights = weights
        self._rows = kernel_rows(node, weights)
        self.risky = can_overflow(self._rows)
        self._scale, self._zero_point = _parameters(quantizer)
        self._clipped = 0
        self._sums = 0

    def update(self, values: Array) -> None:
        """Takes in one batch of the layer's dequantized input."""
        integers = np.rint(values / self._scale).astype(np.int32) + self._zero_point
        unsigned = np.clip(integers, 0, 255).astype(np.uint8)
        patches = Patches(self._node, unsigned, self._weights, self._zero_point)
        self._clipped += _count(patches, self._rows, self.risky)
        self._sums += patches.positions * self.risky.size

    def result(self) -> Saturation:
        """What was found."""
        rows = np.flatnonzero(self.risky.any(axis=1))
        channels = tuple(int(c) for c in np.unique(rows % self.channels))
        return Saturation(self.name, channels, int(self.risky.sum()), self._clipped, self._sums)


def _layers(model: ir.Model) -> list[_Layer]:
    found = []
    for node in model.graph:
        if node.op_type not in {"Conv", "Gemm", "MatMul"}:
            continue
        quantizer, weight = (_dequantizer(value) for value in node.inputs[:2])
        if quantizer is None or weight is None or not _has_8_bits(quantizer):
            continue
        integers = constant_array(weight.inputs[0])
        if integers is None or integers.dtype != np.int8 or not uses_pair_kernel(node, integers):
            continue
        scale = constant_array(weight.inputs[1])
        channels = scale.size if scale is not None and scale.size > 1 else kernel_rows(node, integers).shape[0]
        found.append(_Layer(node, integers, channels, quantizer))
    return found


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _has_8_bits(node: ir.Node) -> bool:
    """Whether a DequantizeLinear's integers are of one byte: kernels multiply no others."""
    zero_point = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    return zero_point is None or zero_point.dtype.itemsize == 1


def _parameters(node: ir.Node) -> tuple[np.float32, int]:
    """Scale and zero point of a DequantizeLinear as for uint8: 128 more where the integers are signed."""
    scale = constant_array(node.inputs[1])
    zero_point = constant_array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero_point is None:
        raise ValueError(f"node {node_key(node)}: scale and zero point must be constants")
    shift = 128 if zero_point.dtype == np.int8 else 0
    return np.float32(scale.reshape(())), int(zero_point.reshape(())) + shift
