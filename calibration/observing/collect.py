"""Runs the float graph over samples and shows observers the values inside it, one sample at a time.

A few samples' values are alive at any moment and an observer's state has a fixed size, so memory does not grow with
the number of samples. The next samples run while one is looked at; observers see them in order, so the result does not
depend on how fast anything was.

Taking a tensor out of the graph costs time: the runtime must lay it out in the standard way and cannot reuse its
memory. So a tensor whose statistics say that no value within its bounds can change them (the smallest and largest value
of what a ReLU6 cuts, once 0 and 6 were seen) is left inside for the remaining samples.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from edgeship.calibration.algorithms import load
from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import ACTIVATION_OPERATORS, activation_bounds, node_key, value_name
from edgeship.calibration.observing.expose import Exposer
from edgeship.calibration.types import Array, Observer, OpenModel, Session

AT_ONCE = 2
"""How many samples run side by side, each in one thread."""
GLIMPSES = 8
"""Of so many samples, at even distances, the values are shown to whoever is content with a few."""
_WORTH = 0.5
"""Another session is opened once at most this share of the values that the last one gives out can still matter."""


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


@runtime_checkable
class Settling(Protocol):
    """A statistic that can have seen enough."""

    def settled(self, low: float, high: float) -> bool:
        """Whether no value in [low, high] would change anything."""


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


def observe(  # noqa: PLR0913, PLR0917 - as `collect`
    model: ir.Model,
    samples: Iterable[Feeds],
    statistics: Mapping[str, Sequence[Statistic]],
    open_model: OpenModel,
    progress: Progress | None = None,
    glimpses: Mapping[str, Statistic] | None = None,
) -> None:
    """Nothing; all statistics have seen their tensor (named by the key) for every sample. Raises as `collect` does.

    A `Settling` one need not have seen samples that could not have changed it. `glimpses` are shown the tensor for
    `GLIMPSES` samples at even distances, or for all where their number is not known beforehand.
    """
    total = len(samples) if isinstance(samples, Sized) else 0
    done = 0
    with ThreadPoolExecutor(1) as opener:
        inside = _Inside(model, statistics, glimpses or {}, open_model, opener, total)
        for sample, values in _ahead(samples, inside.values_of):
            inside.show(sample, done, values)
            values.clear()  # before the next sample runs
            done += 1
            inside.narrow(done)
            if progress is not None:
                progress(done, total, "calibrate")
    if done == 0:
        raise InputError(
            "there are no calibration samples; at least one is needed to know the ranges of the activations"
        )


class _Inside:
    """A model whose inner tensors can be seen: all that are asked for, or those only that can still matter."""

    def __init__(  # noqa: PLR0913, PLR0917 - as `observe`, and who opens the next session
        self,
        model: ir.Model,
        statistics: Mapping[str, Sequence[Statistic]],
        glimpses: Mapping[str, Statistic],
        open_model: OpenModel,
        opener: Executor,
        total: int,
    ) -> None:
        self._model = model
        self._open_model = open_model
        self._inputs = {value_name(value) for value in model.graph.inputs}
        self._statistics = statistics
        self._glimpses = glimpses
        self._every = max(1, -(-total // GLIMPSES))
        self._total = total
        self._bounds = _bounds(model, statistics)
        self._sizes = _declared_sizes(model)
        self._moving = list(statistics)
        self._opener = opener
        self._opening: Future[Session | None] | None = None
        self._opened_for: list[str] = []
        self._expose = Exposer(model)
        self._open_next([name for name in self._moving if name not in self._bounds])
        self._whole = self._open([*statistics, *(name for name in glimpses if name not in statistics)])
        self._few = self._whole

    def values_of(self, index: int, sample: Feeds) -> dict[str, Array]:
        """The tensors by name that sample number `index` shows."""
        return self._run(self._whole if self._is_glimpsed(index) else self._few, sample)

    def show(self, sample: Feeds, index: int, values: Mapping[str, Array]) -> None:
        """Nothing; the statistics have seen the values of sample number `index`. Raises InputError."""
        try:
            self._update(sample, index, values)
        except InputError:
            whole = self._run(self._whole, sample)
            if len(values) < len(whole):  # it may have begun at a tensor that was left inside
                self._update(sample, index, whole)
            raise

    def narrow(self, done: int) -> None:
        """Nothing; what can no longer matter is left inside for the next samples, where that is worth it.

        The first guess is that all will have settled that can, and its session is opened together with the whole one.
        Where it is wrong, another one is opened after 1, 2, 4, 8 ... samples, while they go on in the last.
        """
        moving = [name for name in self._moving if not self._has_settled(name)]
        if self._opening is not None:
            if not self._opening.done():
                return
            if set(moving) <= set(self._opened_for):
                self._few, self._moving, self._opening = self._opening.result(), self._opened_for, None
        late = self._total and done >= self._total // 2
        if not done & (done - 1) and not late:
            self._open_next(moving)

    def _open_next(self, moving: list[str]) -> None:
        if 0 < self._size(self._moving) * _WORTH >= self._size(moving):
            self._opening, self._opened_for = self._opener.submit(self._open, moving), moving

    def _update(self, sample: Feeds, index: int, values: Mapping[str, Array]) -> None:
        for name, each in self._statistics.items():
            if name not in values:
                continue
            self._sizes[name] = values[name].size
            glimpsed = [self._glimpses[name]] if name in self._glimpses and self._is_glimpsed(index) else []
            try:
                for statistic in [*each, *glimpsed]:
                    statistic.update(values[name])
            except ValueError as error:
                raise InputError(f"{_describe(self._model, name)} on sample {sample.name}: {error}") from error

    def _run(self, session: Session | None, sample: Feeds) -> dict[str, Array]:
        values = dict(sample.feeds)
        missing = sorted(name for name in self._inputs if name not in values)
        if missing:
            raise InputError(f"sample {sample.name} has no values for the model's inputs {', '.join(missing)}")
        return values if session is None else values | session.run({name: values[name] for name in self._inputs})

    def _open(self, names: Iterable[str]) -> Session | None:
        inner = [name for name in names if name not in self._inputs]
        return self._open_model(self._expose(inner), self._expose.weights) if inner else None

    def _is_glimpsed(self, index: int) -> bool:
        return bool(self._glimpses) and index % self._every == 0

    def _has_settled(self, name: str) -> bool:
        bounds = self._bounds.get(name)
        return bounds is not None and all(
            isinstance(each, Settling) and each.settled(*bounds) for each in self._statistics[name]
        )

    def _size(self, names: Iterable[str]) -> int:
        return sum(self._sizes.get(name, 0) for name in names if name not in self._inputs)


def _bounds(model: ir.Model, statistics: Mapping[str, Sequence[Statistic]]) -> dict[str, tuple[float, float]]:
    """What a Clip cuts the tensors to that can settle, by name.

    Not those of the model's outputs, which show whether all numbers are finite.
    """
    outputs = {value_name(value) for value in model.graph.outputs}
    wanted = {name for name, each in statistics.items() if all(isinstance(one, Settling) for one in each)} - outputs
    made = {value_name(node.outputs[0]): node for node in model.graph if node.op_type in ACTIVATION_OPERATORS}
    found = {name: activation_bounds(node) for name, node in made.items() if name in wanted}
    return {name: bounds for name, bounds in found.items() if bounds is not None and np.isfinite(bounds).all()}


def _declared_sizes(model: ir.Model) -> dict[str, int]:
    """How many values the tensors have of which the model says so, by name."""
    shapes = {value_name(value): value.shape for node in model.graph for value in node.outputs}
    return {name: math.prod(shape.numpy()) for name, shape in shapes.items() if shape is not None and shape.is_static()}


def _ahead(
    samples: Iterable[Feeds], values_of: Callable[[int, Feeds], dict[str, Array]]
) -> Iterator[tuple[Feeds, dict[str, Array]]]:
    """Every sample with its values, in order, while the next ones are computed.

    Linear algebra gets one thread meanwhile: a statistic's matrix products are small, and the threads of a library that
    waits for them in a busy loop would keep the model from running (MobileNetV1 took 3.5 times as long on 2 cores).
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(AT_ONCE) as pool:
        running: deque[tuple[Feeds, Future[dict[str, Array]]]] = deque()

        def first() -> tuple[Feeds, dict[str, Array]]:
            sample, values = running.popleft()
            return sample, values.result()

        for index, sample in enumerate(samples):
            running.append((sample, pool.submit(values_of, index, sample)))
            if len(running) > AT_ONCE:
                yield first()
        while running:
            yield first()


def _describe(model: ir.Model, name: str) -> str:
    for node in model.graph:
        if any(value.name == name for value in node.outputs):
            return f"tensor {name} (output of node {node_key(node)}, {node.op_type})"
    return f"input {name}"
