from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.observing.collect import AT_ONCE, GLIMPSES, Statistic, collect, observe
from edgeship.calibration.observing.expose import Exposer
from edgeship.calibration.values.ranges import Extremes


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


@pytest.fixture
def clipped(build: Callable[..., ir.Model]) -> ir.Model:
    return build(
        """(float[1,2,8,8] x) => (float[1,3,4,4] y) <float lo, float hi, float far>
        { c = Conv(x, w) d = Clip(c, lo, hi) e = Conv<strides=[2,2]>(d, v) f = Clip(e, lo, far) y = Conv(f, u) }""",
        w=np.array([[9.0, -9.0], [-9.0, 9.0], [5.0, 5.0]]).reshape(3, 2, 1, 1),
        v=np.ones((3, 3, 1, 1)),
        u=np.ones((3, 3, 1, 1)),
        lo=0.0,
        hi=1.0,
        far=1e6,
    )


class Opened:
    """Opens models and remembers with which outputs."""

    def __init__(self, open_float: Any) -> None:
        self.outputs: list[set[str]] = []
        self._open = open_float

    def __call__(self, model: bytes, weights: Mapping[str, np.ndarray]) -> Any:
        session = self._open(model, weights)
        self.outputs.append({info.name for info in session.outputs})
        return session


def test_what_has_reached_its_bounds_stays_inside_and_the_ranges_are_the_same(
    clipped: ir.Model, samples: Any, open_float: Any
) -> None:
    """A tensor that a Clip cuts at 0 and 1, once both were seen; not one of bounds never reached, nor the output."""
    opened = Opened(open_float)
    shots = samples(clipped, 40)
    names = ["x", "d", "f", "y"]
    observers = collect(clipped, shots, names, "minmax", opened)
    hoped, right, whole = {"y"}, {"f", "y"}, {"d", "f", "y"}
    assert sorted(opened.outputs, key=len) == [hoped, right, whole]
    exposed = Exposer(clipped)
    session = open_float(exposed(names[1:]), exposed.weights)
    seen = [{**shot.feeds, **session.run(shot.feeds)} for shot in shots]
    for name, observer in observers.items():
        assert observer.range() == (
            min(0.0, *(float(each[name].min()) for each in seen)),
            max(0.0, *(float(each[name].max()) for each in seen)),
        )


def test_where_all_settles_that_can_the_session_that_was_hoped_for_is_the_last(
    clipped: ir.Model, samples: Any, open_float: Any
) -> None:
    opened = Opened(open_float)
    collect(clipped, samples(clipped, 40), ["x", "d", "y"], "minmax", opened)
    assert sorted(opened.outputs, key=len) == [{"y"}, {"d", "y"}]


def test_large_weights_are_handed_over_and_the_rest_stays_in_the_message(
    build: Callable[..., ir.Model], samples: Any, open_float: Any
) -> None:
    model = build(
        "(float[1,16,4,4] x) => (float[1,16,4,4] y) { c = Conv(x, w) d = Conv(c, v) y = Relu(d) }",
        w=np.linspace(-1, 1, 256).reshape(16, 16, 1, 1),
        v=np.eye(16).reshape(16, 16, 1, 1),
    )
    exposed = Exposer(model)
    content = exposed(["c", "y"])
    assert set(exposed.weights) == {"w", "v"}
    assert len(content) < sum(values.nbytes for values in exposed.weights.values())
    feeds = samples(model)[0].feeds
    whole = open_float(ir.to_proto(model).SerializeToString()).run(feeds)["y"]
    assert np.array_equal(open_float(content, exposed.weights).run(feeds)["y"], whole)


@pytest.mark.parametrize("algorithm", ["moving_average", "percentile", "mse", "entropy"])
def test_what_depends_on_all_values_sees_all_of_them(
    clipped: ir.Model, samples: Any, open_float: Any, algorithm: str
) -> None:
    opened = Opened(open_float)
    collect(clipped, samples(clipped, 20), ["d", "y"], algorithm, opened)
    assert opened.outputs == [{"d", "y"}]


def test_a_nan_behind_a_tensor_that_stays_inside_is_found_where_it_began(
    clipped: ir.Model, samples: Any, open_float: Any
) -> None:
    shots = samples(clipped, 40)
    shots[30].feeds["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"tensor d \(output of node Clip_d, Clip\) on sample sample 30"):
        collect(clipped, shots, ["d", "y"], "minmax", open_float)


def test_glimpses_see_some_samples_at_even_distances(clipped: ir.Model, samples: Any, open_float: Any) -> None:
    class Kept:
        def __init__(self) -> None:
            self.values: list[np.ndarray] = []

        def update(self, values: np.ndarray) -> None:
            self.values.append(values)

    glimpses = {"x": Kept(), "d": Kept()}
    shots = samples(clipped, 40)
    statistics: dict[str, list[Statistic]] = {name: [Extremes()] for name in ("x", "d", "y")}
    observe(clipped, shots, statistics, open_float, glimpses=glimpses)
    looked_at = [shot.feeds["x"] for shot in shots[:: 40 // GLIMPSES]]
    assert len(glimpses["d"].values) == GLIMPSES
    assert all(np.array_equal(*pair) for pair in zip(glimpses["x"].values, looked_at, strict=True))
