"""A float or QDQ ONNX model becomes the bytes of a TFLite file, or a complete list of what stands in the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.types import Finding
from edgeship.targets.base import ConvertOptions, IoDtype
from edgeship.targets.tflite.builder import Builder, Signature
from edgeship.targets.tflite.emit import Emit, Operand, Writer
from edgeship.targets.tflite.expansion import Expander
from edgeship.targets.tflite.flatfile import METADATA, METADATA_VERSION
from edgeship.targets.tflite.fusion import fuse_activations
from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE, Graph, Node, Tensor, Unsupported, unsigned
from edgeship.targets.tflite.layout import Arrangement, Layout, LayoutRule, View, decide, natural
from edgeship.targets.tflite.layout_rules import NATURAL
from edgeship.targets.tflite.lower import lower
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops import EXPANSIONS, REGISTRY
from edgeship.targets.tflite.quantization import settle

ELEMENT_TYPES = ("float32", "int8", "uint8", "int16", "int32", "int64", "bool")
"""What TFLite's kernels compute on, of all that its schema can store."""


def check(model: ir.Model) -> list[Finding]:
    """Every node that cannot be converted, with the reason; empty when `convert` will succeed."""
    try:
        return _Conversion(model, ConvertOptions()).findings
    except UnsupportedError as error:
        return list(error.findings)


def convert(model: ir.Model, options: ConvertOptions) -> bytes:
    """The TFLite file.

    Raises UnsupportedError with all findings, InputError for an io_dtype that the model does not allow.
    """
    conversion = _Conversion(model, options)
    if conversion.findings:
        raise UnsupportedError("the model cannot become TFLite:", conversion.findings)
    return conversion.finish()


def op_of(node: Node) -> Op | None:
    """What is known of the node's operator, or None."""
    return REGISTRY.get(node.op_type)


def _rule_of(node: Node) -> LayoutRule:
    op = op_of(node)
    return op.layout if op else NATURAL


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


class _Conversion:
    """One model on its way: lowered, arranged, written."""

    def __init__(self, model: ir.Model, options: ConvertOptions) -> None:
        self.options = options
        self.inputs: list[Border] = []
        self.outputs: list[Border] = []
        self.graph, self.findings = lower(model, Expander(EXPANSIONS, _is_refused, set(REGISTRY)))
        self.findings += _refusals(self.graph)
        if self.findings:
            return
        fuse_activations(self.graph, op_of)
        settle(self.graph, op_of)
        _set_io(self.graph, options.io_dtype)
        self.plan = decide(self.graph, _rule_of, options.io_layout)
        self.builder = Builder()
        self.writer = Writer(self.builder, self.plan)
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
        try:
            op.convert(Emit(self.writer, node, arrangement))
        except Unsupported as error:
            self.findings.append(Finding(node.where, error.rule, error.seen, error.accepted))

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
        """The file's bytes."""
        described = {
            "version": METADATA_VERSION,
            "inputs": [border.described() for border in self.inputs],
            "outputs": [border.described() for border in self.outputs],
            "metadata": dict(sorted(self.options.metadata.items())),
        }
        signature = Signature(_indices(self.inputs), _indices(self.outputs))
        content = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
        return self.builder.finish(signature, {METADATA: content})


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
        try:
            reason = _refusal(op, node)
        except Unsupported as error:
            findings.append(Finding(node.where, error.rule, error.seen, error.accepted))
            continue
        if reason:
            findings.append(Finding(node.where, reason))
    return findings


def _is_refused(node: Node) -> bool:
    """Whether the node has no operator entry, or one that cannot take it."""
    op = op_of(node)
    try:
        return op is None or _refusal(op, node) is not None
    except Unsupported:
        return True


def _refusal(op: Op, node: Node) -> str | None:
    """Why the node cannot be converted, or None; its layout rule is tried too, since it reads the node's parameters."""
    reason = _type_refusal(node) or op.refusal(node)
    if reason is None:
        incoming = tuple(None if t is None or t.is_constant else natural(t.rank) for t in node.inputs)
        op.layout.arrangements(View(node, incoming, (None,) * len(node.outputs)))
    return reason


def _type_refusal(node: Node) -> str | None:
    strange = {str(t.dtype) for t in (*node.tensors(), *node.outputs) if t.dtype.name not in ELEMENT_TYPES}
    return f"it works on {', '.join(sorted(strange))}; accepted: {', '.join(ELEMENT_TYPES)}" if strange else None


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
        graph.inputs[name] = _input_as(graph, readers[0], name, dtype)
    for name, tensor in list(graph.outputs.items()):
        if not tensor.is_float or name in graph.integers:
            continue
        producer = producers.get(tensor)
        if producer is None or producer.op_type != DEQUANTIZE:
            raise InputError(
                f"output {name!r} is a real number; io_dtype {dtype} needs a model that quantizes its outputs"
            )
        graph.outputs[name] = _output_as(graph, producer, name, dtype)
    graph.prune()


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
