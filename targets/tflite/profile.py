"""Returns where a TFLite model's time goes: each operator timed alone, on tensors of the model's own shapes and types.

The interpreter's Python package has no profiler (only its C++ benchmark tool has one), so every operator is written as
a model of its own, with its constants, and run by the same interpreter, delegates included. Two things differ from the
whole model: weights and inputs are warm in the caches, and a delegate cannot fuse an operator with its neighbour. The
sum is therefore not the model's latency; the shares tell where to look.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeship.calibration.errors import EdgeshipError
from edgeship.targets.base import OperatorTime
from edgeship.targets.tflite.flatfile import load, operator_names, text
from edgeship.targets.tflite.layers import packed
from edgeship.targets.tflite.session import TFLiteSession

WARMUP = 3
PASSES = 3


def profile(artifact: Path, threads: int, runs: int) -> list[OperatorTime]:
    """The operators of the main graph in order; one that cannot run alone (control flow, variables) is left out.

    Each time is the smallest median of `PASSES` passes over all operators.
    """
    model = load(artifact)
    names = operator_names(model)
    graph = model.subgraphs[0]
    with tempfile.TemporaryDirectory() as folder:
        alone: dict[int, Callable[[], float]] = {}
        for place, operator in enumerate(graph.operators):
            path = Path(folder) / f"{place}.tflite"
            path.write_bytes(packed(_single(model, operator)))
            try:
                alone[place] = _timer(TFLiteSession(path, threads), max(1, runs // PASSES))
                alone[place]()
            except EdgeshipError:
                alone.pop(place, None)
        best = {place: min(once() for _ in range(PASSES)) for place, once in alone.items()}
    return [
        OperatorTime(_output(graph, graph.operators[place]), names[graph.operators[place].opcodeIndex], microseconds)
        for place, microseconds in best.items()
    ]


def _output(graph: Any, operator: Any) -> str:
    return text(graph.tensors[operator.outputs[0]].name) if len(operator.outputs) else ""


def _single(model: Any, operator: Any) -> Any:
    """The model with this one operator: what it computes from becomes the inputs."""
    single, graph = copy.copy(model), copy.copy(model.subgraphs[0])
    used = list(dict.fromkeys(int(i) for i in [*operator.inputs, *operator.outputs] if i >= 0))
    places = {index: place for place, index in enumerate(used)}
    graph.tensors = [graph.tensors[index] for index in used]
    moved = copy.copy(operator)
    moved.inputs = [places.get(int(i), -1) for i in operator.inputs]
    moved.outputs = [places[int(i)] for i in operator.outputs]
    graph.operators = [moved]
    graph.inputs = [i for i in dict.fromkeys(moved.inputs) if i >= 0 and not _constant(model, graph.tensors[i])]
    graph.outputs = list(moved.outputs)
    single.subgraphs, single.signatureDefs, single.metadata = [graph], [], []
    single.metadataBuffer = None
    _keep_buffers(single, graph)
    return single


def _constant(model: Any, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


def _keep_buffers(single: Any, graph: Any) -> None:
    """Leaves the buffers that the graph's tensors have; the first is the empty one."""
    needed = sorted({0, *(int(tensor.buffer) for tensor in graph.tensors)})
    single.buffers = [single.buffers[index] for index in needed]
    tensors = []
    for tensor in graph.tensors:
        moved = copy.copy(tensor)
        moved.buffer = needed.index(int(tensor.buffer))
        tensors.append(moved)
    graph.tensors = tensors


def _timer(session: TFLiteSession, runs: int) -> Callable[[], float]:
    generator = np.random.default_rng(0)
    feeds = {
        info.name: generator.random([max(1, side) for side in info.shape]).astype(info.dtype) for info in session.inputs
    }

    def median() -> float:
        times = []
        for _ in range(WARMUP + runs):
            begun = time.perf_counter_ns()
            session.invoke()
            times.append(time.perf_counter_ns() - begun)
        return float(np.median(times[WARMUP:])) / 1e3

    session.run(feeds)
    return median
