"""Returns an exit code after serving one artifact in its runtime: this file is what runs on a device, alone.

It needs Python 3.9, numpy and the artifact's runtime, and nothing of edgeship: on a board this one file is copied and
started. Standard input and output carry a JSON object a line; each request is answered by one object, {"error": ...} in
the worst case. Arrays travel as base64 of an .npz without pickles, in the order, layout and element types of the
artifact itself: what its inputs mean is known to whoever asks.

    {"do": "facts"}                                       what this machine is, and how busy
    {"do": "load", "target", "artifact", "threads"}       "inputs", "outputs", "load_ms", "idle_bytes"
    {"do": "feed", "arrays"}                              "first_ms"; without arrays seeded random values
    {"do": "time", "count"}                               "nanoseconds" of each inference
    {"do": "run", "arrays"}                               "arrays", the outputs
    {"do": "memory"}                                      "peak_bytes"
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would wait for one another on a loaded machine
if __name__ == "__main__":  # edgeship imports this file as well, and trains with all cores
    os.environ |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}

import numpy as np

TFLITE_MODULES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite.python.interpreter")
LIBRARIES = ("numpy", "onnxruntime", "ai-edge-litert", "tflite-runtime", "tensorflow")


SETTLE_SECONDS = 0.003


class MissingError(Exception):
    """Something this machine lacks, told in one sentence."""


class UnusableError(Exception):
    """An artifact that the runtime refuses."""


class OnnxEngine:
    """An ONNX file in ONNX Runtime, with edgeship's session options."""

    def __init__(self, path: str, threads: int) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        ort = _runtime("onnxruntime", "onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [_info(v.name, v.shape, _numpy_name(v.type)) for v in self._session.get_inputs()]
        self.outputs = [_info(v.name, v.shape, _numpy_name(v.type)) for v in self._session.get_outputs()]
        self._names = [info["name"] for info in self.inputs]

    def run(self, arrays: Any) -> Any:
        """The outputs."""
        return self._session.run(None, dict(zip(self._names, arrays)))  # noqa: B905 - Python 3.9 has no strict


class TFLiteEngine:
    """A TFLite file in the first interpreter that is installed, with the kernels users get by default."""

    def __init__(self, path: str, threads: int) -> None:
        self._interpreter = _tflite_module().Interpreter(model_path=path, num_threads=threads)
        self._interpreter.allocate_tensors()
        ins, outs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self.inputs = [_info(d["name"], _signature(d), np.dtype(d["dtype"]).name) for d in ins]
        self.outputs = [_info(d["name"], _signature(d), np.dtype(d["dtype"]).name) for d in outs]
        self._ins, self._outs = [d["index"] for d in ins], [d["index"] for d in outs]
        self._shapes = [tuple(d["shape"]) for d in ins]

    def run(self, arrays: Any) -> Any:
        """The outputs."""
        interpreter = self._interpreter
        if [a.shape for a in arrays] != self._shapes:
            self._resize(arrays)
        for index, array in zip(self._ins, arrays):  # noqa: B905 - Python 3.9 has no strict
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return [self._value(index) for index in self._outs]

    def _value(self, index: int) -> Any:
        try:
            return self._interpreter.get_tensor(index)
        except ValueError:  # the interpreter cannot read a tensor without elements, such as boxes not found
            found = next(d for d in self._interpreter.get_output_details() if d["index"] == index)
            if 0 not in found["shape"]:
                raise
            return np.zeros(found["shape"], found["dtype"])

    def _resize(self, arrays: Any) -> None:
        for index, array in zip(self._ins, arrays):  # noqa: B905 - Python 3.9 has no strict
            self._interpreter.resize_tensor_input(index, array.shape)
        self._interpreter.allocate_tensors()
        self._shapes = [a.shape for a in arrays]


class ReferenceEngine:
    """A fixed piece of work in numpy: how fast this machine is at this moment, whatever the runtimes are.

    A float32 product of two 96 x 96 matrices, and one pass over 64 KiB of int8, on one thread: short enough to be done
    mostly without interruption.
    """

    def __init__(self, path: str, threads: int) -> None:
        del path, threads
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        generator = np.random.default_rng(0)
        self._matrix = generator.random((96, 96)).astype(np.float32)
        self._bytes = generator.integers(-128, 128, 1 << 16).astype(np.int8)

    def run(self, arrays: Any) -> Any:
        """Nothing."""
        del arrays
        np.maximum(self._matrix @ self._matrix, 0)
        np.maximum(self._bytes, 0)
        return []


ENGINES: dict[str, Callable[[str, int], Any]] = {
    "onnxruntime": OnnxEngine,
    "tflite": TFLiteEngine,
    "reference": ReferenceEngine,
}


def _runtime(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"{package} cannot be imported by {sys.executable} ({error}); install it there: pip install {package}"
        ) from None


def _tflite_module() -> Any:
    for name in TFLITE_MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return _runtime(TFLITE_MODULES[0], "ai-edge-litert")


def _info(name: str, shape: Sequence[Any], dtype: str) -> dict[str, Any]:
    return {"name": name, "shape": [side if isinstance(side, int) else -1 for side in shape], "dtype": dtype}


def _signature(detail: Mapping[str, Any]) -> list[int]:
    return [int(side) for side in detail.get("shape_signature", detail["shape"])]


def _numpy_name(text: str) -> str:
    name = text[len("tensor(") : -1]
    return {"float": "float32", "double": "float64"}.get(name, name)


class Server:
    """Answers requests about one artifact."""

    def __init__(self, engines: Mapping[str, Callable[[str, int], Any]]) -> None:
        self._engines = engines
        self._engine: Any = None
        self._arrays: Any = []

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        what = request["do"]
        method: Callable[[Mapping[str, Any]], dict[str, Any]] = getattr(self, f"do_{what}")
        return method(request)

    def do_facts(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """What this machine is."""
        return {"facts": raw_facts()}

    def do_load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the artifact; `load_ms` counts from before the runtime's import has been paid for."""
        maker = self._engines[request["target"]]
        idle = resident_peak()
        begun = time.perf_counter_ns()
        try:
            self._engine = maker(request["artifact"], int(request["threads"]))
        except (MissingError, MemoryError):
            raise
        except Exception as error:  # the runtimes' exceptions share no narrower base
            raise UnusableError(_sentence(error)) from error
        taken = (time.perf_counter_ns() - begun) / 1e6
        return {
            "inputs": self._engine.inputs,
            "outputs": self._engine.outputs,
            "load_ms": taken,
            "idle_bytes": idle,
        }

    def do_feed(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps what is to be timed, and runs it a first time."""
        arrays = unpack(request["arrays"]) if request.get("arrays") else []
        self._arrays = arrays or random_arrays(self._engine.inputs)
        begun = time.perf_counter_ns()
        self._engine.run(self._arrays)
        return {"first_ms": (time.perf_counter_ns() - begun) / 1e6}

    def do_time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Times some inferences, after others for a moment: caches and clock are as the last process left them."""
        end = time.perf_counter() + SETTLE_SECONDS
        while time.perf_counter() < end:
            self._engine.run(self._arrays)
        return {"nanoseconds": time_runs(self._engine.run, self._arrays, int(request["count"]))}

    def do_run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs for some inputs."""
        return {"arrays": pack([np.asarray(values) for values in self._engine.run(unpack(request["arrays"]))])}

    def do_memory(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """The largest resident memory so far."""
        return {"peak_bytes": resident_peak()}


def time_runs(run: Callable[[Any], Any], arrays: Any, count: int) -> list[int]:
    """Nanoseconds of each of `count` inferences."""
    clock = time.perf_counter_ns
    times = []
    for _ in range(count):
        begun = clock()
        run(arrays)
        times.append(clock() - begun)
    return times


def random_arrays(inputs: Sequence[Mapping[str, Any]]) -> Any:
    """Seeded values for every input: floats 0..1, 8-bit integers of all values, others 0; dynamic sides 1."""
    generator = np.random.default_rng(0)
    arrays = []
    for info in inputs:
        shape, dtype = [max(1, side) for side in info["shape"]], np.dtype(info["dtype"])
        if dtype.kind in "iu" and dtype.itemsize == 1:
            limits = np.iinfo(dtype)
            arrays.append(generator.integers(limits.min, limits.max + 1, shape).astype(dtype))
        else:
            arrays.append(generator.random(shape).astype(dtype))
    return arrays


def pack(arrays: Any) -> str:
    """Arrays as text."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def unpack(text: str) -> Any:
    """Arrays of `pack`, in their order."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as archive:
        return [archive[f"arr_{place}"] for place in range(len(archive.files))]


def resident_peak() -> int | None:
    """The largest resident memory of this process in bytes; None where the system does not tell.

    Linux's VmHWM, since getrusage also counts what the parent held when it forked.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def raw_facts() -> dict[str, Any]:
    """What the system says of itself, as it says it; the one who asks makes sense of it."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.import_module("importlib.metadata").version(name)
        except ImportError:  # PackageNotFoundError is one
            continue
    allowed = getattr(os, "sched_getaffinity", None)
    return {
        "cpuinfo": _read("/proc/cpuinfo")[:20000],
        "architecture": platform.machine(),
        "cores": len(allowed(0)) if allowed else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "ticks": [int(word) for word in _read("/proc/stat").partition("\n")[0].split()[1:]],
        "versions": versions,
    }


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400] or 'no message'}"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - one file, no imports to spare
            return file.read()
    except OSError:
        return ""


def serve(requests: BinaryIO, answers: BinaryIO, engines: Mapping[str, Callable[[str, int], Any]]) -> int:
    """Answers until the requests end; 1 after an error."""
    server = Server(engines)
    for line in requests:
        failed = False
        try:
            answer = server.answer(json.loads(line))
        except (MissingError, UnusableError) as error:
            answer, failed = {"error": str(error), "input": isinstance(error, UnusableError)}, True
        except Exception as error:  # whatever a runtime raises, the one who asks says it
            answer, failed = {"error": _sentence(error), "input": False}, True
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        if failed:
            return 1
    return 0


def main() -> int:
    """The exit code; keeps the answers apart from what a runtime prints to standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        return serve(sys.stdin.buffer, answers, ENGINES)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
