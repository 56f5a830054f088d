"""A float or QDQ ONNX model becomes the bytes of a TFLite file, or a complete list of what stands in the way."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.readback import read_back
from edgeship.calibration.types import Finding
from edgeship.calibration.writing.qdq import PLAN_KEY
from edgeship.targets.base import ConvertOptions, IoDtype
from edgeship.targets.tflite import dtypes, standard_metadata
from edgeship.targets.tflite.builder import Builder, Signature
from edgeship.targets.tflite.dynamic import Written, differences
from edgeship.targets.tflite.emit import Emit, Operand, Writer
from edgeship.targets.tflite.expansion import Expander
from edgeship.targets.tflite.flatfile import METADATA, METADATA_VERSION
from edgeship.targets.tflite.fusion import (
    drop_expansions,
    fuse_activations,
    fuse_biases,
    gather_rows,
    join_slices,
    split_in_front,
    widen_products,
)
from edgeship.targets.tflite.graph import (
    DEQUANTIZE,
    MALFORMED,
    QUANTIZE,
    WIDE_BITS,
    Graph,
    Node,
    Tensor,
    Unsupported,
    judged,
    malformed,
    unsigned,
)
from edgeship.targets.tflite.group_norms import join_group_norms
from edgeship.targets.tflite.layout import Layout, natural
from edgeship.targets.tflite.layout_plan import Arrangement, LayoutRule, View, decide
from edgeship.targets.tflite.layout_rules import NATURAL
from edgeship.targets.tflite.lower import lower
from edgeship.targets.tflite.op import Limit, Op
from edgeship.targets.tflite.ops import EXPANSIONS, REGISTRY
from edgeship.targets.tflite.quantization import left_in_float, settle

REFUSED = "the model cannot become TFLite:"
BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
WORTH_COLLECTING = 1 << 20
"""Bytes of constants from which on a collection pays: it takes the longer the more objects the process has."""


def check(model: ir.Model) -> list[Finding]:
    """Every node that cannot be converted, with the reason; empty when `convert` will succeed."""
    try:
        return _converted(model, ConvertOptions()).findings
    except UnsupportedError as error:
        return list(error.findings)


def notes(model: ir.Model) -> list[Finding]:
    """Every node between quantized tensors that is computed in real numbers, with the reason."""
    with _sound_model():
        model = read_back(model, run_time=True)
        if not any(node.op_type == DEQUANTIZE for node in model.graph.all_nodes()):
            return []
        (graph, *_), findings = _lowered(model)
        if findings or _refusals(graph):
            return []
        _fuse(graph)
        return left_in_float(graph, op_of)


def written(model: ir.Model, options: ConvertOptions) -> Conversion:
    """The TFLite model, to be finished.

    Raises UnsupportedError with all findings, InputError for an io_dtype that the model does not allow.
    """
    conversion = _converted(model, options)
    if conversion.findings:
        raise UnsupportedError(REFUSED, conversion.findings)
    return conversion


@contextmanager
def _sound_model() -> Iterator[None]:
    """Raises UnsupportedError where the model as a whole makes no sense to the code that reads it."""
    try:
        yield
    except (Unsupported, *MALFORMED) as error:
        raise UnsupportedError(REFUSED, [malformed("the model", error)]) from error


def _converted(model: ir.Model, options: ConvertOptions) -> Conversion:
    """The written model; what is dynamic in it is proved by writing it for other sizes too."""
    with _sound_model():
        if options.integer_only is None:
            options = replace(options, integer_only=options.io_dtype != "float32" or _is_of_integers(model))
        model = read_back(model, run_time=True)
        (graph, *twins), findings = _lowered(model)
        del model
        conversion = Conversion(graph, findings, options)
        for graph in twins:
            if not conversion.findings:
                twin = Conversion(graph, [], options)
                conversion.findings += twin.findings or differences(conversion.written, twin.written)
        return conversion


def _is_of_integers(model: ir.Model) -> bool:
    """Whether 8-bit integers go in or out, or are those of TFLite's kernels: tf2onnx read a quantized file."""
    ends = (*model.graph.inputs, *model.graph.outputs)
    was_tflite = model.producer_name == "tf2onnx" and PLAN_KEY not in model.metadata_props
    return was_tflite or any(value.dtype in BYTES for value in ends)


def _lowered(model: ir.Model) -> tuple[list[Graph], list[Finding]]:
    return lower(model, Expander(EXPANSIONS, _is_refused, set(REGISTRY)))


def op_of(node: Node) -> Op | None:
    """What is known of the node's operator, or None."""
    return REGISTRY.get(node.op_type)


def _limits_of(node: Node) -> tuple[Limit, ...] | None:
    op = op_of(node)
    return None if op is None else op.limits


def _rule_of(node: Node) -> LayoutRule:
    op = op_of(node)
    return op.layout if op else NATURAL


