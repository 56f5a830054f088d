"""Returns which image files there are and which class each belongs to: from a folder, class folders, or a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from edgeship.calibration.errors import InputError
from edgeship.calibration.samples.file_tree import DiskTree, FileTree, open_tree

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageFile:
    """An image by its path inside a folder, and its class, if known."""

    name: str
    label: int | None = None


@dataclass(frozen=True)
class Labelling:
    """Where classes come from: a CSV (file,label), and the classes' names in the order of the model's outputs."""

    file: Path | None = None
    names: tuple[str, ...] = ()


def read_classes(path: Path) -> tuple[str, ...]:
    """The classes' names in a text file, a line for each in the order of the model's outputs. Raises InputError."""
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    while names and not names[-1]:
        names = names[:-1]
    if not names or not all(names) or len(set(names)) < len(names):
        raise InputError(f"{path} must have a name on every line, one for each class, none twice")
    return names


def list_folder(tree: FileTree, labelling: Labelling = Labelling()) -> list[ImageFile]:
    """The images of a flat folder, or of class folders: a folder's label is the place of its name.

    In the names of `labelling`, or else in the sorted ones. Its CSV of labels (file,label) replaces the folders' order;
    it names files by path in the folder, or by name alone.
    """
    classes = labelling.names
    names = _image_names(tree)
    if not names:
        raise InputError(f"{tree.where} holds no images ({', '.join(sorted(SUFFIXES))})")
    if labelling.file is not None:
        return _labelled(tree, names, labelling.file, classes)
    depths = {name.count("/") for name in names}
    if depths == {0}:
        return [ImageFile(name) for name in names]
    if depths == {1}:
        folders = _folders_of(names)
        unknown = [folder for folder in folders if folder not in classes] if classes else []
        if unknown:
            raise InputError(
                f"{tree.where} has folders that are no class: {_some(unknown)}; the classes are {_some(classes)}"
            )
        place = {name: index for index, name in enumerate(classes or folders)}
        return [ImageFile(name, place[name.split("/")[0]]) for name in names]
    if 0 in depths:
        nested = next(name for name in names if "/" in name)
        raise InputError(f"{tree.where} holds both images and folders of images ({nested}); accepted: one of the two")
    deep = next(name for name in names if name.count("/") > 1)
    raise InputError(
        f"{tree.where} holds images deeper than <class>/<image>: {deep}; give the folder of the class folders"
    )


def class_folders(path: Path) -> tuple[str, ...]:
    """The sorted names of the class folders at `path`, also in a .zip; none where something else is there, or nothing.

    Raises InputError for what cannot be read.
    """
    tree = open_tree(path)
    names = [] if tree is None else _image_names(tree)
    return tuple(_folders_of(names)) if {name.count("/") for name in names} == {1} else ()


def _image_names(tree: FileTree) -> list[str]:
    return [name for name in tree.files() if name[name.rfind(".") :].lower() in SUFFIXES]


def _folders_of(names: Iterable[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names})


def _labelled(tree: FileTree, names: Sequence[str], labels: Path, classes: Sequence[str]) -> list[ImageFile]:
    rows = _rows(labels, classes)
    if any(row.label is None for row in rows):
        raise InputError(f"{labels} has no column 'label'; accepted: a header file,label")
    label = {row.name: row.label for row in rows}
    files = [ImageFile(name, label.get(name, label.get(PurePosixPath(name).name))) for name in names]
    missing = [file.name for file in files if file.label is None]
    if missing:
        raise InputError(f"{labels} has no label for {_some(missing)} of {tree.where}")
    return files


def read_csv(path: Path, root: Path, labelling: Labelling = Labelling()) -> tuple[FileTree, list[ImageFile]]:
    """The folder and the images that a CSV with the header file[,label] lists, in its order.

    A label is a number, or one of the names of `labelling`; its CSV (file,label) takes the place of their own.
    Raises InputError.
    """
    rows = _rows(path, labelling.names)
    tree = open_tree(root)
    if tree is None:
        raise InputError(f"{root}, where the files of {path} should lie, does not exist")
    outside = [
        row.name for row in rows if PurePosixPath(row.name).is_absolute() or ".." in PurePosixPath(row.name).parts
    ]
    if outside and not isinstance(tree, DiskTree):
        raise InputError(f"{path} names files outside {tree.where}: {_some(outside)}")
    missing = [row.name for row in rows if not tree.has(row.name)]
    if missing:
        raise InputError(f"{path} lists {len(missing)} files that are not in {tree.where}: {_some(missing)}")
    return tree, rows if labelling.file is None else _labelled(
        tree, [row.name for row in rows], labelling.file, labelling.names
    )


def _rows(path: Path, classes: Sequence[str]) -> list[ImageFile]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error}") from error
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a well-formed CSV: {error}") from error
    if not table:
        raise InputError(f"{path} is empty; accepted: a header with the column file, and label if known")
    header = [column.strip().lower() for column in table[0]]
    if "file" not in header:
        raise InputError(
            f"{path} begins with {','.join(header)[:80]!r}; accepted: a header with the column file, and label if known"
        )
    found = [_row(path, number, header, cells, classes) for number, cells in enumerate(table[1:], 2) if any(cells)]
    repeated = sorted(_repeated(row.name for row in found))
    if repeated:
        raise InputError(f"{path} lists files twice: {_some(repeated)}")
    return found


def _row(path: Path, number: int, header: Sequence[str], cells: Sequence[str], classes: Sequence[str]) -> ImageFile:
    if len(cells) != len(header):
        raise InputError(f"{path}, line {number}: {len(cells)} columns, the header has {len(header)}")
    row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
    if not row["file"] or "\0" in row["file"]:
        raise InputError(f"{path}, line {number}: the column file is empty or no path")
    file = ImageFile(row["file"])
    if "label" not in row:
        return file
    if row["label"] in classes:
        return replace(file, label=classes.index(row["label"]))
    try:
        return replace(file, label=int(row["label"]))
    except ValueError as error:
        names = (
            f", or a class: {_some(classes)}" if classes else ", or a class's name with a file of them (data.classes)"
        )
        raise InputError(
            f"{path}, line {number}: the label is {row['label']!r}; accepted: a whole number{names}"
        ) from error


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]  # add returns None


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
