"""What is written as one operator instead of several: TFLite's kernels clamp for free what a RELU would read and write
again, an int8 kernel makes the integers itself, and what takes a tensor apart is one split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE, Graph, Node, Tensor, Unsupported, constant
from edgeship.targets.tflite.layout import extents
from edgeship.targets.tflite.op import Op

BROADCASTING = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mul", "Or", "Sub", "Where",
})  # fmt: skip
"""Operators whose kernels repeat an operand that is narrower than another."""
MOST_PARTS = 4
"""Outputs of the SPLIT that XNNPACK has a kernel for; it copies slices as fast."""
_RANGES = {(0.0, np.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}


def clip_range(node: Node) -> tuple[float, float]:
    """The interval a Relu or Clip clamps to. Raises Unsupported when it is computed at run time."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = node.parameter("min", 1), node.parameter("max", 2)
    largest = float(np.finfo(np.float32).max)
    bottom = -np.inf if low is None or not low.size else float(low.reshape(-1)[0])
    top = np.inf if high is None or not high.size else float(high.reshape(-1)[0])
    return -np.inf if bottom <= -largest else bottom, np.inf if top >= largest else top


def activation_of(node: Node) -> str | None:
    """The schema's name of the fused activation that does what `node` does, or None."""
    if node.op_type not in ("Relu", "Clip") or not node.x.is_float:
        return None
    try:
        return _RANGES.get(clip_range(node))
    except Unsupported:
        return None


def fuse_biases(graph: Graph) -> None:
    """Makes the constant row that is added to a product by a constant matrix, and to nothing rounded, its bias."""
    uses, producers = graph.consumers(), graph.producers()
    kept = set(graph.outputs.values())
    for node in list(graph.nodes):
        if node.op_type != "Add" or len(node.inputs) != 2:
            continue
        product, row = node.tensor(0), node.tensor(1)
        if product.is_constant:
            product, row = row, product
        producer = producers.get(product)
        if producer is None or producer.op_type != "MatMul" or len(producer.inputs) != 2 or not row.is_constant:
            continue
        b, columns = producer.tensor(1), product.shape[-1] if product.rank else 0
        if not (b.is_constant and b.rank == 2 and b.is_float and product.rank > 1 and product.rank >= row.rank):
            continue
        if product.quant or product in kept or len(uses[product]) != 1 or row.size != columns:
            continue
        if row.shape and row.shape[-1] == columns and node.y.shape == product.shape:
            producer.inputs.append(row)
            producer.outputs = [node.y]
            producers[node.y] = producer
            graph.nodes.remove(node)


def fuse_activations(graph: Graph, op_of: Callable[[Node], Op | None]) -> None:
    """Removes each Relu or Clip whose producer can do it and whose input nobody else reads.

    Between integers only where both tensors have the same parameters: then clamping before or after is the same.
    """
    uses, producers = graph.consumers(), graph.producers()
    kept = set(graph.outputs.values())
    for node in list(graph.nodes):
        activation = activation_of(node)
        if activation is None:
            continue
        producer = producers.get(node.x)
        if producer is None or producer.activation != "NONE" or node.x in kept or len(uses[node.x]) != 1:
            continue
        op = op_of(producer)
        if op is None or not op.takes_activation(producer) or len(producer.outputs) != 1:
            continue
        if node.x.quant and not (node.y.quant and node.x.quant.same_as(node.y.quant)):
            continue
        producer.activation = activation
        producer.outputs = [node.y]
        producers[node.y] = producer
        graph.nodes.remove(node)


def absorb_quantizers(graph: Graph, read_as: Mapping[Tensor, str]) -> None:
    """Lets a node whose only reader is QuantizeLinear write the integers itself.

    Quantizers add to the name of either side of the pair; the shorter one is the original's.
    """
    uses, producers = graph.consumers(), graph.producers()
    kept = set(graph.outputs.values())
    for node in list(graph.nodes):
        if node.op_type != QUANTIZE or node.x.quant or node.x in kept or len(uses[node.x]) != 1:
            continue
        producer = producers.get(node.x)
        if producer is None or producer.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        node.y.name = min(node.x.name, read_as.get(node.y, node.x.name), key=len)
        producer.outputs = [node.y if tensor is node.x else tensor for tensor in producer.outputs]
        producers[node.y] = producer
        graph.nodes.remove(node)


