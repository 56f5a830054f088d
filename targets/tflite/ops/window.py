"""Sliding windows: ONNX's kernels, strides and pads, said in TFLite's SAME, VALID, or an explicit pad before VALID.

TFLite's SAME pads `total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - in, 0)`, the smaller half in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Unsupported

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """Sizes over the spatial axes. `pads` are the elements the windows really reach beyond the input, in front and
    behind; on a dynamic axis those that ONNX names, and `same` says whether they are SAME's for every size.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    pads: Pads
    same: tuple[bool | None, ...] = field(default=(), kw_only=True)

    @property
    def padding(self) -> str | None:
        """What TFLite calls these pads: SAME or VALID; None when it has no word for them."""
        if not any(front or behind for front, behind in self.pads):
            return "VALID"
        reach = zip(self.sizes, self.outputs, self.strides, self.pads, self._totals(), strict=True)
        now = [out == -(-size // stride) and front == total // 2 for size, out, stride, (front, _), total in reach]
        same = self.same or (None,) * len(now)
        return (
            "SAME" if all(here if always is None else always for here, always in zip(now, same, strict=True)) else None
        )

    def _totals(self) -> list[int]:
        reach = zip(self.outputs, self.strides, self.kernel, self.dilations, self.sizes, strict=True)
        return [max((out - 1) * stride + (k - 1) * dilation + 1 - size, 0) for out, stride, k, dilation, size in reach]


def window(node: Node, kernel: Sequence[int]) -> Window:
    """The window of a convolution or pooling node. Raises Unsupported where a dynamic size decides on its pads."""
    rank = len(kernel)
    strides = tuple(node.attribute("strides") or (1,) * rank)
    dilations = tuple(node.attribute("dilations") or (1,) * rank)
    sizes, outputs = node.x.shape[2:], node.y.shape[2:]
    fronts = _fronts(node, sizes, kernel, strides, dilations)
    pads: list[tuple[int, int]] = []
    same: list[bool | None] = []
    for axis, (size, out, front) in enumerate(zip(sizes, outputs, fronts, strict=True)):
        reach = (kernel[axis] - 1) * dilations[axis]
        behind = max((out - 1) * strides[axis] + reach + 1 - size - front, 0)
        always = None
        if node.x.signature[axis + 2] == -1:
            always, behind = _for_every_size(node, axis, strides[axis], reach, behind)
        pads.append((front, behind))
        same.append(always)
    return Window(tuple(kernel), strides, dilations, tuple(sizes), tuple(outputs), tuple(pads), same=tuple(same))


def _for_every_size(node: Node, axis: int, stride: int, reach: int, behind: int) -> tuple[bool, int]:
    """Whether a dynamic axis' pads are SAME's for every size, and what is padded behind where they are not."""
    auto = node.attribute("auto_pad", "NOTSET")
    if auto == "SAME_UPPER":
        return True, behind
    if auto == "SAME_LOWER" or node.attribute("ceil_mode", 0):
        raise Unsupported("its pads depend on a dynamic size", f"axis {axis + 2}", "pads that are given as numbers")
    flat_pads = [] if auto == "VALID" else node.attribute("pads") or []
    half = len(flat_pads) // 2
    front, behind = (flat_pads[axis], flat_pads[half + axis]) if flat_pads else (0, 0)
    return stride == 1 and front + behind == reach and front == reach // 2, behind


def _fronts(
    node: Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """The pads in front; those behind follow from the output's size, and so cover auto_pad and ceil_mode."""
    auto = node.attribute("auto_pad", "NOTSET")
    rank = len(kernel)
    if auto in ("NOTSET", ""):
        return list(node.attribute("pads") or (0,) * 2 * rank)[:rank]
    if auto == "VALID":
        return [0] * rank
    reach = zip(sizes, kernel, strides, dilations, strict=True)
    totals = [max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0) for size, k, s, d in reach]
    return [total - total // 2 if auto == "SAME_LOWER" else total // 2 for total in totals]


def windows_in_space(node: Node) -> str | None:
    """The window is 1-D, 2-D or 3-D."""
    return None if node.x.rank in (3, 4, 5) else f"its input has rank {node.x.rank}; accepted: 3, 4 and 5"


def in_the_plane(w: Window) -> bool:
    """Whether TFLite's pooling kernels have such windows: 1-D or 2-D, not dilated."""
    return len(w.kernel) <= 2 and set(w.dilations) == {1}


def counts(w: Window, behinds: Sequence[int] | None) -> Array:
    """How many elements each window holds: those of the input, and with `behinds` those of the pads that ONNX names."""
    total: Array = np.ones(())
    for axis, (front, _) in enumerate(w.pads):
        taps = np.arange(w.outputs[axis]) * w.strides[axis] - front
        places = taps[:, None] + np.arange(w.kernel[axis]) * w.dilations[axis]
        low, high = (0, w.sizes[axis]) if behinds is None else (-front, w.sizes[axis] + behinds[axis])
        total = np.multiply.outer(total, ((places >= low) & (places < high)).sum(axis=1))
    return total


def flat(w: Window) -> Window:
    """A 1-D window as a 2-D one over an image of height 1."""
    if len(w.kernel) != 1:
        return w
    same = (None, *w.same) if w.same else ()
    pads = ((0, 0), *w.pads)
    return Window((1, *w.kernel), (1, *w.strides), (1, *w.dilations), (1, *w.sizes), (1, *w.outputs), pads, same=same)


def padded(emit: Emit, x: Operand, pads: Pads, value: float | None = None) -> Operand:
    """`x` (channels last) with its spatial axes padded by real zeros (PAD), or by `value` (PADV2)."""
    every = [(0, 0), *pads, (0, 0)]
    shape = [size + front + behind for size, (front, behind) in zip(x.shape, every, strict=True)]
    signature = [-1 if known == -1 else size for size, known in zip(shape, x.signature, strict=True)]
    target = emit.temporary(shape, x, "padded", signature=signature)
    paddings = emit.ints("paddings", every)
    if value is None:
        emit.operator("PAD", [x, paddings], target)
    else:
        emit.operator("PADV2", [x, paddings, emit.real("pad_value", value, x)], target)
    return target


def spatial(emit: Emit, x: Operand) -> Operand:
    """`x` as an image: [N, L, C] becomes [N, 1, L, C]."""
    if x.rank == 4:
        return x
    if x.rank != 3:
        raise Unsupported("3-D windows have no int8 or float kernel here", f"input of rank {x.rank}", "1-D and 2-D")
    return emit.writer.reshape(x, _tall(x.shape), _tall(x.signature))


def spatial_output(emit: Emit, like: Operand) -> Operand:
    """Where a 2-D kernel writes: the output itself, or an image that `finish` brings back to [N, L, C]."""
    y = emit.output()
    if y.rank == 4:
        return y
    return emit.writer.new(f"{y.name}/image", _tall(y.shape), y.dtype, y.quant, signature=_tall(y.signature))


def finish(emit: Emit, image: Operand) -> None:
    """Brings the image a 2-D kernel wrote to the output's own rank."""
    y = emit.output()
    if image is not y:
        emit.writer.reshape(image, y.shape, y.signature, y)


def _tall(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], 1, *shape[1:])
