"""ONNX's own node cases, chosen and prepared for a runtime of static tensors: which, why not the others, what is
constant.

A case is one model of a few nodes with its inputs and the outputs that the ONNX standard gives for them. The cases
carry every operand as a graph input, also those that no deployed model computes at run time (a shape, axes, pads, a
scale). Those are made constants here, by a table anyone can read; `bake` says how far this goes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

Bake = Literal["none", "parameters", "weights"]
Array = np.ndarray[Any, np.dtype[Any]]

_TYPES = onnx.TensorProto
PLAIN_TYPES = {
    *(_TYPES.FLOAT, _TYPES.DOUBLE, _TYPES.FLOAT16, _TYPES.BOOL),
    *(_TYPES.INT8, _TYPES.INT16, _TYPES.INT32, _TYPES.INT64),
    *(_TYPES.UINT8, _TYPES.UINT16, _TYPES.UINT32, _TYPES.UINT64),
}
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}

# The groups: what 81 vision models of today consist of after torch's export and simplification; pooling,
# activations and normalizations of networks that are older or come from other exporters; shapes and indices, as
# exporters and detection heads write them; arithmetic of boxes, masks, positions and hand-written activations;
# recurrent text readers; quantization.
_VISION = """
    Add Attention AveragePool BatchNormalization Clip Col2Im Concat Conv ConvTranspose Div Einsum Expand Gather
    GatherND Gelu Gemm HardSigmoid HardSwish InstanceNormalization LSTM LayerNormalization LeakyRelu MatMul
    MaxPool Mul Neg Pad Pow ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize Sigmoid Slice Softmax
    Split Squeeze Sub Transpose Unsqueeze Where

    Celu Elu GlobalAveragePool GlobalMaxPool GroupNormalization LRN LogSoftmax LpNormalization LpPool
    MeanVarianceNormalization Mish PRelu RMSNormalization Selu Softplus Softsign Swish ThresholdedRelu

    ArgMax ArgMin Cast CastLike CenterCropPad Constant ConstantOfShape CumSum DepthToSpace EyeLike Flatten
    GatherElements GridSample Identity If Loop NonMaxSuppression NonZero OneHot Range ReverseSequence RoiAlign
    ScatterElements ScatterND Shape Size SpaceToDepth Tile TopK Trilu Upsample

    Abs And Ceil Cos Dropout Equal Erf Exp Floor Greater GreaterOrEqual Less LessOrEqual Log Max Mean Min Mod
    Not Or Reciprocal ReduceL1 ReduceLogSum ReduceLogSumExp ReduceMin ReduceProd ReduceSumSquare Round Sign Sin
    Sqrt Sum Tanh Xor

    GRU RNN

    DequantizeLinear QLinearConv QLinearMatMul QuantizeLinear
"""
VISION_OPERATORS = frozenset(_VISION.split())

PARAMETERS: dict[str, tuple[str, ...]] = {
    "AffineGrid": ("size",),
    "CenterCropPad": ("shape",),
    "Col2Im": ("image_shape", "block_shape"),
    "ConvInteger": ("x_zero_point", "w_zero_point"),
    "CumProd": ("axis",),
    "CumSum": ("axis",),
    "DFT": ("dft_length", "axis"),
    "DequantizeLinear": ("x_scale", "x_zero_point"),
    "Dropout": ("ratio", "training_mode"),
    "Expand": ("shape",),
    "Loop": ("M", "cond"),
    "MatMulInteger": ("a_zero_point", "b_zero_point"),
    "MaxUnpool": ("output_shape",),
    "NonMaxSuppression": ("max_output_boxes_per_class", "iou_threshold", "score_threshold"),
    "OneHot": ("depth",),
    "Pad": ("pads", "axes"),
    "QLinearConv": ("x_scale", "x_zero_point", "w_scale", "w_zero_point", "y_scale", "y_zero_point"),
    "QLinearMatMul": ("a_scale", "a_zero_point", "b_scale", "b_zero_point", "y_scale", "y_zero_point"),
    "QuantizeLinear": ("y_scale", "y_zero_point"),
    "Reshape": ("shape",),
    "Resize": ("roi", "scales", "sizes"),
    "STFT": ("frame_step", "frame_length"),
    "Slice": ("starts", "ends", "axes", "steps"),
    "Split": ("split",),
    "Squeeze": ("axes",),
    "Tile": ("repeats",),
    "TopK": ("K",),
    "Trilu": ("k",),
    "Unsqueeze": ("axes",),
    "Upsample": ("scales",),
}
"""Operands that are known when a model is compiled: operator -> the standard's names of them. Reductions: `axes`."""

