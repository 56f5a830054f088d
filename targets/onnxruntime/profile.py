"""Returns where an ONNX model's time goes, from ONNX Runtime's own profiler: the kernels of the graph it runs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from edgeship.calibration.errors import StageError
from edgeship.targets.base import OperatorTime
from edgeship.targets.onnxruntime.session import OnnxSession, model_bytes, session_options, start

_KERNEL = "_kernel_time"
WARMUP = 5


def profile(artifact: Path, threads: int, runs: int) -> list[OperatorTime]:
    """The kernels in the order they ran; each time is the mean of the middle half of `runs`, profiling included."""
    content, where = model_bytes(artifact)
    border = OnnxSession(artifact, threads)
    generator = np.random.default_rng(0)
    feeds = {
        info.name: generator.random([max(1, side) for side in info.shape]).astype(info.dtype) for info in border.inputs
    }
    values = dict(zip(feeds, border.enter(feeds), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads, optimise=True)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = start(content, where, options)
        for _ in range(WARMUP + runs):
            session.run(None, values)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _kernels(events, where)


def _kernels(events: list[dict[str, object]], where: str) -> list[OperatorTime]:
    times: dict[str, list[float]] = {}
    operators: dict[str, str] = {}
    for event in events:
        name, facts = str(event.get("name", "")), event.get("args")
        if event.get("cat") != "Node" or not name.endswith(_KERNEL) or not isinstance(facts, dict):
            continue
        node = name.removesuffix(_KERNEL)
        times.setdefault(node, []).append(float(str(event["dur"])))
        operators[node] = str(facts.get("op_name", ""))
    if not times:
        raise StageError(f"ONNX Runtime's profiler told nothing about {where}")
    return [OperatorTime(node, operators[node], _middle(taken[WARMUP:])) for node, taken in times.items()]


def _middle(values: list[float]) -> float:
    """The mean between the quartiles: the profiler counts whole microseconds, so a median would have steps."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())