def widen_products(graph: Graph) -> None:
    """Writes a Gemm behind and before Reshapes, which only make rows of what has more axes, or the other way round, as
    the MatMul that it was: FULLY_CONNECTED takes rows under any shape.
    """
    uses, producers, kept = graph.consumers(), graph.producers(), set(graph.outputs.values())
    gone: set[Node] = set()
    for node in graph.nodes:
        if node.op_type != "Gemm" or not _is_plain_product(node):
            continue
        before, readers = producers.get(node.x), uses.get(node.y, [])
        after = readers[0] if len(readers) == 1 else None
        if before is None or after is None or {before.op_type, after.op_type} != {"Reshape"} or node.y in kept:
            continue
        wide, out = before.x, after.y
        rows_stay = wide.rank > 1 and extents(wide)[-1] == extents(node.x)[-1] and alike(wide, node.x)
        rows_return = out.rank > 1 and extents(out)[-1] == extents(node.y)[-1] and alike(out, node.y)
        if rows_stay and rows_return and extents(wide)[:-1] == extents(out)[:-1]:
            node.inputs[0], node.outputs = wide, [out]
            producers[out] = node
            gone.add(after)
        elif rows_stay:
            node.inputs[0], node.outputs = wide, [_rows_of(wide, node.y)]
            after.inputs[0] = node.y
        elif rows_return and len(uses[node.x]) == 1 and node.x not in kept:
            before.outputs = [_rows_of(out, node.x)]
            node.inputs[0], node.outputs = before.y, [out]
            producers[out] = node
            gone.add(after)
        else:
            continue
        node.inputs[1] = _turned(node.tensor(1)) if node.attribute("transB", 0) else node.tensor(1)
        node.op_type, node.attributes = "MatMul", {}
    graph.nodes = [node for node in graph.nodes if node not in gone]


def _rows_of(wide: Tensor, flat: Tensor) -> Tensor:
    """The matrix `flat` with its rows under the first axes of `wide`."""
    rows = _like(flat, flat.name, *((*w[:-1], f[-1]) for w, f in zip(_extents(wide), _extents(flat), strict=True)))
    rows.model_shape = flat.shape
    return rows


def _is_plain_product(node: Node) -> bool:
    """Whether a Gemm is rows times a constant matrix, plus a constant row if anything."""
    b, factors = node.tensor(1), (node.attribute("alpha", 1.0), node.attribute("beta", 1.0))
    if b.data is None:
        return False
    if node.attribute("transA", 0) or factors != (1.0, 1.0) or (b.quant is not None and b.quant.zero_point.any()):
        return False
    row = node.tensor(2) if node.has(2) else None
    return row is None or (row.is_constant and row.size == node.y.shape[-1] and row.shape[-1:] == node.y.shape[-1:])


def _turned(b: Tensor) -> Tensor:
    """A constant matrix with rows and columns exchanged (a view)."""
    if b.data is None:
        raise Unsupported("needs constant weights", f"{b.name} is computed", "a constant")
    quant = b.quant
    if quant is not None and quant.spec.axis is not None:
        quant = replace(quant, spec=replace(quant.spec, axis=1 - quant.spec.axis))
    return constant(b.name, b.data.T, quant, b.dtype)


