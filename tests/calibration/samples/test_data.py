"""Samples: where they come from, what is refused, which are taken."""

from __future__ import annotations

import csv
import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.checks import check_calibration
from edgeship.calibration.samples.data import Preprocessing, Samples, open_samples

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN = Preprocessing((1, 3, 8, 8))


def _picture(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Three classes with 4, 3 and 2 pictures."""
    for place, (name, count) in enumerate({"bird": 4, "cat": 3, "ape": 2}.items()):
        for number in range(count):
            _picture(tmp_path / "images" / name / f"{number}.png", 10 * place + number)
    return tmp_path / "images"


def _zipped(folder: Path, archive: Path, inner: str) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, f"{inner}/{path.relative_to(folder).as_posix()}")
    return archive / inner


def _write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_class_folders_give_the_sorted_place_as_label(class_folders: Path) -> None:
    samples = open_samples(class_folders, preprocessing=PLAIN)
    assert len(samples) == 9
    assert samples.labels == (0, 0, 1, 1, 1, 1, 2, 2, 2)
    assert samples.names[0] == "ape/0.png"
    assert [sample.label for sample in samples] == list(samples.labels)


def test_pixels_arrive_in_order_and_normalized(class_folders: Path) -> None:
    preprocessing = Preprocessing((1, 3, 8, 8), mean=(10, 20, 30), std=(2, 4, 8))
    samples = open_samples(class_folders, preprocessing=preprocessing, input_name="picture")
    for sample in samples:
        pixels = np.asarray(Image.open(class_folders / sample.name), np.float32).transpose(2, 0, 1)
        expected = (pixels - np.array([10, 20, 30]).reshape(3, 1, 1)) / np.array([2, 4, 8]).reshape(3, 1, 1)
        np.testing.assert_allclose(sample.feeds["picture"], expected[None], rtol=1e-6)
        assert sample.feeds["picture"].dtype == np.float32


def test_a_folder_in_a_zip_is_the_same_as_on_disk(class_folders: Path, tmp_path: Path) -> None:
    inside = _zipped(class_folders, tmp_path / "archive.zip", "deep/test")
    on_disk, zipped = (open_samples(path, preprocessing=PLAIN) for path in (class_folders, inside))
    assert zipped.names == on_disk.names
    assert zipped.labels == on_disk.labels
    assert zipped.digest() == on_disk.digest()
    assert not (tmp_path / "deep").exists()


def test_samples_can_be_gone_through_again(class_folders: Path) -> None:
    samples = open_samples(class_folders, preprocessing=PLAIN)
    first, second = ([sample.feeds["input"] for sample in samples] for _ in range(2))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))


def test_stopping_early_leaves_no_thread_behind(class_folders: Path) -> None:
    import threading

    before = threading.active_count()
    iterator = iter(open_samples(class_folders, preprocessing=PLAIN))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]  # a generator has it
    assert threading.active_count() == before


def test_a_csv_lists_files_beside_it_or_under_a_root(class_folders: Path, tmp_path: Path) -> None:
    rows: list[list[object]] = [["file", "label"], ["cat/1.png", 7], ["ape/0.png", 3]]
    listed = _write_csv(tmp_path / "list.csv", rows)
    samples = open_samples(listed, root=class_folders, preprocessing=PLAIN)
    assert samples.names == ("cat/1.png", "ape/0.png")
    assert samples.labels == (7, 3)
    beside = _write_csv(class_folders / "list.csv", rows)
    assert open_samples(beside, preprocessing=PLAIN).digest() == samples.digest()


def test_a_csv_may_list_files_of_a_zip(class_folders: Path, tmp_path: Path) -> None:
    inside = _zipped(class_folders, tmp_path / "archive.zip", "test")
    listed = _write_csv(tmp_path / "list.csv", [["file"], ["cat/1.png"]])
    samples = open_samples(listed, root=inside, preprocessing=PLAIN)
    assert not samples.has_labels
    assert len(list(samples)) == 1


def test_a_csv_of_labels_goes_with_a_flat_folder(tmp_path: Path) -> None:
    for number in range(3):
        _picture(tmp_path / "flat" / f"{number}.png", number)
    labels = _write_csv(tmp_path / "labels.csv", [["file", "label"], ["0.png", 5], ["1.png", 6], ["2.png", 5]])
    assert open_samples(tmp_path / "flat", preprocessing=PLAIN, labels=labels).labels == (5, 6, 5)
    assert not open_samples(tmp_path / "flat", preprocessing=PLAIN).has_labels
    (tmp_path / "flat" / "2.png").rename(tmp_path / "flat" / "9.png")
    with pytest.raises(InputError, match=r"no label for 9\.png"):
        open_samples(tmp_path / "flat", preprocessing=PLAIN, labels=labels)


def test_a_csv_of_labels_takes_the_place_of_a_lists_own(class_folders: Path, tmp_path: Path) -> None:
    labels = _write_csv(tmp_path / "labels.csv", [["file", "label"], ["cat/1.png", 5], ["ape/0.png", 6]])
    for header in (["file"], ["file", "label"]):
        rows: list[list[object]] = [[*header], *([name, 9][: len(header)] for name in ("ape/0.png", "cat/1.png"))]
        listed = _write_csv(tmp_path / "list.csv", rows)
        samples = open_samples(listed, root=class_folders, preprocessing=PLAIN, labels=labels)
        assert samples.labels == (6, 5)


def test_a_csv_of_labels_beside_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match="accepted: the classes under the key 'label'"):
        open_samples(tmp_path / "data.npz", labels=tmp_path / "labels.csv")


def test_links_to_folders_are_followed_but_not_in_circles(class_folders: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("ape", "bee"):
        (linked / name).symlink_to(class_folders / "cat", target_is_directory=True)
    (class_folders / "cat" / "itself").symlink_to(class_folders / "cat", target_is_directory=True)
    samples = open_samples(linked, preprocessing=PLAIN)
    assert samples.names == tuple(f"{name}/{number}.png" for name in ("ape", "bee") for number in range(3))


def test_a_folder_that_cannot_be_read_is_named(class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refusing(path: Path) -> Any:
        if Path(path).name == "cat":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"images/cat cannot be read: Permission denied"):
        open_samples(class_folders, preprocessing=PLAIN)


@pytest.mark.parametrize("count", [1, 3, 5, 8, 9, 20])
def test_taking_spreads_over_classes_and_repeats(class_folders: Path, count: int) -> None:
    samples = open_samples(class_folders, preprocessing=PLAIN)
    taken = samples.take(count, seed=4)
    assert taken.names == samples.take(count, seed=4).names
    assert len(taken) == min(count, 9)
    assert list(taken.names) == sorted(taken.names)
    sizes = {0: 2, 1: 4, 2: 3}
    held = {label: (taken.labels or ()).count(label) for label in sizes}
    for label, size in sizes.items():  # no class has two fewer than another unless it has no more
        assert held[label] == size or held[label] >= max(held.values()) - 1


def test_another_seed_takes_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input=np.zeros((100, 2), np.float32))
    samples = open_samples(tmp_path / "a.npz")
    assert samples.take(10, seed=1).names != samples.take(10, seed=2).names


def test_the_digest_changes_with_contents_labels_preprocessing_and_choice(class_folders: Path) -> None:
    digests = {
        open_samples(class_folders, preprocessing=PLAIN).digest(),
        open_samples(class_folders, preprocessing=Preprocessing((1, 3, 8, 8), mean=(1,))).digest(),
        open_samples(class_folders, preprocessing=PLAIN).take(3).digest(),
    }
    (class_folders / "cat").rename(class_folders / "aaa")
    digests.add(open_samples(class_folders, preprocessing=PLAIN).digest())
    _picture(class_folders / "aaa" / "0.png", 99)
    digests.add(open_samples(class_folders, preprocessing=PLAIN).digest())
    assert len(digests) == 5


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_a_file_cut_short_is_told_by_the_digest_before_anything_is_read(tmp_path: Path, kind: str) -> None:
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.{kind}")
    samples = open_samples(tmp_path, preprocessing=PLAIN)
    samples.digest()
    content = (tmp_path / f"1.{kind}").read_bytes()
    (tmp_path / f"1.{kind}").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match=rf"1\.{kind} cannot be decoded"):
        samples.digest()


def test_a_jpeg_without_its_last_bytes_that_can_be_decoded_is_accepted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg")
    content = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(content[:-2] + b"and more")
    samples = open_samples(tmp_path, preprocessing=PLAIN)
    samples.digest()
    assert len(list(samples)) == 1


def test_an_image_of_another_size_is_told_by_the_digest(class_folders: Path) -> None:
    Image.new("RGB", (9, 8)).save(class_folders / "cat" / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png: the image has the shape \(3, 8, 9\)"):
        open_samples(class_folders, preprocessing=PLAIN).digest()


def test_any_height_and_width_are_taken_where_the_shape_says_none(tmp_path: Path) -> None:
    for index, size in enumerate([(9, 8), (5, 7)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    samples = open_samples(tmp_path, preprocessing=Preprocessing((1, 3, -1, -1)))
    assert [sample.feeds["input"].shape for sample in samples] == [(1, 3, 8, 9), (1, 3, 7, 5)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_row_by_row(tmp_path: Path, save: Any, order: Any) -> None:
    values = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)
    save(tmp_path / "a.npz", x=np.asarray(values, order=order), y=np.arange(20.0), label=np.arange(20) % 4)
    samples = open_samples(tmp_path / "a.npz", shapes={"x": (1, 3, 4), "y": (1,)})
    assert samples.input_names == ("x", "y")
    assert samples.labels == tuple(range(4)) * 5
    taken = samples.take(6)
    for sample in taken:
        row = int(sample.name.split("[")[1].rstrip("]"))
        np.testing.assert_array_equal(sample.feeds["x"], values[row : row + 1])
        assert sample.feeds["y"] == row


def test_the_digest_of_arrays_does_not_depend_on_compression(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    digests = set()
    for save, folder in ((np.savez, tmp_path / "plain"), (np.savez_compressed, tmp_path / "packed")):
        folder.mkdir()
        save(folder / "a.npz", input=values)
        digests.add(open_samples(folder / "a.npz").take(3).digest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": np.zeros((2, 3))}, r"has the keys \['picture'\]; needed: \['input'\]"),
        ({"input": np.zeros((2, 4))}, r"has the shape \[2, 4\]; accepted: \['samples', 3\]"),
        ({"input": np.float32(1)}, "single number"),
        ({"input": np.zeros((2, 3)), "label": np.zeros(3, int)}, "'label' is int64"),
        ({"input": np.zeros((2, 3)), "label": np.zeros(2)}, "2 whole numbers"),
        ({"input": np.zeros((2, 3), "S4")}, r"'input' holds \|S4; accepted: numbers"),
        ({"input": np.zeros((2, 3), complex)}, "holds complex128"),
        ({"input": np.zeros((0, 3))}, "holds no samples"),
        ({"input": np.zeros((2, 3)), "label": np.array([0, -1])}, r"\[1\] has the label -1; accepted: 0\.\.9"),
        ({"input": np.zeros((2, 3)), "label": np.array([0, 10])}, r"\[1\] has the label 10; accepted: 0\.\.9"),
    ],
)
def test_arrays_that_do_not_fit_say_seen_and_accepted(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_samples(tmp_path / "a.npz", shapes={"input": (1, 3)}, classes=10)


def test_a_pickled_array_is_refused_unread(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="object"):
        open_samples(tmp_path / "a.npz")


@pytest.mark.parametrize("keep", [0, 10, 100, -30])
def test_a_truncated_npz_is_an_input_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, input=np.zeros((50, 30)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.npz"):
        list(open_samples(path))


def test_nan_and_infinity_are_refused_with_the_samples_name(tmp_path: Path) -> None:
    values = np.zeros((4, 3), np.float32)
    values[2, 1] = np.nan
    np.savez(tmp_path / "a.npz", input=values)
    with pytest.raises(InputError, match=r"sample a\.npz\[2\]: 1 NaN in input 'input'"):
        list(open_samples(tmp_path / "a.npz"))


def test_a_file_that_is_no_image_is_named(class_folders: Path) -> None:
    (class_folders / "cat" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"cat/1\.png cannot be decoded as an image \(13 bytes\)"):
        list(open_samples(class_folders, preprocessing=PLAIN))


def test_a_truncated_image_is_named(class_folders: Path) -> None:
    path = class_folders / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cat/1\.png"):
        list(open_samples(class_folders, preprocessing=PLAIN))


def test_an_image_of_another_size_names_both_shapes(class_folders: Path) -> None:
    _picture(class_folders / "cat" / "1.png", 1, (9, 8))
    with pytest.raises(InputError, match=r"cat/1\.png: the image has the shape \(3, 9, 8\).*needs \(3, 8, 8\)"):
        list(open_samples(class_folders, preprocessing=PLAIN))


def test_missing_files_of_a_csv_are_counted_and_named(class_folders: Path, tmp_path: Path) -> None:
    rows: list[list[object]] = [["file"], ["cat/0.png"], *([f"gone{number}.png"] for number in range(8))]
    with pytest.raises(InputError, match=r"lists 8 files that are not in .*gone0\.png.*and 3 more"):
        open_samples(_write_csv(tmp_path / "list.csv", rows), root=class_folders, preprocessing=PLAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "accepted: a header"),
        (b"path,label\na.png,1\n", "accepted: a header"),
        (b"file,label\nape/0.png,one\n", "line 2: the label is 'one'; accepted: a whole number"),
        (b"file,label\nape/0.png,1.0\n", "line 2: the label is '1.0'"),
        (b"file,label\nape/0.png\n", "line 2: 1 columns, the header has 2"),
        (b"file\nape/0.png\nape/0.png\n", "lists files twice: ape/0.png"),
        (b"file\n", "holds no samples"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"file,label\nape/0.png,-1\n", "has the label -1"),
    ],
)
def test_a_csv_that_does_not_fit_is_an_input_error(class_folders: Path, text: bytes, message: str) -> None:
    path = class_folders / "list.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        open_samples(path, preprocessing=PLAIN)


def test_a_zip_lists_nothing_outside_itself(class_folders: Path, tmp_path: Path) -> None:
    inside = _zipped(class_folders, tmp_path / "archive.zip", "test")
    listed = _write_csv(tmp_path / "list.csv", [["file"], ["../images/cat/0.png"]])
    with pytest.raises(InputError, match="names files outside"):
        open_samples(listed, root=inside, preprocessing=PLAIN)


def test_places_that_hold_no_samples_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK not a zip")
    for place, message in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "empty": "holds no images",
        tmp_path / "broken.zip" / "test": "cannot be read as a .zip",
        tmp_path / "nowhere.csv": "cannot be read",
        tmp_path / "nowhere.npz": "does not exist",
    }.items():
        with pytest.raises(InputError, match=message):
            open_samples(place, preprocessing=PLAIN)


def test_images_deeper_than_class_folders_are_refused_with_the_first(class_folders: Path) -> None:
    with pytest.raises(InputError, match=r"deeper than <class>/<image>: images/ape/0\.png"):
        open_samples(_nested(class_folders), preprocessing=PLAIN)


def _nested(folder: Path) -> Path:
    outer = folder.parent / "outer"
    outer.mkdir()
    folder.rename(outer / "images")
    return outer


def test_images_without_preprocessing_are_refused(class_folders: Path) -> None:
    with pytest.raises(InputError, match="nothing says how to preprocess"):
        open_samples(class_folders)


def test_hidden_files_and_other_files_do_not_count(class_folders: Path) -> None:
    (class_folders / "notes.txt").write_text("no image")
    (class_folders / ".hidden.png").write_bytes(b"")
    assert len(open_samples(class_folders, preprocessing=PLAIN)) == 9


def _of(values: Array, tmp_path: Path) -> Samples:
    np.savez(tmp_path / "check.npz", input=values.astype(np.float32))
    return open_samples(tmp_path / "check.npz")


def test_good_calibration_data_has_no_findings(tmp_path: Path) -> None:
    assert check_calibration(_of(np.random.default_rng(0).normal(size=(5, 7)), tmp_path)) == []


def test_one_sample_is_an_error_that_says_how_many_are_accepted(tmp_path: Path) -> None:
    (finding,) = check_calibration(_of(np.ones((1, 7)), tmp_path))
    assert (finding.severity, finding.accepted) == ("error", "at least 2 samples")


def test_every_sample_with_nan_is_found(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7))
    values[1, 0], values[3, 2:4] = np.nan, np.inf
    findings = check_calibration(_of(values, tmp_path))
    assert [str(finding) for finding in findings if finding.severity == "error"] == [
        "sample check.npz[1]: input 'input' holds 1 NaN; accepted: finite numbers",
        "sample check.npz[3]: input 'input' holds 2 infinite values; accepted: finite numbers",
    ]


def test_some_duplicates_and_constant_samples_are_notes_and_only_such_are_errors(tmp_path: Path) -> None:
    some = np.random.default_rng(0).normal(size=(6, 7))
    some[1], some[2] = some[0], 3.0
    assert [finding.severity for finding in check_calibration(_of(some, tmp_path))] == ["note", "note"]
    assert [finding.severity for finding in check_calibration(_of(np.ones((4, 7)), tmp_path))] == ["error", "error"]


@pytest.mark.parametrize(("resize", "size"), [(16, (32, 16)), ((16, 16), (32, 16)), (None, (16, 16))])
def test_resize_and_crop_give_the_inputs_size(resize: Any, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing((1, 3, 8, 10), resize=resize, crop=(8, 10))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert preprocessing.apply(image).shape == (3, 8, 10)


def test_resize_is_pillows_antialiased_bilinear_and_the_crop_is_centred() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    seen = Preprocessing((1, 3, 16, 16), resize=20, crop=16).apply(image)
    resized = np.asarray(image.resize((20, 25), Image.Resampling.BILINEAR), np.float32)
    np.testing.assert_array_equal(seen, resized[4:20, 2:18].transpose(2, 0, 1))


def test_the_resize_may_be_another_of_pillows() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    seen = Preprocessing((1, 3, 16, 16), resize=(16, 16), interpolation="bicubic").apply(image)
    np.testing.assert_array_equal(seen, np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(16, 24), (61, 45)], ids=["smaller", "larger"])
def test_the_resize_without_antialiasing_takes_the_two_nearest_pixels(size: tuple[int, int]) -> None:
    import torch

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    seen = Preprocessing((1, 3, *size), resize=size, antialias=False).apply(image)
    pixels = torch.from_numpy(np.asarray(image, np.float64).transpose(2, 0, 1)[np.newaxis])
    expected = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)[0].numpy()
    np.testing.assert_allclose(seen, expected, atol=0.501)  # the file's pixels are whole numbers


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
def test_an_input_with_channels_last_holds_the_same_values(color: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    count = 1 if color == "gray" else 3
    mean = tuple(float(each) for each in range(count))
    first = Preprocessing((1, count, 9, 7), mean, (2.0,), color=color)
    last = Preprocessing((1, 9, 7, count), mean, (2.0,), color=color)
    assert (first.channels_last, last.channels_last) == (False, True)
    np.testing.assert_array_equal(last.apply(image).transpose(2, 0, 1), first.apply(image))


def test_colors_are_in_the_order_asked_for() -> None:
    image = Image.new("RGB", (2, 2), (10, 20, 30))
    assert Preprocessing((1, 3, 2, 2), color="bgr").apply(image)[:, 0, 0].tolist() == [30, 20, 10]
    assert Preprocessing((1, 1, 2, 2), color="gray").apply(image).shape == (1, 2, 2)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert Preprocessing((1, 3, 2, 2)).apply(image.convert(mode)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"shape": (1, 3, 8)},
        {"shape": (1, 1, 8, 8)},
        {"shape": (1, 3, 8, 8), "mean": (1, 2)},
        {"shape": (1, 3, 8, 8), "std": (0,)},
        {"shape": (1, 3, 8, 8), "mean": (float("nan"),)},
        {"shape": (1, 3, 8, 8), "resize": 0},
        {"shape": (1, 3, 8, 8), "crop": (8, 8, 8)},
        {"shape": (1, 3, 8, 8), "color": "hsv"},
        {"shape": (1, 3, 8, 8), "interpolation": "area"},
        {"shape": (1, 3, 8, 8), "interpolation": "bicubic", "antialias": False},
    ],
)
def test_preprocessing_that_makes_no_sense_is_an_input_error(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"accepted|channels|seen"):
        Preprocessing(**settings)


@given(
    mean=st.lists(st.floats(-300, 300), min_size=3, max_size=3),
    std=st.lists(st.floats(0.1, 300), min_size=1, max_size=1),
    resize=st.none() | st.integers(1, 500) | st.tuples(st.integers(1, 500), st.integers(1, 500)),
    color=st.sampled_from(["rgb", "bgr"]),
)
def test_metadata_gives_the_same_preprocessing_back(mean: Any, std: Any, resize: Any, color: Any) -> None:
    before = Preprocessing((-1, 3, 7, 9), tuple(mean), tuple(std), resize, (7, 9), color)
    metadata = before.to_metadata()
    assert all(key.startswith("edgeship.") and isinstance(value, str) for key, value in metadata.items())
    assert Preprocessing.from_metadata({**metadata, "other": "x"}) == before


def test_metadata_without_preprocessing_is_none_and_damaged_is_an_error() -> None:
    assert Preprocessing.from_metadata({"edgeship.other": "1"}) is None
    with pytest.raises(InputError, match="cannot be read"):
        Preprocessing.from_metadata({"edgeship.preprocessing.shape": "[1, 3"})
