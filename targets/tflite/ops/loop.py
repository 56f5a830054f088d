"""Loops whose length is known only at run time: WHILE, with the body and the condition as subgraphs of their own.

    variables: pass number, trip count, condition, what the loop carries, what it reads from outside
    goes on while pass number < trip count and condition

Shapes are static: what a pass hands on has the shape and the type of what it was given. Values that each pass adds to a
row of them are carried as the whole row, of which a pass writes its own place (DYNAMIC_UPDATE_SLICE), so their number
must be known: from the trip count, or from the shape that the model gives the row. Where the loop then ends with
another number, the interpreter says so and fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.expansion import OPSET, Scope
from edgeship.targets.tflite.graph import Graph, Node, Tensor, Unsupported, constant
from edgeship.targets.tflite.op import Op

LOOP, UPDATE = "Loop", "UpdateRow"
FOREVER = (1 << 63) - 1


@dataclass(frozen=True)
class Body:
    """One pass: its nodes, what it reads (pass number, condition, carried, outside), and what it hands on.

    `cut`: so many of what is carried, at the end, are rows whose length is what the model says.
    """

    nodes: list[Node]
    step: Tensor
    going: Tensor
    carried: list[Tensor]
    outside: list[Tensor]
    verdict: Tensor
    values: list[Tensor]
    cut: int = 0


def keep_loop(scope: Scope, node: Node) -> list[Tensor]:
    """A WHILE in the place of the Loop."""
    graph: ir.Graph = node.attribute("body")
    given = [node.tensor(place) for place in range(2, len(node.inputs))]
    collected = len(graph.outputs) - 1 - len(given)
    length = certain = _length(node, graph)
    if collected and certain is None:
        length = _declared(node, collected)
    if collected and length is None:
        rule = "collects a value of each pass, and how many there are, which is its output's shape, shows at run time"
        accepted = "a constant trip count and a condition that does not end it before, or static shapes of its outputs"
        raise Unsupported(rule, f"{collected} such outputs, a computed number of passes", accepted)
    if scope.reading.dynamic:
        raise Unsupported("a loop of computed length among dynamic dimensions", "", "static dimensions")
    step = Tensor(f"{scope.prefix}/pass", (), np.dtype(np.int64))
    going = Tensor(f"{scope.prefix}/going", (), np.dtype(np.bool_))
    carried = [_variable(tensor) for tensor in given]
    rows: list[Tensor] = []

    def with_rows(outputs: list[Tensor]) -> list[Tensor]:
        kept, added = outputs[: len(given) + 1], outputs[len(given) + 1 :]
        rows.extend(Tensor(f"{scope.prefix}/row", (length or 0, *t.shape), t.dtype) for t in added)
        return [*kept, *(_extended(scope, row, step, value) for row, value in zip(rows, added, strict=True))]

    nodes, (verdict, *values) = scope.apart(graph, [step, going, *carried], with_rows)
    carried += rows
    given += [scope.op("Expand", np.zeros((), row.dtype), np.array(row.shape)) for row in rows]
    for before, after in zip(carried, values, strict=True):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            seen = f"{before.dtype} {list(before.shape)}, then {after.dtype} {list(after.shape)}"
            raise Unsupported(
                "a carried value changes its shape or type while passes are computed", seen, "one of both"
            )
    outside = _read_from_outside(nodes, [verdict, *values], {step, going, *carried})
    inner = {tensor: _variable(tensor) for tensor in outside}
    for each in nodes:
        each.inputs = [tensor if tensor is None else inner.get(tensor, tensor) for tensor in each.inputs]
    verdict, *values = [inner.get(tensor, tensor) for tensor in (verdict, *values)]
    cut = len(rows) if certain is None else 0
    body = Body(nodes, step, going, carried, list(inner.values()), verdict, values, cut)
    trips = node.tensor(0) if node.has(0) else constant(f"{scope.prefix}/trips", np.array(FOREVER))
    first = node.tensor(1) if node.has(1) else constant(f"{scope.prefix}/condition", np.array(True))
    outputs = [Tensor(f"{scope.prefix}/{place}", t.shape, t.dtype) for place, t in enumerate(given)]
    inputs: list[Tensor | None] = [_scalar(scope, trips), _scalar(scope, first), *given, *outside]
    scope.reading.nodes.append(Node(LOOP, node.name, inputs, outputs, {"body": body}, opset=OPSET))
    return list(outputs)


def _length(node: Node, graph: ir.Graph) -> int | None:
    """The number of passes, where it is known and nothing can end the loop before."""
    trips, going = (node.tensor(place).data if node.has(place) else None for place in (0, 1))
    if trips is None or (node.has(1) and (going is None or not going.all())) or not goes_on(graph):
        return None
    return int(trips.reshape(()))


def _declared(node: Node, collected: int) -> int | None:
    """The number of passes by the shapes that the model gives what is collected, where it gives one number."""
    shapes = [tensor.model_shape for tensor in node.outputs[-collected:]]
    lengths = {shape[0] if shape else None for shape in shapes}
    return lengths.pop() if len(lengths) == 1 else None


def goes_on(body: ir.Graph) -> bool:
    """Whether the body hands its condition on as it is."""
    value: ir.Value | None = body.outputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value is body.inputs[1]


def _extended(scope: Scope, row: Tensor, step: Tensor, value: Tensor) -> Tensor:
    """`row` with `value` in the place of pass `step`."""
    first = np.eye(1, row.rank, dtype=np.int32)[0]
    place = scope.op("Mul", scope.op("Cast", step, to=ir.DataType.INT32.value), first)
    after = Tensor(f"{row.name}/after", row.shape, row.dtype)
    inputs: list[Tensor | None] = [row, scope.op("Unsqueeze", value, np.array([0])), place]
    scope.reading.nodes.append(Node(UPDATE, after.name, inputs, [after], opset=OPSET))
    return after


def convert_update(emit: Emit) -> None:
    """Writes the new place of a row."""
    emit.operator("DYNAMIC_UPDATE_SLICE", [emit.input(0), emit.input(1), emit.input(2)], emit.output())


def _variable(tensor: Tensor) -> Tensor:
    """What stands for a tensor inside the loop, where nothing is quantized."""
    return Tensor(f"{tensor.name}/inside", tensor.shape, tensor.dtype)


def _scalar(scope: Scope, tensor: Tensor) -> Tensor:
    return scope.op("Reshape", tensor, np.zeros(0, np.int64)) if tensor.rank else tensor


def _read_from_outside(nodes: Sequence[Node], handed_on: Sequence[Tensor], own: set[Tensor]) -> list[Tensor]:
    made = {tensor for node in nodes for tensor in node.outputs} | own
    read = [tensor for node in nodes for tensor in node.tensors()] + list(handed_on)
    return [tensor for tensor in dict.fromkeys(read) if tensor not in made and not tensor.is_constant]


def known_body(node: Node) -> str | None:
    """Every operator of the body is one of this table."""
    from edgeship.targets.tflite.ops import REGISTRY

    body: Body = node.attribute("body")
    for inner in body.nodes:
        op = REGISTRY.get(inner.op_type)
        reason = "no TFLite conversion for this operator" if op is None else op.refusal(inner)
        if reason:
            return f"in its body, {inner.where}: {reason}"
    return None


def convert_while(emit: Emit) -> None:
    """Writes a loop: WHILE, and its two subgraphs."""
    from edgeship.targets.tflite.convert import write_nested

    body: Body = emit.node.attribute("body")
    trips = Tensor("trips", (), np.dtype(np.int64))
    after = Tensor("next", (), np.dtype(np.int64))
    count = Node("Add", "pass", [body.step, constant("one", np.array(1))], [after], opset=OPSET)
    variables = [body.step, trips, body.going, *body.carried, *body.outside]
    results = [after, trips, body.verdict, *body.values, *body.outside]
    less, goes_on = Tensor("before the end", (), np.dtype(np.bool_)), Tensor("goes on", (), np.dtype(np.bool_))
    tests = [
        Node("Less", "before the end", [body.step, trips], [less], opset=OPSET),
        Node("And", "goes on", [less, body.going], [goes_on], opset=OPSET),
    ]
    builder, name = emit.writer.builder, emit.node.name
    condition = write_nested(builder, f"{name}/condition", Graph(tests, _named(variables), {"goes on": goes_on}))
    passes = write_nested(builder, f"{name}/body", Graph([*body.nodes, count], _named(variables), _named(results)))
    start = emit.constant("start", np.array(0))
    inputs = [start, *(emit.input(place) for place in range(len(emit.node.inputs)))]
    outputs = [_like(emit, operand) for operand in inputs]
    whole = len(body.carried) - body.cut
    for place in range(whole):
        outputs[3 + place] = emit.output(place)
    emit.operator("WHILE", inputs, outputs, cond_subgraph_index=condition, body_subgraph_index=passes)
    for place in range(whole, len(body.carried)):
        _cut(emit, outputs[3 + place], outputs[0], emit.output(place))


def _cut(emit: Emit, row: Operand, count: Operand, y: Operand) -> None:
    """Writes as many elements of a row as there were passes: SLICE fails where these are not what `y` has room for."""
    number = emit.writer.reshape(emit.compute("CAST", [count], (), dtype=np.int32), (1,), (1,))
    rest = emit.ints("rest", row.shape[1:])
    size = emit.compute("CONCATENATION", [number, rest], (row.rank,), axis=0) if row.rank > 1 else number
    emit.operator("SLICE", [row, emit.ints("begin", [0] * row.rank), size], y)


def _named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{place}": tensor for place, tensor in enumerate(tensors)}


def _like(emit: Emit, operand: Operand) -> Operand:
    return emit.writer.new(f"{operand.name}/after", operand.shape, operand.dtype)


OPS = (
    Op(LOOP, convert_while, limits=(known_body,)),
    Op(UPDATE, convert_update, limits=(of_types("float32", "int8", "int32", "int64", "bool"),)),
)
