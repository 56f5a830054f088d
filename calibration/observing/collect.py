"""Runs the float graph over samples and shows observers the values inside it, one sample at a time.

A few samples' values are alive at any moment and an observer's state has a fixed size, so memory does not grow with
the number of samples. The next samples run while one is looked at; observers see them in order, so the result does not
depend on how fast anything was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import onnx_ir as ir

from edgeship.calibration.algorithms import load
from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import node_key, value_name
from edgeship.calibration.types import Array, Observer, OpenModel

AT_ONCE = 2
"""How many samples run side by side, each in one thread."""


class Feeds(Protocol):
    """One calibration sample: a name for messages, and the model's inputs by name with batch 1."""

    @property
    def name(self) -> str:
        """What to call the sample in a message: a file name, an index."""

    @property
    def feeds(self) -> Mapping[str, Array]:
        """Input name -> float32 array."""


class Progress(Protocol):
    """Tells the user how far the work is."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` samples are finished (`total` 0: unknown)."""


class Statistic(Protocol):
    """Anything that takes in a tensor's values batch by batch in memory of fixed size: every Observer is one."""

    def update(self, values: Array) -> None:
        """Takes in one batch. Raises ValueError for values it cannot take."""


def collect(  # noqa: PLR0913, PLR0917 - the agreed seam: what, on what, how, with what
    model: ir.Model,
    samples: Iterable[Feeds],
    names: Sequence[str],
    algorithm: str,
    open_model: OpenModel,
    progress: Progress | None = None,
) -> dict[str, Observer]:
    """An observer of `algorithm` for each tensor in `names`, after it has seen all `samples`.

    Raises InputError for no samples, a sample that does not feed the model, or a tensor with NaN or infinite values.
    """
    factory = load(algorithm)
    observers = {name: factory() for name in names}
    observe(model, samples, {name: [observer] for name, observer in observers.items()}, open_model, progress)
    return observers


def observe(
    model: ir.Model,
    samples: Iterable[Feeds],
    statistics: Mapping[str, Sequence[Statistic]],
    open_model: OpenModel,
    progress: Progress | None = None,
) -> None:
    """Nothing; all statistics have seen their tensor (named by the key) for every sample. Raises as `collect` does."""
    inputs = {value_name(value) for value in model.graph.inputs}
    inner = [name for name in statistics if name not in inputs]
    session = open_model(expose(model, inner)) if inner else None
    total = len(samples) if isinstance(samples, Sized) else 0
    done = 0

    def values_of(sample: Feeds) -> dict[str, Array]:
        values = dict(sample.feeds)
        missing = sorted(name for name in inputs if name not in values)
        if missing:
            raise InputError(f"sample {sample.name} has no values for the model's inputs {', '.join(missing)}")
        computed = {} if session is None else session.run({name: values[name] for name in inputs})
        return values | computed

    for sample, values in _ahead(samples, values_of):
        for name, each in statistics.items():
            try:
                for statistic in each:
                    statistic.update(values[name])
            except ValueError as error:
                raise InputError(f"{_describe(model, name)} on sample {sample.name}: {error}") from error
        done += 1
        if progress is not None:
            progress(done, total, "calibrate")
    if done == 0:
        raise InputError(
            "there are no calibration samples; at least one is needed to know the ranges of the activations"
        )


def _ahead(
    samples: Iterable[Feeds], values_of: Callable[[Feeds], dict[str, Array]]
) -> Iterator[tuple[Feeds, dict[str, Array]]]:
    """Every sample with its values, in order, while the next ones are computed.

    Linear algebra gets one thread meanwhile: a statistic's matrix products are small, and the threads of a library that
    waits for them in a busy loop would keep the model from running (MobileNetV1 took 3.5 times as long on 2 cores).
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(AT_ONCE) as pool:
        running: deque[tuple[Feeds, Future[dict[str, Array]]]] = deque()
        for sample in samples:
            running.append((sample, pool.submit(values_of, sample)))
            if len(running) > AT_ONCE:
                first, values = running.popleft()
                yield first, values.result()
        for first, values in running:
            yield first, values.result()


def expose(model: ir.Model, names: Sequence[str]) -> bytes:
    """The serialized model with the tensors `names` as its only outputs. Raises InputError for an unknown name."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    unknown = [name for name in names if name not in values]
    if unknown:
        raise InputError(f"the model has no tensors called {', '.join(unknown)}")
    copy.graph.outputs[:] = [values[name] for name in names]
    for name in names:
        if values[name].dtype is None:
            values[name].dtype = ir.DataType.FLOAT
    return bytes(ir.to_proto(copy).SerializeToString())


def _describe(model: ir.Model, name: str) -> str:
    for node in model.graph:
        if any(value.name == name for value in node.outputs):
            return f"tensor {name} (output of node {node_key(node)}, {node.op_type})"
    return f"input {name}"
