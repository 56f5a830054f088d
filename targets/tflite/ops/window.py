"""Sliding windows: ONNX's kernels, strides and pads, said in TFLite's SAME, VALID, or an explicit pad before VALID.

TFLite's SAME pads `total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - in, 0)`, the smaller half in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Unsupported

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """Sizes over the spatial axes. `pads` are the elements the windows really reach beyond the input, in front and
    behind.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    pads: Pads

    @property
    def padding(self) -> str | None:
        """What TFLite calls these pads: SAME or VALID; None when it has no word for them."""
        if not any(front or behind for front, behind in self.pads):
            return "VALID"
        for size, out, stride, (front, _), total in zip(
            self.sizes, self.outputs, self.strides, self.pads, self._totals(), strict=True
        ):
            if out != -(-size // stride) or front != total // 2:
                return None
        return "SAME"

    def _totals(self) -> list[int]:
        reach = zip(self.outputs, self.strides, self.kernel, self.dilations, self.sizes, strict=True)
        return [max((out - 1) * stride + (k - 1) * dilation + 1 - size, 0) for out, stride, k, dilation, size in reach]


def window(node: Node, kernel: Sequence[int]) -> Window:
    """The window of a convolution or pooling node. Raises Unsupported for dynamic spatial dimensions."""
    if -1 in node.x.signature[2:]:
        raise Unsupported("needs known spatial dimensions", f"shape {list(node.x.signature)}", "a dynamic batch only")
    rank = len(kernel)
    strides = tuple(node.attribute("strides") or (1,) * rank)
    dilations = tuple(node.attribute("dilations") or (1,) * rank)
    sizes, outputs = node.x.shape[2:], node.y.shape[2:]
    fronts = _fronts(node, sizes, kernel, strides, dilations)
    pads = []
    for size, out, k, stride, dilation, front in zip(sizes, outputs, kernel, strides, dilations, fronts, strict=True):
        pads.append((front, max((out - 1) * stride + (k - 1) * dilation + 1 - size - front, 0)))
    return Window(tuple(kernel), strides, dilations, tuple(sizes), tuple(outputs), tuple(pads))


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


def flat(w: Window) -> Window:
    """A 1-D window as a 2-D one over an image of height 1."""
    if len(w.kernel) != 1:
        return w
    return Window((1, *w.kernel), (1, *w.strides), (1, *w.dilations), (1, *w.sizes), (1, *w.outputs), ((0, 0), *w.pads))


def padded(emit: Emit, x: Operand, pads: Pads, value: float | None = None) -> Operand:
    """`x` (channels last) with its spatial axes padded by real zeros (PAD), or by `value` (PADV2)."""
    every = [(0, 0), *pads, (0, 0)]
    shape = [size + front + behind for size, (front, behind) in zip(x.shape, every, strict=True)]
    target = emit.temporary(shape, x, "padded")
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