def _fuse(graph: Graph) -> None:
    drop_expansions(graph)
    dtypes.settle_types(graph, _limits_of)
    fuse_biases(graph)
    fuse_activations(graph, op_of)
    widen_products(graph)
    gather_rows(graph)
    join_group_norms(graph)
    join_slices(graph)
    split_in_front(graph)
    graph.prune()


@dataclass(frozen=True)
class Border:
    """How one input or output of the file differs from the ONNX model's, for whoever runs it."""

    name: str
    operand: Operand
    layout: Layout
    real: bool

    def described(self) -> dict[str, Any]:
        """As JSON: `axes[i]` is the ONNX axis that physical axis i holds."""
        quant = self.operand.quant if self.real else None
        return {
            "name": self.name,
            "axes": list(self.layout.perm),
            "dtype": self.operand.dtype.name,
            **({"scale": float(quant.scale), "zero_point": int(quant.zero_point)} if quant else {}),
        }

    def standard(self) -> standard_metadata.Border:
        """As TFLite Metadata has it."""
        operand = self.operand
        return standard_metadata.Border(self.name, tuple(operand.shape), list(self.layout.perm) == [0, 2, 3, 1])


class Conversion:
    """One graph on its way: arranged, written. `findings`: what is known already to stand in the way."""

    def __init__(self, graph: Graph, findings: list[Finding], options: ConvertOptions) -> None:
        self.graph, self.findings, self.options = graph, [*findings, *_refusals(graph)], options
        self.marks: list[tuple[str, int]] = []
        self.inputs: list[Border] = []
        self.outputs: list[Border] = []
        if self.findings:
            return
        _fuse(self.graph)
        self.builder = Builder(halves=self.graph.has_halves, integer_only=bool(options.integer_only))
        settle(self.graph, op_of, integer_only=self.builder.integer_only)
        _set_io(self.graph, options.io_dtype)
        self.plan = decide(self.graph, _rule_of, options.io_layout)
        sizes = [(self.graph.inputs[each.input], each) for each in self.graph.dimensions]
        self.writer = Writer(self.builder, self.plan, sizes)
        self.inputs = [
            self._border(name, self.writer.declare(tensor, self.plan.layouts[tensor]), self.plan.layouts[tensor])
            for name, tensor in self.graph.inputs.items()
        ]
        for node in self.graph.nodes:
            self._write(node, self.plan.arrangements[node])
        if not self.findings:
            for name, tensor in self.graph.outputs.items():
                self.outputs.append(self._output(name, tensor))

    def _write(self, node: Node, arrangement: Arrangement) -> None:
        op = op_of(node)
        if op is None or any(t not in self.writer.produced and not t.is_constant for t in node.tensors()):
            return
        with judged(node.where, self.findings):
            op.convert(Emit(self.writer, node, arrangement))
        self.marks.append((node.where, self.builder.count))

    @property
    def written(self) -> Written:
        """The operators, to compare with those for other sizes."""
        return Written(self.builder.written, self.marks)

    def _output(self, name: str, tensor: Tensor) -> Border:
        """The output in its final layout; a copy where it is an input, a constant, or another output already."""
        layout = self.plan.outputs[name]
        operand = self.writer.arranged(tensor, layout)
        taken = [border.operand for border in (*self.inputs, *self.outputs)]
        if tensor.is_constant or operand in taken:
            copy = self.writer.new(name, operand.shape, operand.dtype, operand.quant, signature=operand.signature)
            operand = self.writer.reshape(operand, operand.shape, operand.signature, copy)
        return self._border(name, operand, layout)

    def _border(self, name: str, operand: Operand, layout: Layout) -> Border:
        return Border(name, operand, layout, name not in self.graph.integers)

    def finish(self) -> bytes:
        """The file's bytes. Nothing else can be asked of the conversion afterwards."""
        facts = self.options.metadata
        described = {
            "version": METADATA_VERSION,
            "inputs": [border.described() for border in self.inputs],
            "outputs": [border.described() for border in self.outputs],
            "metadata": {key: value for key, value in sorted(facts.items()) if key != standard_metadata.LABELS_KEY},
        }
        if self.writer.torn:
            described["torn"] = self.writer.torn
        signature = Signature(_indices(self.inputs), _indices(self.outputs))
        stored = {METADATA: json.dumps(described, sort_keys=True, separators=(",", ":")).encode()}
        if facts:
            inputs, outputs = ([each.standard() for each in borders] for borders in (self.inputs, self.outputs))
            stored[standard_metadata.NAME] = standard_metadata.describe(inputs, outputs, facts)
        del self.graph, self.plan, self.writer
        if self.builder.size >= WORTH_COLLECTING:
            _make_room()
        with _sound_model():
            content = self.builder.finish(signature, stored)
        return standard_metadata.with_labels(content, standard_metadata.labels_of(facts))