def drop_expansions(graph: Graph) -> None:
    """Lets operators that broadcast read what an Expand was made of, where their other operands are as wide."""
    producers, kept = graph.producers(), set(graph.outputs.values())
    for node in graph.nodes:
        if node.op_type not in BROADCASTING:
            continue
        for place, tensor in enumerate(node.inputs):
            made = None if tensor is None else producers.get(tensor)
            if tensor is None or made is None or made.op_type != "Expand" or tensor in kept:
                continue
            narrow = made.x
            if not alike(narrow, tensor):
                continue
            others = [t for other, t in enumerate(node.inputs) if other != place and t is not None]
            if np.broadcast_shapes(extents(narrow), *map(extents, others)) == extents(node.y):
                node.inputs[place] = narrow


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether both are real numbers, or integers of the same parameters."""
    if a.quant is None or b.quant is None:
        return a.quant is b.quant
    return a.quant.same_as(b.quant)


def gather_rows(graph: Graph) -> None:
    """Writes a GatherElements whose positions are the same along whole rows as a Gather of these rows, for each batch.

    That is how decoders take the boxes and features of their best queries: one position is expanded over a row.
    """
    producers = graph.producers()
    nodes: list[Node] = []
    for node in graph.nodes:
        axis = node.axis(0) if node.op_type == "GatherElements" else 0
        positions = _row_positions(node, axis, producers) if node.op_type == "GatherElements" else None
        if positions is None:
            nodes.append(node)
            continue
        if not positions.is_constant and positions.rank > axis + 1:
            extent = (positions.shape[: axis + 1], positions.signature[: axis + 1])
            flat = _like(positions, f"{positions.name}/rows", *extent)
            flat.is_position = positions.is_position
            nodes.append(_reshape(positions, flat, node))
            positions = flat
        attributes = {"axis": axis, "batch_dims": axis}
        nodes.append(Node("Gather", node.name, [node.x, positions], node.outputs, attributes, opset=node.opset))
    graph.nodes = nodes


def _row_positions(node: Node, axis: int, producers: Mapping[Tensor, Node]) -> Tensor | None:
    """The one position of each row that a GatherElements takes; None where it takes parts of rows."""
    x, positions, rank = node.x, node.tensor(1), node.x.rank
    if axis == rank - 1 or any(a != b for place, (a, b) in enumerate(_both(x, positions)) if place != axis):
        return None
    if positions.data is not None:
        first = positions.data[(*[slice(None)] * (axis + 1), *[slice(1)] * (rank - axis - 1))]
        rows = first.reshape(positions.shape[: axis + 1])
        return constant(positions.name, rows) if (positions.data == first).all() else None
    made = producers.get(positions)
    if made is None or made.op_type not in ("Expand", "Tile") or made.x.rank != rank:
        return None
    pairs = enumerate(_both(made.x, positions))
    return made.x if all(a == b if place <= axis else a[0] == 1 for place, (a, b) in pairs) else None


def _both(a: Tensor, b: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The sizes of two tensors' axes side by side, each with what its signature says."""
    first, second = (list(zip(tensor.shape, tensor.signature, strict=True)) for tensor in (a, b))
    return list(zip(first, second, strict=True))


def join_slices(graph: Graph) -> None:
    """Writes Slices that take a tensor apart into equal pieces as one Split, as newer exporters do not."""
    for tensor, readers in graph.consumers().items():
        pieces: dict[int, list[tuple[int, int, Node]]] = {}
        for node in readers:
            if node.op_type == "Slice" and node.x is tensor and (cut := _single_cut(node)):
                pieces.setdefault(cut[0], []).append((*cut[1:], node))
        for axis, cuts in pieces.items():
            cuts.sort(key=lambda cut: cut[:2])
            starts, ends = [start for start, _, _ in cuts], [end for _, end, _ in cuts]
            whole = [0, *ends[:-1]] == starts and ends[-1] == tensor.shape[axis]
            if whole and 2 <= len(cuts) <= MOST_PARTS and len({end - start for start, end, _ in cuts}) == 1:
                nodes = [node for _, _, node in cuts]
                outputs = [node.y for node in nodes]
                split = Node("Split", nodes[0].name, [tensor], outputs, {"axis": axis}, opset=nodes[0].opset)
                substitute(graph, nodes, [split])
                break


def _single_cut(node: Node) -> tuple[int, int, int] | None:
    """Axis, start and end of a Slice that cuts one static axis in steps of 1; else None."""
    try:
        starts, ends = node.ints("starts", 1) or [], node.ints("ends", 2) or []
        axes, steps = node.ints("axes", 3) or list(range(len(starts))), node.ints("steps", 4) or [1]
    except Unsupported:
        return None
    if len(starts) != 1 or len(axes) != 1 or steps != [1]:
        return None
    axis = axes[0] + node.x.rank if axes[0] < 0 else axes[0]
    if node.x.signature[axis] == -1:
        return None
    chosen = range(node.x.shape[axis])[starts[0] : ends[0]]
    return (axis, chosen.start, chosen.stop) if len(chosen) else None


