"""Operator versions: the lowest that has the feature, by the rules of TensorFlow's op_version.cc."""

from __future__ import annotations

import numpy as np
import pytest

from edgeship.targets.tflite.versions import Kind, newest, runtime_of, version_of

F = Kind("FLOAT32", (1, 8, 8, 4))
Q = Kind("INT8", (1, 8, 8, 4), np.array([0.1]))
FILTER = Kind("FLOAT32", (8, 3, 3, 4))
GROUPED = Kind("FLOAT32", (8, 3, 3, 2))
Q_FILTER = Kind("INT8", (8, 3, 3, 4), np.full(8, 0.1))
ROWS = Kind("FLOAT32", (8, 4))
Q_ROWS = Kind("INT8", (8, 4), np.array([0.1]))
Q_ROWS_PER_CHANNEL = Kind("INT8", (8, 4), np.full(8, 0.1))
Q_FINE = Kind("INT8", (1, 8, 8, 4), np.array([0.001]))
FIVE = Kind("FLOAT32", (1, 2, 8, 8, 4))
CHANNELS = Kind("FLOAT32", (4,))
INDEX = Kind("INT64", (2,))
TRUTH = Kind("BOOL", (4,))


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "options", "version"),
    [
        ("CONV_2D", [F, FILTER], [F], {}, 1),
        ("CONV_2D", [Q, Q_FILTER], [Q], {}, 3),
        ("CONV_2D", [F, GROUPED], [F], {}, 6),
        ("DEPTHWISE_CONV_2D", [F, FILTER], [F], {"dilation_h_factor": 1, "dilation_w_factor": 1}, 1),
        ("DEPTHWISE_CONV_2D", [F, FILTER], [F], {"dilation_h_factor": 2, "dilation_w_factor": 1}, 2),
        ("DEPTHWISE_CONV_2D", [Q, Q_FILTER], [Q], {}, 3),
        ("FULLY_CONNECTED", [F, ROWS, CHANNELS], [F], {}, 1),
        ("FULLY_CONNECTED", [F, ROWS], [F], {}, 6),
        ("FULLY_CONNECTED", [F, ROWS, CHANNELS], [F], {"keep_num_dims": True}, 5),
        ("FULLY_CONNECTED", [Q, Q_ROWS, CHANNELS], [Q], {}, 4),
        ("FULLY_CONNECTED", [Q, Q_ROWS_PER_CHANNEL, CHANNELS], [Q], {}, 12),
        ("ADD", [F, F], [F], {}, 1),
        ("ADD", [Q, Q], [Q], {}, 2),
        ("SUB", [FIVE, CHANNELS], [FIVE], {}, 3),
        ("DIV", [FIVE, CHANNELS], [FIVE], {}, 2),
        ("MUL", [Q, Q], [Q], {}, 2),
        ("MUL", [Q, Q], [Q_FINE], {}, 3),
        ("MAX_POOL_2D", [Q], [Q], {}, 2),
        ("RESIZE_BILINEAR", [F], [F], {"half_pixel_centers": True}, 3),
        ("RESIZE_NEAREST_NEIGHBOR", [F], [F], {"align_corners": True}, 3),
        ("RESIZE_NEAREST_NEIGHBOR", [Q], [Q], {}, 2),
        ("STRIDED_SLICE", [FIVE], [FIVE], {}, 4),
        ("SLICE", [FIVE], [FIVE], {}, 5),
        ("PAD", [Q], [Q], {}, 2),
        ("TRANSPOSE", [FIVE], [FIVE], {}, 4),
        ("TRANSPOSE_CONV", [CHANNELS, FILTER, F], [F], {}, 1),
        ("TRANSPOSE_CONV", [CHANNELS, Q_FILTER, Q], [Q], {}, 2),
        ("TRANSPOSE_CONV", [CHANNELS, Q_FILTER, Q, CHANNELS], [Q], {}, 3),
        ("SPLIT", [CHANNELS, Q], [Q], {}, 2),
        ("SOFTMAX", [Q], [Q], {}, 2),
        ("DEQUANTIZE", [Q], [F], {}, 2),
        ("QUANTIZE", [F], [Q], {}, 1),
        ("LEAKY_RELU", [Q], [Q], {}, 1),
        ("BROADCAST_TO", [F], [F], {}, 2),
        ("ARG_MAX", [Q], [INDEX], {}, 2),
        ("GATHER", [F, INDEX], [F], {"batch_dims": 1}, 5),
        ("GATHER_ND", [TRUTH, INDEX], [TRUTH], {}, 5),
        ("REVERSE_V2", [Q, INDEX], [Q], {}, 3),
        ("REVERSE_V2", [TRUTH, INDEX], [TRUTH], {}, 2),
        ("FILL", [INDEX, TRUTH], [TRUTH], {}, 2),
        ("RANGE", [INDEX, INDEX, INDEX], [INDEX], {}, 2),
        ("SCATTER_ND", [INDEX, F, INDEX], [F], {}, 1),
        ("TOPK_V2", [Q, INDEX], [Q, INDEX], {}, 2),
    ],
)
def test_version_is_the_lowest_with_the_feature(
    name: str, inputs: list[Kind], outputs: list[Kind], options: dict[str, object], version: int
) -> None:
    assert version_of(name, inputs, outputs, options) == version


def test_newest_compares_numbers_and_not_letters() -> None:
    assert newest(["1.5.0", "2.17.0", "2.3.0"]) == "2.17.0"
    assert runtime_of("CONV_2D", 3) == "1.14.0"
