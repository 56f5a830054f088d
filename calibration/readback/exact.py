"""LayerNormalization and LpNormalization again of what `edgeship.calibration.writing.exact` makes of them.

They read the real numbers as before, for runtimes whose own kernels are to be preferred, and for converters that write
the exact form themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from edgeship.calibration.readback.rewrite import known, place

_ROW = ("Sub", "Mul", "Mul", "Add")
_INVERSE = ("Div", "Add", "Sqrt", "Add", "Relu", "Sub", "Div", "ReduceSum", "Mul")
"""What leads to a row's 1 / deviation, backwards along first operands (of the first Div, along the second)."""


def has_exact(model: ir.Model) -> bool:
    """Whether something reads integers under the scale 1 next to those that read them as real numbers."""
    return any(True for _ in _whole(model.graph))


def with_operators(model: ir.Model) -> ir.Model:
    """The model with its normalizations as operators; itself where they are. It is not modified."""
    if has_exact(model):
        model = model.clone()
        undo_exact(model)
    return model


def undo_exact(model: ir.Model) -> None:
    """Rewrites `model` in place; what has another form stays as it is."""
    for node, dequantize in list(_whole(model.graph)):
        readers = [reader for reader, _ in node.outputs[0].uses()]
        for reader in readers:
            if reader.op_type == "LpNormalization":
                reader.replace_input_with(0, dequantize.outputs[0])
            elif reader.op_type == "Sub" and reader.inputs[0] is node.outputs[0]:
                _fold(model.graph, reader, dequantize)
        _remove_idle(model.graph, node)


def operator_of(node: ir.Node) -> str:
    """The operator that a node computes, or that it is the last operation of."""
    chain = node if node.op_type == "Mul" else node.inputs[0].producer() if node.inputs and node.inputs[0] else None
    is_last = node.op_type in ("Add", "Mul") and chain is not None and chain.op_type == "Mul"
    return "LayerNormalization" if is_last and chain is not None and _normal(chain) else node.op_type


def _normal(scaled: ir.Node) -> bool:
    """Whether a Mul is that of a normalization's rows and their scale."""
    normal = scaled.inputs[0].producer() if scaled.inputs[0] is not None else None
    return normal is not None and normal.op_type == "Mul" and _backwards(place(normal, 1)) is not None


def is_whole(dequantize: ir.Node, quantize: ir.Node) -> bool:
    """Whether a DequantizeLinear gives integers another meaning than the QuantizeLinear that makes them."""
    return not _same(dequantize.inputs[1:], quantize.inputs[1:])


def _whole(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Each DequantizeLinear with the scale 1 of integers that another one reads with the scale they were made with."""
    for node in graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        source, scale = node.inputs[0].producer(), known(place(node, 1))
        if source is None or source.op_type != "QuantizeLinear" or scale is None or scale.size != 1 or scale != 1:
            continue
        same = [r for r, _ in node.inputs[0].uses() if r is not node and _same(r.inputs[1:], source.inputs[1:])]
        if same and is_whole(node, source):
            yield node, same[0]


def _same(a: Sequence[ir.Value | None], b: Sequence[ir.Value | None]) -> bool:
    if len(a) != len(b):
        return False
    pairs = ((x, y, known(x), known(y)) for x, y in zip(a, b, strict=True))
    return all(x is y or (p is not None and q is not None and np.array_equal(p, q)) for x, y, p, q in pairs)


def _fold(graph: ir.Graph, centred: ir.Node, dequantize: ir.Node) -> None:
    """Writes a LayerNormalization in the place of the chain that begins with `centred`, if it is one."""
    chain = _chain(centred)
    if len(chain) < 3:
        return
    inverse = _backwards(place(chain[1], 1))
    if inverse is None:
        return
    root, epsilon, axes = inverse[0], known(place(inverse[3], 1)), known(place(inverse[7], 1))
    scale, bias = place(chain[2], 1), place(chain[3], 1) if len(chain) > 3 else None
    step = known(place(dequantize, 1))
    if epsilon is None or axes is None or step is None or known(scale) is None:
        return
    attributes = {"axis": int(axes.min()), "epsilon": float(np.float32(float(epsilon) * float(step) ** 2))}
    last = chain[-1]
    inputs = [dequantize.outputs[0], scale, *([] if bias is None else [bias])]
    name = (root.name or "").rsplit("/", 1)[0] or last.name
    old = last.outputs[0]
    made = ir.Value(name=old.name, type=old.type, shape=old.shape)
    graph.insert_before(last, ir.node("LayerNormalization", inputs, attributes, name=name, outputs=[made]))
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    old.name = f"{old.name}__single"
    _remove_idle(graph, last)


def _chain(centred: ir.Node) -> list[ir.Node]:
    """(x - mean) inverse scale [+ bias], as far as the nodes follow one another and nothing else reads between."""
    found = [centred]
    for op_type in _ROW[1:]:
        value = found[-1].outputs[0]
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output() or uses[0][1] != 0 or uses[0][0].op_type != op_type:
            break
        if len(found) > 1 and known(place(uses[0][0], 1)) is None:
            break
        found.append(uses[0][0])
    return found


def _backwards(value: ir.Value | None) -> list[ir.Node] | None:
    """The nodes that make 1 / deviation, the last first; None where they are others."""
    found: list[ir.Node] = []
    for op_type in _INVERSE:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != op_type:
            return None
        found.append(node)
        value = place(node, 1 if not found[1:] else 0)
    return found


def _remove_idle(graph: ir.Graph, node: ir.Node) -> None:
    """Removes the node and those before it that nothing reads any more; QuantizeLinear and its reader stay."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        makers = [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
        graph.remove(node, safe=True)
        waiting += [maker for maker in makers if maker.op_type != "QuantizeLinear"]
