"""Which weights ONNX Runtime adds in 16 bits on x86 without VNNI, under an emulator of such a CPU."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

EMULATORS = (["valgrind", "-q", "--tool=none"], ["qemu-x86_64", "-cpu", "max,avx512f=off,avx512vnni=off,avx-vnni=off"])
RUN = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for path in sys.argv[1:]:
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    numpy.save(path + ".npy", session.run(None, {"x": numpy.full(shape, 255, numpy.uint8)})[0])
"""


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    """The command of an emulator that offers AVX2 and nothing newer."""
    for command in EMULATORS:
        if shutil.which(command[0]):
            return command
    pytest.skip("needs valgrind or qemu-x86_64 to hide this CPU's VNNI")


@dataclass(frozen=True)
class Layer:
    """A convolution; `length` is that of K, the products that are added up."""

    inputs: int
    kernel: int
    groups: int

    @property
    def length(self) -> int:
        return self.kernel * self.kernel * self.inputs // self.groups

    def pairs(self) -> list[tuple[int, int]]:
        return [pair for pair in itertools.combinations(range(self.length), 2) if pair[1] - pair[0] <= 4]


def _conv(name: str, layer: Layer, pairs: list[tuple[int, int]], folder: Path) -> Path:
    """One output channel of each group for each pair of places in K, which runs over rows, columns, channels."""
    groups, kernel = layer.groups, layer.kernel
    weight = np.zeros((groups, len(pairs), layer.length), np.int8)
    for place, pair in enumerate(pairs):
        weight[:, place, list(pair)] = 127
    weight = weight.reshape(groups * len(pairs), kernel, kernel, layer.inputs // groups).transpose(0, 3, 1, 2).copy()
    channels = len(weight)
    constants: dict[str, Any] = {
        "one": np.float32(1), "zero": np.uint8(0), "w": weight, "ws": np.ones(channels, np.float32),
        "wz": np.zeros(channels, np.int8), "ys": np.float32(255),
    }  # fmt: skip
    node = helper.make_node("QLinearConv", ["x", "one", "zero", "w", "ws", "wz", "ys", "zero"], ["y"], group=groups)
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, layer.inputs, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_pairs_at_even_places_are_added_in_16_bits_and_no_others(emulator: list[str], tmp_path: Path) -> None:
    layers = {
        "one_by_one": Layer(7, 1, 1),
        "odd_channels": Layer(3, 3, 1),
        "even_channels": Layer(4, 3, 1),
        "groups": Layer(6, 3, 2),
    }
    files = {name: _conv(name, layer, layer.pairs(), tmp_path) for name, layer in layers.items()}
    depthwise = _conv("depthwise", Layer(16, 3, 16), [(0, 1)], tmp_path)
    command = [*emulator, sys.executable, "-c", RUN, *map(str, files.values()), str(depthwise)]
    subprocess.run(command, check=True, capture_output=True)
    for name, layer in layers.items():
        pairs = layer.pairs()
        result = np.load(f"{files[name]}.npy").reshape(layer.groups, len(pairs), -1)
        clipped = {pair for place, pair in enumerate(pairs) if (result[:, place] != 254).any()}
        assert clipped == {(first, first + 1) for first in range(0, layer.length - 1, 2)}, name
    assert (np.load(f"{depthwise}.npy") == 254).all(), "a depthwise convolution does not clip"
