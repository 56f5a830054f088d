"""A rewritten model is told apart from the original where it differs by more than float rounding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.float_check import check_agreement, random_feeds

REFERENCE = {"scores": np.array([[1.0, -4.0, 2.0]], np.float32)}


def test_rounding_is_accepted_and_measured() -> None:
    moved = {"scores": REFERENCE["scores"] + np.float32(1e-5)}
    assert check_agreement(REFERENCE, moved, "the step") == pytest.approx(1e-5 / 4, rel=0.1)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            {"scores": np.array([[1.0, -4.0, 2.1]])},
            r"the step changed output 'scores' by up to 0\.1 \(at \[0, 2\]: 2 became",
        ),
        ({"scores": np.array([1.0, -4.0, 2.0])}, r"from shape \(1, 3\) to \(3,\)"),
        ({"other": REFERENCE["scores"]}, r"from \['scores'\] to \['other'\]"),
        ({"scores": np.array([[1.0, np.nan, 2.0]])}, "1 values are not finite, 0 were"),
    ],
)
def test_what_is_more_than_rounding_is_told(outputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(StageError, match=message):
        check_agreement(REFERENCE, outputs, "the step")


def test_infinities_in_the_same_places_agree() -> None:
    outputs = {"mask": np.array([-np.inf, 0.0, np.nan], np.float32)}
    assert check_agreement(outputs, outputs, "the step") == 0.0


def test_random_inputs_are_the_same_each_time_and_fit_the_model(tiny_model: ir.Model) -> None:
    first, second = (list(random_feeds(tiny_model, 2)) for _ in range(2))
    assert [each["image"].shape for each in first] == [(1, 3, 12, 12)] * 2
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0]["image"], first[1]["image"])


def test_an_input_without_a_known_rank_is_told(tiny_model: ir.Model) -> None:
    tiny_model.graph.inputs[0].shape = None
    with pytest.raises(InputError, match="input 'image' has no known rank"):
        list(random_feeds(tiny_model, 1))
