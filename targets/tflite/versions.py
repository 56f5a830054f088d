"""The lowest version of each TFLite operator that has what a use of it needs, and the oldest runtime that reads it.

Rules as in tensorflow/lite/tools/versioning/op_version.cc and runtime_version.cc, for the operators and element types
this converter writes, with one exception: FULLY_CONNECTED with per-channel int8 weights gets 12, where op_version.cc
says 4. LiteRT 2.3 and TensorFlow 2.21 compute it right under either number; 12 is the first version whose rules
mention per-channel weights, so that a runtime from before them refuses the file instead of reading it another way
(not tried on one). Versions that runtime_version.cc does not list, 12 among them, do not raise the minimum runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SECOND_IN_INT8 = """ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND CONCATENATION DEPTH_TO_SPACE
DEQUANTIZE EQUAL EXP FLOOR_MOD GATHER GELU GREATER GREATER_EQUAL LESS LESS_EQUAL LOG LOGISTIC
LOG_SOFTMAX MAXIMUM MAX_POOL_2D MEAN MINIMUM MIRROR_PAD NOT_EQUAL PACK PAD PADV2 REDUCE_MAX
REDUCE_MIN REDUCE_PROD RELU RELU6 RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SELECT SLICE SOFTMAX
SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT_V SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TOPK_V2
TRANSPOSE UNPACK L2_NORMALIZATION"""
INT8_IS_2 = frozenset(_SECOND_IN_INT8.split())
_THIRD_IN_INT16 = """AVERAGE_POOL_2D BATCH_MATMUL CONCATENATION LOGISTIC MAX_POOL_2D MEAN MIRROR_PAD PACK REDUCE_MAX
REDUCE_MIN RELU RELU6 SOFTMAX TANH"""
INT16_IS_3 = frozenset(_THIRD_IN_INT16.split())
_FIRST_RELEASE = """ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D MAX_POOL_2D MUL RELU6 RELU_N1_TO_1
RESHAPE SOFTMAX SPLIT FULLY_CONNECTED RELU PAD CAST"""
_RUNTIMES: Mapping[tuple[str, int], str] = {
    **{(name, 1): "1.5.0" for name in _FIRST_RELEASE.split()},
    ("ADD", 4): "2.6.0",
    ("BATCH_MATMUL", 1): "2.3.0",
    ("BATCH_MATMUL", 2): "2.3.0",
    ("BROADCAST_TO", 2): "2.5.0",
    ("BROADCAST_TO", 3): "2.5.0",
    ("CONV_2D", 4): "2.3.0",
    ("CONV_2D", 5): "2.4.0",
    ("CONV_2D", 6): "2.9.0",
    ("DEPTHWISE_CONV_2D", 2): "1.12.0",
    ("DEPTHWISE_CONV_2D", 4): "2.2.0",
    ("DEPTHWISE_CONV_2D", 5): "2.4.0",
    ("DEPTHWISE_CONV_2D", 6): "2.3.0",
    ("SUB", 3): "2.3.0",
    ("DIV", 2): "2.3.0",
    ("DEPTH_TO_SPACE", 1): "2.1.0",
    ("DYNAMIC_UPDATE_SLICE", 1): "2.9.0",
    ("DEPTH_TO_SPACE", 2): "2.5.0",
    ("FULLY_CONNECTED", 5): "2.0.0",
    ("FULLY_CONNECTED", 6): "2.1.0",
    ("FULLY_CONNECTED", 7): "2.3.0",
    ("FULLY_CONNECTED", 9): "2.3.0",
    ("MAXIMUM", 3): "2.3.0",
    ("MINIMUM", 3): "2.3.0",
    ("MUL", 3): "1.15.0",
    ("MUL", 5): "2.6.0",
    ("SUB", 4): "2.4.0",
    ("TILE", 3): "2.8.0",
    ("CAST", 2): "2.7.0",
    ("CAST", 3): "2.8.0",
    ("CAST", 4): "2.9.0",
    ("GATHER", 3): "1.15.0",
    ("TRANSPOSE", 3): "1.15.0",
    ("STRIDED_SLICE", 3): "2.1.0",
    ("PAD", 4): "2.6.0",
    ("PADV2", 4): "2.6.0",
    ("TRANSPOSE", 4): "2.3.0",
    ("RESIZE_BILINEAR", 3): "2.2.0",
    ("RESIZE_NEAREST_NEIGHBOR", 3): "2.3.0",
    ("SPLIT_V", 2): "2.3.0",
    ("STRIDED_SLICE", 4): "2.2.0",
    ("TRANSPOSE_CONV", 2): "2.2.0",
    ("TRANSPOSE_CONV", 3): "2.3.0",
    ("SLICE", 5): "2.5.0",
    ("RELU", 2): "2.1.0",
    ("ABS", 2): "2.4.0",
    ("ATAN2", 1): "2.10.0",
    ("GELU", 1): "2.9.0",
    ("GELU", 2): "2.9.0",
    ("HARD_SWISH", 1): "1.15.0",
    ("RELU_0_TO_1", 1): "2.10.0",
    ("MIRROR_PAD", 2): "2.3.0",
    ("SQUARED_DIFFERENCE", 2): "2.5.0",
    ("REDUCE_PROD", 2): "2.6.0",
    ("RSQRT", 2): "2.5.0",
    ("WHERE", 2): "2.8.0",
    ("ARG_MIN", 3): "2.9.0",
    ("ARG_MAX", 3): "2.9.0",
    ("FILL", 3): "2.5.0",
    ("FILL", 2): "2.3.0",
    ("NON_MAX_SUPPRESSION_V4", 1): "2.1.0",
    ("REDUCE_ALL", 1): "2.6.0",
    ("UNSORTED_SEGMENT_MIN", 1): "2.11.0",
    ("UNSORTED_SEGMENT_MAX", 1): "2.10.0",
    ("UNSORTED_SEGMENT_PROD", 1): "2.10.0",
    ("CUMSUM", 1): "2.4.0",
    ("SELECT_V2", 1): "2.2.0",
    ("SCATTER_ND", 1): "2.1.0",
    ("REVERSE_V2", 3): "2.5.0",
    ("REVERSE_V2", 2): "2.2.0",
    ("GATHER", 5): "2.5.0",
}
OLDEST_INT8_RUNTIME = "1.14.0"
"""Everything else this converter writes is in the first runtime with signed 8-bit kernels."""


@dataclass(frozen=True)
class Kind:
    """What a version rule looks at in an operand: TFLite's name of the element type, shape, scale (1-D; None: real)."""

    type: str
    shape: tuple[int, ...]
    scale: Any = None

    @property
    def per_channel(self) -> bool:
        """Whether the scale differs by channel."""
        return self.scale is not None and len(self.scale) > 1