def split_in_front(graph: Graph) -> None:
    """Writes what takes a tensor apart, such as queries, keys and values, as a Split of an axis of its own in front.

    That is what Gathers of one index each do together, and a Split whose parts are then cut into heads. The new axis
    can be moved with the others, so that the whole changes order once instead of every part.
    """
    uses, kept = graph.consumers(), set(graph.outputs.values())
    for tensor, readers in uses.items():
        if tensor in kept or tensor.is_constant:
            continue
        first = readers[0]
        axis = _picked_axis(tensor, readers)
        if axis is not None:
            picks = sorted(readers, key=_pick)
            substitute(graph, readers, _taken_apart(tensor, axis, [pick.y for pick in picks], first))
        elif len(readers) == 1 and first.op_type == "Split" and _is_cut_further(first, uses, kept):
            axis, count = first.axis(0), len(first.outputs)
            sizes = [[*extent[:axis], count, first.y.shape[axis], *extent[axis + 1 :]] for extent in _extents(tensor)]
            parts = _like(tensor, f"{tensor.name}/parts", *sizes)
            cut = _reshape(tensor, parts, first)
            substitute(graph, readers, [cut, *_taken_apart(parts, axis, first.outputs, first)])


def _taken_apart(x: Tensor, axis: int, parts: Sequence[Tensor], like: Node) -> list[Node]:
    """The nodes that make the tensor at every place of one axis of `x`."""
    order = [axis, *(a for a in range(x.rank) if a != axis)]
    front = _like(x, f"{x.name}/front", *([extent[a] for a in order] for extent in _extents(x)))
    slices = [_like(part, f"{part.name}/part", *([1, *extent] for extent in _extents(part))) for part in parts]
    return [
        Node("Transpose", like.name, [x], [front], {"perm": order}, opset=like.opset),
        Node("Split", like.name, [front], slices, {"axis": 0}, opset=like.opset),
        *(_reshape(piece, part, like) for piece, part in zip(slices, parts, strict=True)),
    ]


def substitute(graph: Graph, old: Sequence[Node], new: Sequence[Node]) -> None:
    """Puts the new nodes where the first of the old ones was."""
    place = min(graph.nodes.index(node) for node in old)
    graph.nodes[place:place] = new
    graph.nodes = [node for node in graph.nodes if node not in old]


def _extents(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tensor.shape, tensor.signature


def _like(tensor: Tensor, name: str, shape: Sequence[int], signature: Sequence[int]) -> Tensor:
    return Tensor(name, tuple(shape), tensor.dtype, tensor.quant, signature=tuple(signature))


def _reshape(x: Tensor, y: Tensor, like: Node) -> Node:
    return Node("Reshape", like.name, [x, constant("shape", np.array(y.signature, np.int64))], [y], opset=like.opset)


def _is_cut_further(split: Node, uses: Mapping[Tensor, list[Node]], kept: set[Tensor]) -> bool:
    """Whether the Split makes equal parts of a static axis, and each is only read to cut that axis again."""
    axis = split.axis(0)
    if len({part.shape for part in split.outputs}) > 1 or split.x.signature[axis] == -1:
        return False
    return all(
        part not in kept
        and all(
            node.op_type == "Reshape" and node.y.rank > part.rank and node.y.shape[: axis + 1] != part.shape[: axis + 1]
            for node in uses.get(part, [])
        )
        for part in split.outputs
    )


def _picked_axis(tensor: Tensor, readers: Sequence[Node]) -> int | None:
    """The axis along which the readers are Gathers of one constant index each, every index once; else None."""
    if len(readers) < 2 or any(node.op_type != "Gather" or node.x is not tensor for node in readers):
        return None
    axis = readers[0].axis(0)
    indices = [node.tensor(1) for node in readers]
    if any(node.axis(0) != axis for node in readers) or any(i.rank != 0 or not i.is_constant for i in indices):
        return None
    if tensor.signature[axis] != len(readers):
        return None
    return axis if sorted(map(_pick, readers)) == list(range(len(readers))) else None


def _pick(node: Node) -> int:
    index = int(node.tensor(1).values())
    return index + node.x.shape[node.axis(0)] if index < 0 else index
