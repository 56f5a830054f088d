"""A TFLite file as C source for TensorFlow Lite Micro, or what keeps that runtime from running it.

Micro has kernels for a part of TFLite's operators and no heap: a file that names another operator fails on the device,
when it is too late. The operators are those of MicroMutableOpResolver (micro_mutable_op_resolver.h).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from edgeship.calibration.errors import UnsupportedError
from edgeship.calibration.types import Finding
from edgeship.targets.tflite import flatfile
from edgeship.targets.tflite.reader import read_model

OPERATORS = frozenset(
    [
        "ABS",
        "ADD",
        "ADD_N",
        "ARG_MAX",
        "ARG_MIN",
        "AVERAGE_POOL_2D",
        "BATCH_MATMUL",
        "BATCH_TO_SPACE_ND",
        "BROADCAST_TO",
        "CAST",
        "CEIL",
        "CONCATENATION",
        "CONV_2D",
        "COS",
        "CUMSUM",
        "DEPTH_TO_SPACE",
        "DEPTHWISE_CONV_2D",
        "DEQUANTIZE",
        "DIV",
        "ELU",
        "EQUAL",
        "EXP",
        "EXPAND_DIMS",
        "FILL",
        "FLOOR",
        "FLOOR_DIV",
        "FLOOR_MOD",
        "FULLY_CONNECTED",
        "GATHER",
        "GATHER_ND",
        "GREATER",
        "GREATER_EQUAL",
        "HARD_SWISH",
        "L2_NORMALIZATION",
        "L2_POOL_2D",
        "LEAKY_RELU",
        "LESS",
        "LESS_EQUAL",
        "LOG",
        "LOGICAL_AND",
        "LOGICAL_NOT",
        "LOGICAL_OR",
        "LOGISTIC",
        "LOG_SOFTMAX",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MEAN",
        "MINIMUM",
        "MIRROR_PAD",
        "MUL",
        "NEG",
        "NOT_EQUAL",
        "PACK",
        "PAD",
        "PADV2",
        "PRELU",
        "QUANTIZE",
        "REDUCE_MAX",
        "RELU",
        "RELU6",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "ROUND",
        "RSQRT",
        "SELECT_V2",
        "SHAPE",
        "SIN",
        "SLICE",
        "SOFTMAX",
        "SPACE_TO_BATCH_ND",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SPLIT_V",
        "SQRT",
        "SQUARE",
        "SQUARED_DIFFERENCE",
        "SQUEEZE",
        "STRIDED_SLICE",
        "SUB",
        "SUM",
        "TANH",
        "TRANSPOSE",
        "TRANSPOSE_CONV",
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        "UNPACK",
        "ZEROS_LIKE",
    ]
)
"""TFLite's operators that Micro has."""
_PER_LINE = 12


@dataclass(frozen=True)
class CSource:
    """A C file with the model as an array, and the header that declares it."""

    source: str
    header: str


def c_source(content: bytes, name: str) -> CSource:
    """The model as C, its array called after `name`.

    Raises UnsupportedError with every operator that Micro does not have, and every input or output that is not int8.
    """
    findings = _findings(content)
    if findings:
        raise UnsupportedError("TensorFlow Lite Micro cannot run this model:", findings)
    symbol = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in PurePath(name).stem)
    symbol = f"model_{symbol}" if not symbol or symbol[0].isdigit() else symbol
    guard = f"{symbol.upper()}_H_"
    header = f"""\
        #ifndef {guard}
        #define {guard}

        #ifdef __cplusplus
        extern "C" {{
        #endif

        extern const unsigned char {symbol}[];
        extern const unsigned int {symbol}_len;

        #ifdef __cplusplus
        }}
        #endif

        #endif
        """
    rows = "\n".join(
        "  " + " ".join(f"0x{byte:02x}," for byte in content[start : start + _PER_LINE])
        for start in range(0, len(content), _PER_LINE)
    )
    source = (
        f'#include "{PurePath(name).stem}.h"\n\n'
        "#if defined(__GNUC__) || defined(__clang__)\n#define ALIGNED __attribute__((aligned(16)))\n#else\n"
        "#define ALIGNED\n#endif\n\n"
        f"const unsigned char {symbol}[] ALIGNED = {{\n{rows}\n}};\n"
        f"const unsigned int {symbol}_len = {len(content)};\n"
    )
    return CSource(source, textwrap.dedent(header))


def _findings(content: bytes) -> list[Finding]:
    model = read_model(content, "the artifact")
    types = flatfile.element_types()
    graph = model.subgraphs[0]
    accepted = "one of the operators of MicroMutableOpResolver"
    missing = sorted(set(flatfile.operator_names(model)) - OPERATORS)
    findings = [Finding(f"operator {name}", "has no kernel in TensorFlow Lite Micro", "", accepted) for name in missing]
    for kind, places in (("input", graph.inputs), ("output", graph.outputs)):
        findings += _not_int8(kind, [graph.tensors[int(place)] for place in places], types)
    return findings


def _not_int8(kind: str, tensors: Sequence[object], types: dict[int, str]) -> list[Finding]:
    return [
        Finding(f"{kind} {flatfile.text(tensor.name)}", "is not int8", types[tensor.type].lower(), "--io-dtype int8")  # type: ignore[attr-defined]  # the schema has no types
        for tensor in tensors
        if types[tensor.type] != "INT8"  # type: ignore[attr-defined]  # the schema has no types
    ]