def version_of(name: str, inputs: Sequence[Kind | None], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    """The lowest version of operator `name` for these operands."""
    given = [kind for kind in inputs if kind is not None]
    rule = _RULES.get(name)
    if rule:
        return rule(given, outputs, options)
    if name in INT16_IS_3 and given and given[0].type == "INT16":
        return 3
    return 2 if name in INT8_IS_2 and given and given[0].type == "INT8" else 1


def runtime_of(name: str, version: int) -> str:
    """The first TensorFlow Lite release that has this operator version."""
    return _RUNTIMES.get((name, version), OLDEST_INT8_RUNTIME)


def newest(versions: Sequence[str]) -> str:
    """The highest of dotted version numbers."""
    return max(versions, key=lambda text: tuple(int(part) for part in text.split(".")), default="1.5.0")


def _conv(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    x, weights = given[0], given[1]
    if x.shape[-1] != weights.shape[-1]:
        return 6
    if x.type == "INT16":
        return 4
    if x.type == "FLOAT32" and weights.type == "INT8":
        return 5 if weights.per_channel else 2
    return 3 if x.type == "INT8" else 1


def _depthwise(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if given[0].type in ("INT8", "INT16"):
        return 3 if given[0].type == "INT8" else 5
    if given[1].type == "INT8":
        return 6 if given[1].per_channel else 4
    return 2 if (options.get("dilation_h_factor", 1), options.get("dilation_w_factor", 1)) != (1, 1) else 1


def _fully_connected(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if given[1].per_channel:
        return 12
    if options.get("asymmetric_quantize_inputs"):
        return 9
    if given[0].type == "INT16":
        return 7
    if len(given) == 2:
        return 6
    if options.get("keep_num_dims"):
        return 5
    return 4 if given[0].type == "INT8" else 1


def _mul(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if given[0].type == "INT64":
        return 5
    if given[0].type == "INT16" and given[0].scale is not None:
        return 4
    scales = [kind.scale for kind in (*given[:2], outputs[0])]
    if all(scale is not None for scale in scales) and scales[0][0] * scales[1][0] / scales[2][0] >= 1.0:
        return 3
    return 2 if given[0].type == "INT8" else 1


def _add(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if given[0].type == "INT16" and given[0].scale is not None:
        return 3
    return 4 if given[0].type == "INT64" else 2 if given[0].type == "INT8" else 1


def _wide_broadcast(given: Sequence[Kind]) -> bool:
    return len(given) > 1 and given[0].shape != given[1].shape and max(len(kind.shape) for kind in given) > 4


def _sub(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if given[0].type == "INT16" and given[0].scale is not None:
        return 5
    return 4 if given[0].type == "INT64" else _extremum(given, outputs, options)


def _extremum(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 3 if _wide_broadcast(given) else 2 if given[0].type == "INT8" else 1


def _div(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 2 if _wide_broadcast(given) else 1


def _pad(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 4 if len(given[0].shape) > 4 else {"INT8": 2, "INT16": 3}.get(given[0].type, 1)


def _transpose(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    rank = len(given[0].shape)
    if rank > 4:
        return 6 if rank > 5 else 4
    return {"BOOL": 3, "INT8": 2, "INT16": 4}.get(given[0].type, 1)


def _slice(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 5 if len(given[0].shape) > 4 else {"INT8": 2, "INT16": 4}.get(given[0].type, 1)


def _strided_slice(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 4 if len(given[0].shape) > 4 else {"BOOL": 3, "INT8": 2, "INT16": 4}.get(given[0].type, 1)


def _resize(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if given[0].type == "INT16":
        return 4
    return 3 if options.get("half_pixel_centers") else 2 if given[0].type == "INT8" else 1


def _nearest(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    resized = _resize(given, outputs, options)
    return max(resized, 3) if options.get("align_corners") else resized


def _transpose_conv(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if options.get("fused_activation_function", "NONE") != "NONE":
        return 4
    return 3 if len(given) == 4 else 2 if given[1].type == "INT8" else 1


def _split(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"INT32": 3, "INT8": 2}.get(given[1].type, 1)


def _gather(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    if options.get("batch_dims"):
        return 5
    return {"BOOL": 3, "INT8": 2}.get(given[0].type, 1)


def _broadcast_to(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 3 if given[0].type == "INT8" else 2


def _tile(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 3 if given[0].type == "INT8" else 1


def _abs(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"INT32": 5, "INT8": 2}.get(given[0].type, 1)


def _cast(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    kinds = {given[0].type, outputs[0].type}
    if kinds & {"FLOAT64", "FLOAT16"}:
        return 5
    return 4 if "UINT16" in kinds else 3 if "INT8" in kinds else 2 if "UINT32" in kinds else 1


def _extremum_place(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"BOOL": 3, "INT8": 2}.get(given[0].type, 1)


def _reverse(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"BOOL": 2, "INT8": 3}.get(given[0].type, 1)


def _gather_nd(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"BOOL": 5, "INT16": 3}.get(given[0].type, 1)


def _fill(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"BOOL": 2, "INT8": 3, "INT16": 3, "FLOAT16": 4}.get(given[1].type, 1)


def _dequantize(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return {"FLOAT16": 3, "INT16": 3, "INT8": 2}.get(given[0].type, 1)


def _quantize(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 2 if "INT16" in (given[0].type, outputs[0].type) else 1


def _range(given: Sequence[Kind], outputs: Sequence[Kind], options: Mapping[str, Any]) -> int:
    return 2 if given[0].type == "INT64" else 1


_RULES = {
    "ABS": _abs,
    "ADD": _add,
    "ARG_MAX": _extremum_place,
    "ARG_MIN": _extremum_place,
    "BROADCAST_TO": _broadcast_to,
    "CAST": _cast,
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _dequantize,
    "DIV": _div,
    "FILL": _fill,
    "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather,
    "GATHER_ND": _gather_nd,
    "MAXIMUM": _extremum,
    "MINIMUM": _extremum,
    "MUL": _mul,
    "PAD": _pad,
    "PADV2": _pad,
    "QUANTIZE": _quantize,
    "RANGE": _range,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _nearest,
    "REVERSE_V2": _reverse,
    "SLICE": _slice,
    "SPLIT": _split,
    "STRIDED_SLICE": _strided_slice,
    "SUB": _sub,
    "TILE": _tile,
    "TRANSPOSE": _transpose,
    "TRANSPOSE_CONV": _transpose_conv,
}
