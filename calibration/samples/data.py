"""Returns samples to calibrate and evaluate with: a folder of images, a list, or arrays; one at a time, checked.

Nothing but a few samples is ever in memory: images are decoded a little ahead by a small pool of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.file_tree import open_tree
from edgeship.calibration.samples.image_list import Labelling, list_folder, read_csv
from edgeship.calibration.samples.image_source import ImageSource
from edgeship.calibration.samples.preprocessing import Color, Preprocessing
from edgeship.calibration.types import Array

__all__ = ["Color", "Preprocessing", "Sample", "Samples", "open_samples"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One example: `feeds` by input name with a batch of 1, and the class it belongs to, if known."""

    name: str
    feeds: Mapping[str, Array]
    label: int | None = None


class Source(Protocol):
    """Where samples come from; they are numbered from 0."""

    @property
    def names(self) -> Sequence[str]:
        """What each sample is called in messages."""

    @property
    def labels(self) -> Sequence[int] | None:
        """Each sample's class, if known."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that every sample feeds."""

    def read(self, indices: Sequence[int]) -> Iterator[dict[str, Array]]:
        """The feeds of the samples at `indices` (ascending), in that order."""

    def digest(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Everything the feeds of `indices` depend on."""

    def contents(self, indices: Sequence[int]) -> Iterator[bytes]:
        """SHA-256 of each sample's own content, as it was given."""


class Samples:
    """A sized set of samples that can be gone through again and again, each time reading from disk."""

    def __init__(self, source: Source, indices: Sequence[int] | None = None, *, labelled: bool = True) -> None:
        self._source = source
        self._labels = source.labels if labelled else None
        self._indices = range(len(source.names)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.unchecked():
            for name, values in sample.feeds.items():
                if not np.isfinite(values).all():
                    raise InputError(
                        f"sample {sample.name}: {not_finite(values)} in input {name!r}; accepted: finite numbers"
                    )
            yield sample

    def unchecked(self) -> Iterator[Sample]:
        """The samples as they are, NaN and infinities included."""
        labels = self._labels
        for index, feeds in zip(self._indices, self._source.read(self._indices), strict=True):
            yield Sample(self._source.names[index], feeds, None if labels is None else labels[index])

    @property
    def has_labels(self) -> bool:
        """Whether every sample has its class."""
        return self._labels is not None

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that every sample feeds."""
        return self._source.input_names

    @property
    def names(self) -> tuple[str, ...]:
        """What the samples are called, in order."""
        return tuple(self._source.names[index] for index in self._indices)

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The classes, in order, if known."""
        labels = self._labels
        return None if labels is None else tuple(labels[index] for index in self._indices)

    def digest(self) -> str:
        """SHA-256 over the files' contents, names and labels, and the preprocessing."""
        sha = hashlib.sha256()
        sha.update(json.dumps([self.names, self.labels, self.input_names]).encode())
        for part in self._source.digest(self._indices):
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(part)
        return sha.hexdigest()

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Each sample's name and the SHA-256 of its content as it was given: equal for copies of one file."""
        return zip(self.names, self._source.contents(self._indices), strict=True)

    def take(self, count: int, seed: int = 0) -> Samples:
        """At most `count` of the samples, in their order: with labels as many of each class as possible.

        The choice depends on the names, labels and seed only, not on the machine: it is the order of
        sha256(seed, name).
        """
        if count < 1:
            raise InputError(f"{count} samples were asked for; accepted: at least 1")
        if count >= len(self):
            return self
        names, labels = self._source.names, self._source.labels  # also where they are not told: the same samples

        def rank(text: str) -> bytes:
            return hashlib.sha256(f"{seed}\0{text}".encode()).digest()

        chosen = sorted(self._indices, key=lambda index: (rank(names[index]), index))
        if labels is not None:
            turn: dict[int, int] = {}
            order = []
            for index in chosen:
                label = labels[index]
                order.append((turn.get(label, 0), rank(f"class {label}"), index))
                turn[label] = turn.get(label, 0) + 1
            chosen = [index for *_, index in sorted(order)]
        return Samples(self._source, sorted(chosen[:count]), labelled=self.has_labels)

    def without_labels(self) -> Samples:
        """The same samples, whose classes mean nothing."""
        return Samples(self._source, self._indices, labelled=False)


def open_samples(  # noqa: PLR0913 - every one of them is a word of the recipe, and given by name
    path: str | Path,
    *,
    root: str | Path | None = None,
    input_name: str = "input",
    preprocessing: Preprocessing | None = None,
    labels: str | Path | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    classes: int | None = None,
    class_names: Sequence[str] = (),
) -> Samples:
    """The samples at `path`: a CSV (file[,label]), a folder of images or class folders (also in a .zip), or an .npz.

    A CSV's files are relative to `root`, or to the CSV's own folder. `preprocessing` is needed for images. `labels` is
    a CSV (file,label) that says the images' classes in the place of class folders or of the list. `shapes` gives the
    model's inputs and their shapes (batch ignored, -1 matches anything) to check arrays against; without it an .npz
    needs the key `input_name`. `classes` bounds the labels, `class_names` is their order, where it is not that of the
    class folders' sorted names.

    Raises InputError for what is missing, empty or does not fit. The files' contents are checked when they are read.
    """
    place = Path(path)
    base = Path(root) if root is not None else None
    if not place.is_absolute() and base is not None and not place.exists() and open_tree(place) is None:
        place = base / place
    if place.suffix.lower() == ".npz" and place.is_file():
        from edgeship.calibration.samples.array_file import LABELS, ArraySource

        if labels is not None:
            raise InputError(
                f"{place} holds arrays, and {labels} is about image files; accepted: the classes under the key "
                f"{LABELS[0]!r}"
            )
        source: Source = ArraySource(place, dict(shapes) if shapes else {input_name: ()})
    else:
        labelling = Labelling(Path(labels) if labels is not None else None, tuple(class_names))
        if shapes and len(shapes) > 1:
            raise InputError(
                f"{place} holds images, which feed one input, and the model has several: {', '.join(shapes)}; "
                "accepted: arrays as .npz, with a key for each input"
            )
        source = _images(place, base, input_name, preprocessing, labelling)
    if not len(source.names):
        raise InputError(f"{place} holds no samples")
    _check_labels(source, place, classes)
    return Samples(source)


def _images(
    place: Path, root: Path | None, input_name: str, preprocessing: Preprocessing | None, labelling: Labelling
) -> ImageSource:
    if place.suffix.lower() == ".csv":
        tree, files = read_csv(place, root or place.parent, labelling)
    else:
        found = open_tree(place)
        if found is None:
            what = "holds no files" if place.exists() else "does not exist"
            raise InputError(f"{place} {what}; accepted: a folder of images, a .csv with the column file, or an .npz")
        tree, files = found, list_folder(found, labelling)
    if preprocessing is None:
        raise InputError(
            f"{place} holds images, and nothing says how to preprocess them; give a recipe, or arrays as .npz"
        )
    return ImageSource(tree, files, preprocessing, input_name)


def _check_labels(source: Source, place: Path, classes: int | None) -> None:
    for name, label in zip(source.names, source.labels or (), strict=False):
        if label < 0 or (classes is not None and label >= classes):
            limit = f"0..{classes - 1}" if classes is not None else "0 or more"
            raise InputError(f"{place}: sample {name} has the label {label}; accepted: {limit}")


def not_finite(values: Array) -> str:
    """How many values are NaN or infinite, in words."""
    nans, infinities = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    return " and ".join(f"{count} {what}" for count, what in ((nans, "NaN"), (infinities, "infinite values")) if count)
