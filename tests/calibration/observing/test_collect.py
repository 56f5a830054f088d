from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.observing.collect import AT_ONCE, collect, observe


@pytest.fixture
def model(build: Callable[..., ir.Model]) -> ir.Model:
    return build(
        "(float[1,2,4,4] x) => (float[1,3,4,4] y) { c = Conv(x, w) y = Relu(c) }",
        w=np.linspace(-1, 1, 6).reshape(3, 2, 1, 1),
    )


def test_observers_see_inputs_and_inner_tensors(model: ir.Model, samples: Any, open_float: Any) -> None:
    shots = samples(model, 3)
    observers = collect(model, shots, ["x", "c"], "minmax", open_float)
    values = np.concatenate([shot.feeds["x"] for shot in shots])
    weights = np.linspace(-1, 1, 6).reshape(3, 2)
    inner = np.einsum("oc,nchw->nohw", weights, values)
    assert observers["x"].range() == pytest.approx((values.min(), values.max()))
    assert observers["c"].range() == pytest.approx((inner.min(), inner.max()), rel=1e-5)


def test_no_samples_are_an_error(model: ir.Model, open_float: Any) -> None:
    with pytest.raises(InputError, match="no calibration samples"):
        collect(model, [], ["c"], "minmax", open_float)


def test_a_sample_without_the_input_is_an_error(model: ir.Model, samples: Any, open_float: Any) -> None:
    shot = samples(model)[0]
    shot.feeds["image"] = shot.feeds.pop("x")
    with pytest.raises(InputError, match=r"sample 0 has no values for the model's inputs x"):
        collect(model, [shot], ["c"], "minmax", open_float)


def test_a_nan_is_reported_with_tensor_operator_and_sample(model: ir.Model, samples: Any, open_float: Any) -> None:
    shots = samples(model)
    shots[2].feeds["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"tensor c \(output of node Conv_c, Conv\) on sample sample 2: 3 of its 48"):
        collect(model, shots, ["c"], "minmax", open_float)


def test_an_unknown_tensor_is_an_error(model: ir.Model, samples: Any, open_float: Any) -> None:
    with pytest.raises(InputError, match="no tensors called nothing"):
        collect(model, samples(model), ["nothing"], "minmax", open_float)


def test_samples_are_let_go_while_others_are_made(model: ir.Model, samples: Any, open_float: Any) -> None:
    """What is alive does not grow with the number of samples: those that run, one waiting, one looked at, one made."""
    import weakref

    alive: list[weakref.ref[Any]] = []
    most = 0

    def stream() -> Iterator[Any]:
        nonlocal most
        for shot in (samples(model, 1, seed)[0] for seed in range(20)):
            alive.append(weakref.ref(shot.feeds["x"]))
            most = max(most, sum(ref() is not None for ref in alive))
            yield shot

    collect(model, stream(), ["x", "c"], "minmax", open_float)
    assert most <= AT_ONCE + 3


def test_progress_counts_samples(model: ir.Model, samples: Any, open_float: Any) -> None:
    seen: list[tuple[int, int]] = []
    observe(model, samples(model, 3), {"c": []}, open_float, lambda done, total, what="": seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
