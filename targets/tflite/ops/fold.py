"""Values put back where they came from: Col2Im and MaxUnpool, by SCATTER_ND, which adds what falls on one place."""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST, NATURAL
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.steps import fixed


def static_batch(node: Node) -> str | None:
    """The batch is static."""
    return "its batch is dynamic: the places are constants of the model" if node.x.is_dynamic else None


def _scattered(emit: Emit, places: Operand, values: Operand, shape: tuple[int, ...]) -> Operand:
    return emit.compute("SCATTER_ND", [places, values, emit.ints("shape", shape)], shape, dtype=values.dtype)


def _column_places(node: Node) -> tuple[Array, int]:
    """Where column (block, window element) lies in the flat image, with one place more for what lies outside."""
    image, window = node.ints("image_shape", 1) or [], node.ints("block_shape", 2) or []
    rank = len(image)
    strides, dilations = (node.attribute(name) or [1] * rank for name in ("strides", "dilations"))
    pads = node.attribute("pads") or [0] * 2 * rank
    total = int(np.prod(image))
    places, inside = np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_)
    for axis in range(rank):
        reach = (window[axis] - 1) * dilations[axis] + 1
        blocks = (image[axis] + pads[axis] + pads[axis + rank] - reach) // strides[axis] + 1
        at = np.arange(blocks)[:, None] * strides[axis] - pads[axis] + np.arange(window[axis]) * dilations[axis]
        valid = (at >= 0) & (at < image[axis])
        places = _outer(np.add, places * image[axis], at)
        inside = _outer(np.logical_and, inside, valid)
    return np.where(inside, places, total), total


def _outer(combine: np.ufunc, a: Array, b: Array) -> Array:
    """[blocks, elements] of two groups of axes combined, blocks with blocks and elements with elements."""
    both = combine.outer(a, b).swapaxes(1, 2)
    return both.reshape(a.shape[0] * b.shape[0], -1)


def _tiles(node: Node) -> bool:
    """Whether the blocks lie side by side and are square, as DEPTH_TO_SPACE puts them."""
    window, image = node.ints("block_shape", 2) or [], node.ints("image_shape", 1) or []
    strides = node.attribute("strides") or [1] * len(window)
    dilations = node.attribute("dilations") or [1]
    return (
        len(window) == 2
        and window[0] == window[1] == strides[0] == strides[1]
        and not any(node.attribute("pads") or [0])
        and set(dilations) == {1}
        and not any(size % window[0] for size in image)
    )


def convert_col2im(emit: Emit) -> None:
    """Writes a Col2Im: DEPTH_TO_SPACE where the blocks tile the image, else SCATTER_ND at constant places."""
    node, steps, x = emit.node, fixed(emit), emit.input()
    window = node.ints("block_shape", 2) or []
    count, blocks, channels, elements = x.shape[0], x.shape[1], node.y.shape[1], int(np.prod(window))
    columns = steps.transpose(steps.reshape(x, (count, blocks, channels, elements)), (0, 1, 3, 2))
    if _tiles(node):
        rows = [size // window[0] for size in node.y.shape[2:]]
        blocks_first = steps.reshape(columns, (count, *rows, elements * channels))
        emit.operator("DEPTH_TO_SPACE", [blocks_first], emit.output(), block_size=window[0])
        return
    places, total = _column_places(node)
    rest = bool((places == total).any())
    every = (places + (total + rest) * np.arange(count)[:, None, None]).reshape(-1, 1)
    values = steps.reshape(columns, (len(every), channels))
    image = _scattered(emit, emit.ints("places", every), values, (count * (total + rest), channels))
    if rest:
        image = steps.slice(steps.reshape(image, (count, total + 1, channels)), 1, 0, total)
    steps.deliver(image)


def convert_max_unpool(emit: Emit) -> None:
    """Writes a MaxUnpool; where windows overlap, what falls on one place is averaged (it is one value)."""
    node, steps = emit.node, fixed(emit)
    shape = unpooled(node)
    size = int(np.prod(shape))
    values = steps.reshape(emit.input(), (node.x.size,))
    places = steps.reshape(steps.cast(emit.input(1), np.int32), (node.x.size, 1))
    image = _scattered(emit, places, values, (size,))
    strides = node.attribute("strides") or [1] * (node.x.rank - 2)
    if any(k > stride for k, stride in zip(node.attribute("kernel_shape"), strides, strict=True)):
        ones = emit.constant("ones", np.ones(node.x.size, np.float32))
        counts = steps.binary("MAXIMUM", _scattered(emit, places, ones, (size,)), 1.0)
        image = steps.binary("DIV", image, counts)
    image = steps.reshape(image, shape)
    image = steps.pad(image, [(0, more - less) for less, more in zip(shape, node.y.shape, strict=True)])
    steps.deliver(image)


def unpooled(node: Node) -> tuple[int, ...]:
    """The shape that the indices count in: what the window and its strides imply."""
    kernel, rank = node.attribute("kernel_shape"), node.x.rank - 2
    strides, pads = node.attribute("strides") or [1] * rank, node.attribute("pads") or [0] * 2 * rank
    sizes = zip(node.x.shape[2:], kernel, strides, pads[:rank], pads[rank:], strict=True)
    return (*node.x.shape[:2], *((n - 1) * stride + k - front - behind for n, k, stride, front, behind in sizes))


def large_enough(node: Node) -> str | None:
    """The output is at least as large as the window and its strides imply."""
    wanted = unpooled(node)
    small = any(a > b for a, b in zip(wanted, node.y.shape, strict=True))
    return f"its output {list(node.y.shape)} is smaller than {list(wanted)}" if small else None


REAL = of_types("float32")
OPS = (
    Op("Col2Im", convert_col2im, CHANNELS_LAST, None, (REAL, static_batch), since=18),
    Op("MaxUnpool", convert_max_unpool, NATURAL, None, (REAL, static_batch, large_enough), since=9),
)