def _make_room() -> None:
    """Gives back the memory of what nobody holds, so that the file takes its place.

    A model is full of cycles, and its weights are too small for glibc to give back one by one: it keeps what they
    leave, in pieces that are too small for the file.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def write_nested(builder: Builder, name: str, graph: Graph) -> int:
    """The index of another subgraph of the file, written for `graph`; what goes in and out has ONNX's order of axes.

    Raises Unsupported for a node that cannot be expressed.
    """
    _fuse(graph)
    settle(graph, op_of, integer_only=builder.integer_only)
    plan = decide(graph, _rule_of, "nchw")
    nested, index = builder.nested(name)
    writer = Writer(nested, plan)
    inputs = [writer.declare(tensor, plan.layouts[tensor]) for tensor in graph.inputs.values()]
    for node in graph.nodes:
        op = op_of(node)
        if op is None:
            raise Unsupported("no TFLite conversion for this operator", node.where, "see the operator table")
        op.convert(Emit(writer, node, plan.arrangements[node]))
    outputs: list[Operand] = []
    for output, tensor in graph.outputs.items():
        operand = writer.arranged(tensor, plan.outputs[output])
        if tensor.is_constant or operand in outputs:
            copy = writer.new(output, operand.shape, operand.dtype, operand.quant)
            operand = writer.reshape(operand, operand.shape, operand.signature, copy)
        outputs.append(operand)
    nested.begin_and_end([operand.index for operand in inputs], [operand.index for operand in outputs])
    return index


def _indices(borders: list[Border]) -> Mapping[str, int]:
    return {border.name: border.operand.index for border in borders}


def _refusals(graph: Graph) -> list[Finding]:
    """The nodes whose operator is not known, or that are beyond it."""
    findings = []
    for node in graph.nodes:
        op = op_of(node)
        if op is None:
            findings.append(Finding(node.where, "no TFLite conversion for this operator", "", "see the operator table"))
            continue
        if not all(tensor.known for tensor in node.tensors()):
            continue  # what is wrong before it is listed already; its own shape cannot be judged
        with judged(node.where, findings):
            reason = _refusal(op, node)
            if reason:
                findings.append(Finding(node.where, reason))
    return findings


def _is_refused(node: Node) -> bool:
    """Whether the node has no operator entry, or one that cannot take it."""
    op = op_of(node)
    try:
        return op is None or _refusal(op, node) is not None
    except (Unsupported, *MALFORMED):
        return True


def _refusal(op: Op, node: Node) -> str | None:
    """Why the node cannot be converted, or None; its layout rule is tried too, since it reads the node's parameters."""
    reason = dtypes.refusal(node, op.limits) or op.refusal(node)
    if reason is None:
        incoming = tuple(None if t is None or t.is_constant else natural(t.rank) for t in node.inputs)
        op.layout.arrangements(View(node, incoming, (None,) * len(node.outputs)))
    return reason


def _set_io(graph: Graph, dtype: IoDtype) -> None:
    """Makes the graph's real inputs and outputs integers: the border's QUANTIZE and DEQUANTIZE go, or change type for
    uint8.
    """
    if dtype == "float32":
        return
    uses, producers = graph.consumers(), graph.producers()
    for name, tensor in list(graph.inputs.items()):
        if not tensor.is_float or name in graph.integers:
            continue
        readers = uses.get(tensor, [])
        if len(readers) != 1 or readers[0].op_type != QUANTIZE:
            raise InputError(
                f"input {name!r} is read as a real number; io_dtype {dtype} needs a model that quantizes its inputs"
            )
        check_width("input", name, readers[0].y, dtype)
        graph.inputs[name] = _input_as(graph, readers[0], name, dtype)
    for name, tensor in list(graph.outputs.items()):
        if not tensor.is_float or name in graph.integers:
            continue
        producer = producers.get(tensor)
        if producer is None or producer.op_type != DEQUANTIZE:
            raise InputError(
                f"output {name!r} is a real number; io_dtype {dtype} needs a model that quantizes its outputs"
            )
        check_width("output", name, producer.x, dtype)
        graph.outputs[name] = _output_as(graph, producer, name, dtype)
    graph.prune()


def check_width(what: str, name: str, tensor: Tensor, dtype: IoDtype) -> None:
    """Raises InputError for an input or output of 16 bits."""
    if tensor.quant is not None and tensor.quant.spec.bits == WIDE_BITS:
        raise InputError(f"{what} {name!r} has 16 bits; io_dtype {dtype} has 8; accepted: float32")


def _input_as(graph: Graph, quantize: Node, name: str, dtype: IoDtype) -> Tensor:
    if dtype == "int8":
        graph.nodes.remove(quantize)
        quantize.y.name = name
        return quantize.y
    quantize.inputs = [unsigned(quantize.y, name)]
    return quantize.x


def _output_as(graph: Graph, dequantize: Node, name: str, dtype: IoDtype) -> Tensor:
    if dtype == "int8":
        return dequantize.x
    output = unsigned(dequantize.x, name)
    graph.nodes.append(Node(QUANTIZE, name, [dequantize.x], [output]))
    return output
