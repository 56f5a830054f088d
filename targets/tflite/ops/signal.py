"""Fourier transforms of fixed length as products with constant matrices, and windows of fixed length.

Bin k of a signal x is `sum over t of x[t] exp(-2 pi i k t / length)`; the inverse has the other sign and a factor
1 / length. Real and imaginary parts lie side by side on the last axis, so the whole transform is one real matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.steps import fixed

LARGEST_MATRIX = 1 << 24


def transform(size: int, parts: int, length: int, *, inverse: bool, onesided: bool) -> Array:
    """The matrix [bins * parts out, size * parts] of a transform of `size` samples, cut or filled up to `length`."""
    basis = np.eye(size * parts).reshape(-1, size, parts)
    signals = basis[..., 0] + (1j * basis[..., 1] if parts == 2 else 0)
    if inverse and onesided:
        result = np.fft.irfft(signals, n=length, axis=1)[..., None]
    else:
        bins = (np.fft.ifft if inverse else np.fft.fft)(signals, n=length, axis=1)
        bins = bins[:, : length // 2 + 1] if onesided else bins
        result = np.stack([bins.real, bins.imag], axis=-1)
    matrix = result.reshape(size * parts, -1).T
    return np.where(np.abs(matrix) < 1e-12, 0.0, matrix)


def _dft_axis(node: Node) -> int:
    given = node.parameter("axis", 2) if node.opset >= 20 else None
    axis = int(node.attribute("axis", 1)) if node.opset < 20 else -2 if given is None else int(given)
    return axis + node.x.rank if axis < 0 else axis


def _dft_length(node: Node) -> int:
    given = node.parameter("dft_length", 1)
    if given is not None:
        return int(given)
    size = node.x.shape[_dft_axis(node)]
    return 2 * (size - 1) if node.attribute("inverse", 0) and node.attribute("onesided", 0) else size


def convert_dft(emit: Emit) -> None:
    """Writes a DFT: one FULLY_CONNECTED, the axis moved to the end before and back after."""
    node, steps, x = emit.node, fixed(emit), emit.input()
    axis, rank = _dft_axis(node), node.x.rank
    order = [*(place for place in range(rank - 1) if place != axis), axis, rank - 1]
    if order != list(range(rank)):
        x = steps.transpose(x, order)
    inverse, onesided = bool(node.attribute("inverse", 0)), bool(node.attribute("onesided", 0))
    matrix = transform(x.shape[-2], x.shape[-1], _dft_length(node), inverse=inverse, onesided=onesided)
    bins = _product(emit, x, matrix, node.y.shape[-1])
    if order != list(range(rank)):
        bins = steps.transpose(bins, [order.index(place) for place in range(rank)])
    steps.deliver(bins)


def _product(emit: Emit, x: Operand, matrix: Array, parts: int) -> Operand:
    """[..., size, parts in] times the matrix as [..., bins, `parts`]."""
    steps, rows = fixed(emit), int(np.prod(x.shape[:-2]))
    flat = steps.reshape(x, (rows, matrix.shape[1]))
    weights = emit.constant("transform", matrix.astype(np.float32))
    signature = (flat.signature[0], matrix.shape[0])
    result = emit.compute("FULLY_CONNECTED", [flat, weights], (rows, matrix.shape[0]), signature=signature)
    return steps.reshape(result, (*x.shape[:-2], matrix.shape[0] // parts, parts))


def moderate_length(node: Node) -> str | None:
    """The matrix of the transform has at most 2^24 elements (2048 complex samples)."""
    if node.op_type == "DFT":
        size = node.x.shape[_dft_axis(node)] * node.x.shape[-1] * _dft_length(node) * 2
    else:
        size = (2 * _frame_length(node)) ** 2
    return f"its matrix would have {size} elements; accepted: {LARGEST_MATRIX}" if size > LARGEST_MATRIX else None


def _frame_length(node: Node) -> int:
    if node.has(2):
        return node.tensor(2).shape[0]
    given = node.parameter("frame_length", 3)
    return node.x.shape[1] if given is None else int(given)


def convert_stft(emit: Emit) -> None:
    """Writes an STFT: one CONV_2D with the transform as its kernel; frames first where the window is computed."""
    node, steps, x, count = emit.node, fixed(emit), emit.input(), emit.node.y.shape[1]
    length, step = _frame_length(node), node.ints("frame_step", 1) or [1]
    parts = x.shape[2] if x.rank == 3 else 1
    matrix = transform(length, parts, length, inverse=False, onesided=bool(node.attribute("onesided", 1)))
    signal = steps.reshape(x, (x.shape[0], 1, x.shape[1], parts))
    if node.has(2) and not node.tensor(2).is_constant:
        places = np.arange(count)[:, None] * step[0] + np.arange(length)
        frames = steps.gather(steps.reshape(x, (x.shape[0], x.shape[1], parts)), places, 1)
        weighted = steps.binary("MUL", frames, steps.reshape(emit.input(2), (length, 1)))
        steps.deliver(_product(emit, weighted, matrix, 2))
        return
    if node.has(2):
        matrix = matrix * np.repeat(node.tensor(2).values().reshape(-1).astype(np.float64), parts)
    kernel = emit.constant("transform", matrix.reshape(-1, 1, length, parts).astype(np.float32))
    offset = emit.constant("no_bias", np.zeros(len(matrix), np.float32))
    shape = (x.shape[0], 1, count, len(matrix))
    signature = (signal.signature[0], *shape[1:])
    bins = emit.compute(
        "CONV_2D", [signal, kernel, offset], shape, signature=signature, padding="VALID", stride_h=1, stride_w=step[0]
    )
    steps.deliver(bins)


def window_of(*factors: float) -> Callable[[Emit], None]:
    """A `convert` for the window `sum over j of factors[j] cos(2 pi j n / N)`, N its length, or one less."""

    def convert(emit: Emit) -> None:
        y = emit.output()
        period = y.shape[0] if emit.node.attribute("periodic", 1) else y.shape[0] - 1
        angles = 2 * np.pi * np.arange(y.shape[0]) / max(period, 1)
        values = np.sum([factor * np.cos(j * angles) for j, factor in enumerate(factors)], axis=0)
        emit.writer.reshape(emit.constant("window", values.astype(y.dtype)), y.shape, y.signature, y)

    return convert


REAL = of_types("float32")
OPS = (
    Op("DFT", convert_dft, limits=(REAL, moderate_length), since=17),
    Op("STFT", convert_stft, limits=(REAL, moderate_length), since=17),
    Op("HannWindow", window_of(0.5, -0.5), since=17),
    Op("HammingWindow", window_of(25 / 46, 25 / 46 - 1), since=17),
    Op("BlackmanWindow", window_of(0.42, -0.5, 0.08), since=17),
)
