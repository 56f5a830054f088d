from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.planning.input_grid import CLEARANCE, image_input_params, pixel_levels
from edgeship.calibration.planning.plan import make_plan, tensors_to_observe
from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.calibration.types import OperatorRule, QuantRules, TensorSpec
from edgeship.calibration.values.ranges import Range, range_of, representable

SPEC = TensorSpec()
SHAPE = (1, 3, 8, 8)


class _Seen:
    def __init__(self, low: float, high: float) -> None:
        self._range = (low, high)

    def update(self, values: np.ndarray) -> None: ...

    def merge(self, other: object) -> None: ...

    def range(self) -> tuple[float, float]:
        return self._range


@given(
    mean=st.tuples(*[st.floats(0, 255)] * 3),
    std=st.tuples(*[st.floats(20, 255)] * 3),
)
def test_no_pixel_lies_on_a_rounding_boundary_and_none_is_off_by_more_than_the_widening(mean, std):
    preprocessing = Preprocessing(SHAPE, mean, std)
    levels = pixel_levels(preprocessing)
    observed = range_of(levels)
    params = image_input_params(observed, preprocessing, SPEC)
    places = levels / float(params.scale)
    clearance = np.abs(places - np.floor(places) - 0.5).min()
    assert clearance > 1e-5, "float32 rounding decides between two integers"
    assert float(params.scale) <= observed.span / 255 * 1.0201 or np.isclose(float(params.scale), 1 / std[0])
    assert observed.within(representable(params), float(params.scale))


def test_half_way_pixels_are_moved_off_the_boundary():
    preprocessing = Preprocessing(SHAPE, (127.5,) * 3, (127.5,) * 3)
    params = image_input_params(Range(-1.0, 1.0), preprocessing, SPEC)
    places = pixel_levels(preprocessing) / float(params.scale)
    assert np.abs(places - np.floor(places) - 0.5).min() >= CLEARANCE
    assert float(params.scale) < 2 / 255 * 1.005


@given(st.integers(0, 255), st.sampled_from([1.0, 58.0, 128.0, 255.0]))
def test_pixels_on_an_integer_grid_are_represented_exactly(mean, std):
    preprocessing = Preprocessing(SHAPE, (mean,) * 3, (std,) * 3)
    levels = pixel_levels(preprocessing).astype(np.float32)
    params = image_input_params(range_of(levels * 0.7), preprocessing, SPEC)
    assert np.allclose(params.dequantize(params.quantize(levels)), levels, atol=1e-5 / std)
    assert len(np.unique(params.quantize(levels))) == 256


def test_a_plan_reads_the_pixels_from_the_models_metadata_and_leaves_other_models_alone():
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "g (float[1,3,8,8] image) => (float[1,3,8,8] out) {out = Add(image, image)}"
    )
    rules = QuantRules("r", {"Add": OperatorRule("Add")})
    observers = {name: _Seen(-0.9, 0.99) for name in tensors_to_observe(model, rules)}
    plain = make_plan(model, rules, observers).activations["image"]
    model.metadata_props.update(Preprocessing(SHAPE, (127.0,) * 3, (128.0,) * 3).to_metadata())
    on_grid = make_plan(model, rules, observers).activations["image"]
    assert not plain.same_as(on_grid)
    assert float(on_grid.scale) == 1 / 128
    assert int(on_grid.zero_point) == -1
