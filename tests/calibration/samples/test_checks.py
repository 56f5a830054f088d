"""Calibration data that would give wrong ranges is refused; what deserves a look is noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.checks import Expected, check_calibration, to_json
from edgeship.calibration.samples.data import Preprocessing, Samples, open_samples

Array = np.ndarray[Any, np.dtype[Any]]
DECLARED = Preprocessing(shape=(1, 3, 24, 24), mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))


def photographs(count: int = 6) -> Array:
    """Pixels 0..255 that are like their neighbours, each colour with a level of its own: (n, 3, 24, 24)."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(count, 3, 24, 24)), axis=2), axis=3)
    smooth -= smooth.min(axis=(2, 3), keepdims=True)
    smooth *= 200 / smooth.max(axis=(2, 3), keepdims=True)
    return smooth + np.array([0, 25, 55]).reshape(1, 3, 1, 1)


def of(tmp_path: Path, values: Array, labels: list[int] | None = None) -> Samples:
    path = tmp_path / f"{np.random.default_rng().integers(1 << 60)}.npz"
    arrays = {"input": values.astype(np.float32)} | ({} if labels is None else {"label": np.array(labels)})
    np.savez(path, allow_pickle=False, **arrays)
    return open_samples(path)


def test_photographs_preprocessed_as_declared_are_fine(tmp_path: Path) -> None:
    assert check_calibration(of(tmp_path, photographs() / 127.5 - 1), Expected(DECLARED)) == []


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: x / 127.5, lambda x: x - 127.5])
def test_arrays_outside_of_what_was_declared_are_an_error(tmp_path: Path, wrong: Any) -> None:
    (finding,) = check_calibration(of(tmp_path, wrong(photographs())), Expected(DECLARED))
    assert finding.severity == "error"
    assert "leaves the range of the declared preprocessing" in finding.rule
    assert finding.accepted == "[-1, 1], what mean and std make of pixels 0..255"


def test_arrays_that_were_scaled_twice_are_an_error(tmp_path: Path) -> None:
    (finding,) = check_calibration(of(tmp_path, (photographs() / 127.5 - 1) / 127.5), Expected(DECLARED))
    assert finding.severity == "error"
    assert "uses next to nothing of the range" in finding.rule


@pytest.mark.parametrize("wrong", [lambda x: x / 255, lambda x: x - 127, lambda x: x + 0.5, lambda x: 2 * x])
def test_numbers_that_are_no_pixels_are_an_error_where_the_model_takes_pixels(tmp_path: Path, wrong: Any) -> None:
    pixels, expected = np.clip(np.rint(photographs()), 0, 255), Expected(pixels={"input"})
    assert check_calibration(of(tmp_path, pixels), expected) == []
    (finding,) = check_calibration(of(tmp_path, wrong(pixels)), expected)
    assert finding.severity == "error"
    assert "input 'input' takes pixels (uint8)" in finding.rule
    assert finding.accepted == "whole numbers, 0 .. 255"


def test_what_is_declared_of_the_image_is_not_held_against_other_inputs(tmp_path: Path) -> None:
    path = tmp_path / "two.npz"
    np.savez(path, image=(photographs() / 127.5 - 1).astype(np.float32), place=np.full((6, 2), 1e3, np.float32))
    samples = open_samples(path, shapes={"image": (1, 3, 24, 24), "place": (1, 2)})
    assert check_calibration(samples, Expected(DECLARED)) == []


@pytest.mark.parametrize("wrong", [False, True], ids=["as declared", "otherwise"])
def test_arrays_with_channels_last_are_held_against_what_was_declared(tmp_path: Path, wrong: bool) -> None:
    values = photographs().transpose(0, 2, 3, 1) / (1 if wrong else 127.5) - 1
    declared = Preprocessing(shape=(1, 24, 24, 3), mean=DECLARED.mean, std=DECLARED.std)
    path = tmp_path / "last.npz"
    np.savez(path, input=values.astype(np.float32))
    assert [finding.severity for finding in check_calibration(open_samples(path), Expected(declared))] == [
        "error"
    ] * wrong


def test_arrays_are_held_against_what_was_declared_of_images_of_any_size(tmp_path: Path) -> None:
    declared = Preprocessing(shape=(-1, 3, -1, -1), mean=DECLARED.mean, std=DECLARED.std)
    (finding,) = check_calibration(of(tmp_path, photographs()), Expected(declared))
    assert "leaves the range of the declared preprocessing" in finding.rule
    assert check_calibration(of(tmp_path, photographs() / 127.5 - 1), Expected(declared)) == []


def test_nothing_is_said_of_values_where_nothing_was_declared(tmp_path: Path) -> None:
    assert check_calibration(of(tmp_path, photographs())) == []


def test_channels_last_images_reshaped_to_channels_first_are_an_error(tmp_path: Path) -> None:
    images = photographs()
    scrambled = images.transpose(0, 2, 3, 1).reshape(images.shape)
    (finding,) = check_calibration(of(tmp_path, scrambled))
    assert finding.severity == "error"
    assert finding.accepted == "array.transpose(0, 3, 1, 2)"


def test_noise_is_no_scrambled_image(tmp_path: Path) -> None:
    assert check_calibration(of(tmp_path, np.random.default_rng(1).normal(size=(6, 3, 24, 24)))) == []


def test_channels_last_shapes_are_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "nhwc.npz"
    np.savez(path, image=np.zeros((4, 24, 20, 3), np.float32))
    with pytest.raises(InputError, match=r"look like NHWC images: give them as NCHW, array.transpose\(0, 3, 1, 2\)"):
        open_samples(path, shapes={"image": (1, 3, 24, 20)})


def test_samples_of_one_class_are_noted(tmp_path: Path) -> None:
    (finding,) = check_calibration(of(tmp_path, photographs(), [3] * 6), Expected(classes=10))
    assert (finding.severity, finding.rule) == ("note", "all 6 samples are of class 3")


def test_missing_classes_are_noted_where_there_are_samples_enough(tmp_path: Path) -> None:
    labels = [0, 0, 1, 1, 1, 0]
    (finding,) = check_calibration(of(tmp_path, photographs(), labels), Expected(classes=3))
    assert (finding.severity, finding.rule, finding.seen) == ("note", "1 of 3 classes have no sample", "class 2")
    assert check_calibration(of(tmp_path, photographs(), labels), Expected(classes=1000)) == []


def test_samples_that_are_judged_on_too_are_noted_by_content(tmp_path: Path) -> None:
    for folder, pixels in (("a", (0, 1, 2)), ("b", (2, 3))):
        (tmp_path / folder).mkdir()
        for i in pixels:
            image = Image.fromarray(photographs(4)[i].transpose(1, 2, 0).astype(np.uint8))
            image.save(tmp_path / folder / f"{folder}{i}.png")
    calibration = open_samples(tmp_path / "a", preprocessing=DECLARED)
    evaluation = open_samples(tmp_path / "b", preprocessing=DECLARED)
    (finding,) = check_calibration(calibration, Expected(evaluation=evaluation.contents()))
    assert finding.severity == "note"
    assert finding.rule.startswith("1 of 3 samples are evaluation samples too")
    assert finding.seen == "a2.png = b2.png"


def test_findings_as_plain_values_say_everything(tmp_path: Path) -> None:
    (finding,) = to_json(check_calibration(of(tmp_path, np.ones((1, 3)))))
    assert finding.keys() == {"where", "rule", "seen", "accepted", "severity"}
    assert finding["severity"] == "error"