WEIGHTS: dict[str, tuple[str, ...]] = {
    "BatchNormalization": ("scale", "B", "input_mean", "input_var"),
    "Conv": ("W", "B"),
    "ConvInteger": ("w",),
    "ConvTranspose": ("W", "B"),
    "DeformConv": ("W", "B"),
    "GRU": ("W", "R", "B"),
    "GroupNormalization": ("scale", "bias"),
    "InstanceNormalization": ("scale", "B"),
    "LSTM": ("W", "R", "B", "P"),
    "LayerNormalization": ("Scale", "B"),
    "PRelu": ("slope",),
    "QLinearConv": ("w", "B"),
    "QLinearMatMul": ("b",),
    "RMSNormalization": ("scale",),
    "RNN": ("W", "R", "B"),
}
"""What is learned, and so constant in every deployed model too; made constant only on request."""


@dataclass(frozen=True, eq=False)
class Case:
    """One case, ready to convert: a serialized model, its feeds by name, and the outputs in the model's order."""

    name: str
    operator: str
    model: bytes
    feeds: dict[str, Array]
    expected: dict[str, Array]
    operators: frozenset[str]
    baked: tuple[str, ...]
    is_vision: bool

    @property
    def is_expanded(self) -> bool:
        """Whether it is an operator written as the standard's function body."""
        return "_expanded" in self.name


@dataclass(frozen=True)
class Excluded:
    """A case that is not run, and why."""

    name: str
    reason: str


def load_cases(bake: Bake) -> tuple[list[Case], list[Excluded]]:
    """Every node case of the installed onnx, as those to run and those left out, in onnx's order."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        raw = load_model_tests(kind="node")
    cases: list[Case] = []
    excluded: list[Excluded] = []
    models = {case.name: case.model for case in raw}
    for case in raw:
        base = models.get(re.sub(r"_expanded.*", "", case.name)) or case.model
        reason = _why_not(case) if base is not None else "no model"
        if reason or base is None:
            excluded.append(Excluded(case.name, reason or "no model"))
        else:
            cases.append(_prepare(case, base, bake))
    return cases, excluded


def _why_not(case: Any) -> str | None:
    """Why a case cannot be asked of a runtime that holds static numeric tensors; None when it can."""
    graph = case.model.graph
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            return f"{kind.removesuffix('_type')} instead of a tensor"
        tensor = value.type.tensor_type
        if tensor.elem_type not in PLAIN_TYPES:
            return f"{_TYPES.DataType.Name(tensor.elem_type)}, not a float, integer or bool of whole bytes"
    every = list(nodes(graph))
    domains = {node.domain for node in every} - {"", "ai.onnx"}
    reasons = {
        "an input without a static shape": any(
            not dimension.HasField("dim_value") for v in graph.input for dimension in v.type.tensor_type.shape.dim
        ),
        f"operators of {', '.join(sorted(domains))}, outside the core standard": bool(domains),
        "a random output": bool(RANDOM & {node.op_type for node in every})
        or ("training_dropout" in case.name and "zero_ratio" not in case.name),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes(inner)


def _prepare(case: Any, base: onnx.ModelProto, bake: Bake) -> Case:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs, outputs = case.data_sets[0]
    data = {value.name: _array(array) for value, array in zip(model.graph.input, inputs, strict=True)}
    baked = [name for name in _constant_names(base, bake) if name in data]
    if len(baked) == len(data):
        baked = []  # a model without an input would be computed at conversion, and judge nothing
    kept = [value for value in model.graph.input if value.name not in baked]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(data[name], name) for name in baked)
    operators = frozenset(node.op_type for node in nodes(model.graph))
    operator = base.graph.node[0].op_type
    return Case(
        name=case.name,
        operator=operator,
        model=model.SerializeToString(),
        feeds={value.name: data[value.name] for value in kept},
        expected={v.name: _array(a) for v, a in zip(model.graph.output, outputs, strict=True)},
        operators=operators,
        baked=tuple(baked),
        is_vision=operators | {operator} <= VISION_OPERATORS,
    )


def _array(value: Any) -> Array:
    """The tensor, which some cases hold as ONNX stores it."""
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _constant_names(model: onnx.ModelProto, bake: Bake) -> list[str]:
    """The graph inputs of a single-node model that are constant by nature."""
    if bake == "none" or len(model.graph.node) != 1:
        return []
    node = model.graph.node[0]
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    formal = onnx.defs.get_schema(node.op_type, version, node.domain).inputs
    wanted = set(PARAMETERS.get(node.op_type, ("axes",) if node.op_type.startswith("Reduce") else ()))
    if bake == "weights":
        wanted |= set(WEIGHTS.get(node.op_type, ()))
    pairs = [(formal[min(index, len(formal) - 1)].name, name) for index, name in enumerate(node.input) if name]
    return [name for parameter, name in pairs if parameter in wanted]
