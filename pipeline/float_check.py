"""Returns whether a rewritten float model computes what the original did, on given or seeded random inputs.

An output agrees when |x - y| <= TOLERANCE * max |x| + 1e-6 everywhere: what reordering float32 sums can do, and no
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array, Session

TOLERANCE = 1e-3
FLOOR = 1e-6
_DYNAMIC_BATCH = 2
_DYNAMIC_SIZE = 64


def random_feeds(model: ir.Model, count: int, seed: int = 0) -> Iterator[dict[str, Array]]:
    """`count` feeds for the model's inputs: normal values for float inputs, 0 and 1 for integers and booleans.

    A dynamic first size becomes 2, any other dynamic size 64.
    """
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield {str(value.name): _random(value, generator) for value in model.graph.inputs}


def _random(value: ir.Value, generator: np.random.Generator) -> Array:
    if value.shape is None or value.dtype is None:
        raise InputError(f"input {value.name!r} has no known rank or type; give its shape in the recipe's [input]")
    defaults = [_DYNAMIC_BATCH] + [_DYNAMIC_SIZE] * len(value.shape)
    shape = [size if isinstance(size, int) else default for size, default in zip(value.shape, defaults, strict=False)]
    dtype = value.dtype.numpy()
    if value.dtype.is_floating_point():
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def check_agreement(reference: Mapping[str, Array], candidate: Mapping[str, Array], what: str) -> float:
    """The largest error relative to the largest magnitude of its output; `what` names the step in the message.

    Raises StageError naming the output, where and how far the candidate is off, and what would be accepted.
    """
    if set(reference) != set(candidate):
        raise StageError(f"{what} changed the outputs from {sorted(reference)} to {sorted(candidate)}")
    worst = 0.0
    for name, expected in reference.items():
        found = candidate[name]
        if expected.shape != found.shape:
            raise StageError(f"{what} changed output {name!r} from shape {expected.shape} to {found.shape}")
        if expected.size:
            worst = max(worst, _relative_error(expected, found, f"{what} changed output {name!r}"))
    return worst


def _relative_error(expected: Array, found: Array, what: str) -> float:
    x, y = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    usual = np.isfinite(x)
    if not np.array_equal(usual, np.isfinite(y)) or not np.array_equal(x[~usual], y[~usual], equal_nan=True):
        raise StageError(
            f"{what}: {np.count_nonzero(~np.isfinite(y))} values are not finite, {np.count_nonzero(~usual)} were"
        )
    if not usual.any():
        return 0.0
    error = np.where(usual, np.abs(np.where(usual, x, 0.0) - np.where(usual, y, 0.0)), 0.0)
    largest, off = float(np.abs(x[usual]).max()), float(error.max())
    allowed = TOLERANCE * largest + FLOOR
    if off > allowed:
        place = [int(index) for index in np.unravel_index(int(error.argmax()), error.shape)]
        raise StageError(
            f"{what} by up to {off:.3g} (at {place}: {x[tuple(place)]:.6g} became {y[tuple(place)]:.6g}); "
            f"accepted: {allowed:.3g}, float rounding"
        )
    return off / max(largest, FLOOR)


def check_sessions(reference: Session, candidate: Session, feeds: Sequence[Mapping[str, Array]], what: str) -> float:
    """The largest relative error over `feeds`; raises as `check_agreement` does."""
    return max((check_agreement(reference.run(each), candidate.run(each), what) for each in feeds), default=0.0)
